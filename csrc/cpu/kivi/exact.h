// Keys and values of residual pages to FP32, in the two arrangements that the matrix products want.
#pragma once

#include <stdint.h>

#include "api.h"
#include "attention/rematerialize.h"
#include "common/convert.h"
#include "common/layout.h"
#include "common/simd.h"
#include "common/transpose.h"
#include "kernels.h"
#include "kivi/pages.h"

namespace xquant {
namespace {

// Numbers whose bits are in integers.
inline vf half_bits(vi bits) {
    const vi magnitude = (bits & 0x7fff) << 13;
    const vi scaled = (vi)((vf)magnitude * 0x1p112f);
    return (vf)((magnitude >= 0x0f800000 ? (magnitude | 0x7f800000) : scaled) | ((bits & 0x8000) << 16));
}

// Rows of `channels` numbers of 16 tokens, `row_bytes` apart, to [channels][stride]; `bytes` is scratch for as many bytes.
inline void transpose_rows(int64_t dtype, const uint8_t* from, int64_t row_bytes, float* to, int64_t stride,
                           uint8_t* bytes) {
    const int64_t size = bytes_of(dtype), channels = row_bytes / size;
    transpose_codes(from, row_bytes, row_bytes, bytes);
    for (int64_t channel = 0; channel < channels; ++channel, to += stride, bytes += size * kStrip) {
        for (int64_t lane = 0; lane < kStrip; lane += kLanes) {
            const auto byte = [&](int64_t i) { return load_bytes(bytes + i * kStrip + lane); };
            const vi low = byte(0) | byte(1) << 8;
            if (dtype == XQUANT_FP32) {
                store(to + lane, (vf)(low | byte(2) << 16 | byte(3) << 24));
            } else {
                store(to + lane, dtype == XQUANT_BF16 ? (vf)(low << 16) : half_bits(low));
            }
        }
    }
}

// Exact keys of tokens start + [first, last) to [head_size][kTile], turned where pages hold them before RoPE; both bounds
// are multiples of 16.
inline void load_exact_keys(const ResidualView& view, int64_t start, int64_t first, int64_t last, float* keys,
                            uint8_t* bytes) {
    for (int64_t strip = first; strip < last; strip += kStrip) {
        const int64_t position = start + strip;
        transpose_rows(view.plan.residual_dtype, view.key(position), view.row_bytes(), keys + strip, kTile, bytes);
        if (view.plan.layer.rope) rotate(view.plan.layer, position / kStrip, keys + strip, kTile);
    }
}

// Exact values of tokens start + [first, last) to [kTile][stride].
inline void load_exact_values(const ResidualView& view, int64_t start, int64_t first, int64_t last, float* values,
                              int64_t stride) {
    for (int64_t token = first; token < last; ++token) {
        load_row(view.plan.residual_dtype, view.value(start + token), 0, view.plan.layer.head_size,
                 values + token * stride);
    }
}

}  // namespace
}  // namespace xquant
