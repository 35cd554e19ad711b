// What one task has in flight beside what attention to latents has: see tile.h.
#pragma once

#include <stdint.h>

#include "attention/tile.h"
#include "common/layout.h"
#include "kernels.h"
#include "kivi/kivi_api.h"
#include "kivi/pages.h"

namespace xquant {
namespace {

struct KiviScratch {
    float* folded;     // [rows][query_width], queries times a group's scales
    float* scales;     // [query_width] of a group
    float* zeros;      // [query_width]
    int8_t* integers;  // [rows][2][head_size], folded queries: the high parts, then the low ones
    float* units;      // [rows], of them
    float* offsets;    // [rows], what is added to a group's scores
    float* exact;      // [rows][kTile], scores, or weights, of exact tokens
    uint8_t* bytes;    // of a strip, transposed
    int64_t floats;    // size of all of it

    // Without memory only the size is right. It follows that of `base`.
    KiviScratch(const xquant_kivi_plan& plan, const Scratch& base, int64_t rows, float* memory) {
        floats = base.floats;
        const auto take = [this, memory](int64_t count) {
            const int64_t at = floats;
            floats += round_up(count, kPad);
            return memory ? memory + at : nullptr;
        };
        const int64_t width = base.query_width;
        folded = take(rows * width);
        scales = take(width);
        zeros = take(width);
        integers = (int8_t*)take(rows * 2 * plan.layer.head_size / 4);
        units = take(rows);
        offsets = take(rows);
        exact = take(rows * kTile);
        bytes = (uint8_t*)take(round_up(plan.layer.head_size * bytes_of(plan.residual_dtype), 16) * kStrip / 4);
    }
};

}  // namespace
}  // namespace xquant
