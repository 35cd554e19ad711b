// Scores against quantized keys. A group's tokens share a scale s_c and a zero z_c per channel, so
//
//     q . k_t = sum_c (q_c s_c) code_tc + sum_c q_c z_c
//
// and a group's scales are folded into the query once: no key is dequantized. With VNNI the folded query is rounded to 16
// bits of its largest, in two integers of 8 bits, and multiplied with the codes of four channels in a lane. Keys that
// RoPE turns when they are read must be dequantized first.
#pragma once

#include <stdint.h>

#include "api.h"
#include "attention/rematerialize.h"
#include "attention/tile.h"
#include "common/convert.h"
#include "common/gemm.h"
#include "common/layout.h"
#include "common/simd.h"
#include "common/transpose.h"
#include "kernels.h"
#include "kivi/integer_keys.h"
#include "kivi/kivi_api.h"
#include "kivi/pages.h"
#include "kivi/scratch.h"
#include "unpack/unpack.h"

namespace xquant {
namespace {

// Scales and zeros of the group of a slot, followed by zeros.
inline void load_group(const KeyView& view, const uint8_t* page, int64_t slot, const KiviScratch& scratch) {
    const int64_t head_size = view.plan.layer.head_size, width = round_up(head_size, kPad);
    load_row(XQUANT_FP16, page + view.scale(slot), 0, head_size, scratch.scales);
    load_row(XQUANT_FP16, page + view.zero(slot), 0, head_size, scratch.zeros);
    for (int64_t i = head_size; i < width; ++i) scratch.scales[i] = scratch.zeros[i] = 0.0f;
}

// Codes of 16 tokens, transposed bytes [bytes][16], to [channels][kTile] through convert(codes, channel).
template <int kBits, typename Convert>
inline void convert_codes(const uint8_t* bytes, int64_t channels, float* to, const Convert& convert) {
    const int64_t size = channels * kBits / 8;
    for (int64_t i = 0; i < size; ++i) {
#pragma GCC unroll 4
        for (int64_t field = 0; field < 8 / kBits; ++field) {
            const int64_t channel = field * size + i;
            for (int64_t lane = 0; lane < kStrip; lane += kLanes) {
                const vf codes = to_float(field_codes<kBits>(bytes + i * kStrip + lane, field));
                store(to + channel * kTile + lane, convert(codes, channel));
            }
        }
    }
}

template <typename Convert>
inline void convert_strip(const KeyView& view, const uint8_t* page, int64_t slot, float* to, uint8_t* bytes,
                          const Convert& convert) {
    const int64_t head_size = view.plan.layer.head_size;
    transpose_codes(page + view.codes(slot), view.row_bytes(), view.row_bytes(), bytes);
    if (view.plan.key_bits == 4) {
        convert_codes<4>(bytes, head_size, to, convert);
    } else {
        convert_codes<2>(bytes, head_size, to, convert);
    }
}

// A query row times a group's scales; returns what the zeros add to its scores.
inline float fold(const float* query, int64_t width, const KiviScratch& scratch, float* to) {
    vf sum = {};
    for (int64_t i = 0; i < width; i += kLanes) {
        store(to + i, load(query + i) * load(scratch.scales + i));
        sum += load(query + i) * load(scratch.zeros + i);
    }
    return reduce_add(sum);
}

// Scores of the columns [first, last) of a tile against base.keys, which are the codes of one group.
inline void score_folded(const Scratch& base, const KiviScratch& scratch, int64_t rows, int64_t head_size, int64_t first,
                         int64_t last) {
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = row * base.query_width;
        const vf offset = broadcast(fold(base.query + at, base.query_width, scratch, scratch.folded + at));
        float* scores = base.weights + row * kTile;
        for (int64_t j = first; j < last; j += kLanes) store(scores + j, offset);
    }
    Product product;
    product.depth = head_size;
    product.a = scratch.folded;
    product.lda = base.query_width;
    product.b = base.keys + first;
    product.ldb = kTile;
    product.c = base.weights + first;
    product.ldc = kTile;
    product.accumulate = true;
    gemm<Order::kPlain>(rows, last - first, product);
}

// Scores of the columns [first, last) of a tile against base.keys.
inline void score_keys(const Scratch& base, int64_t rows, int64_t head_size, int64_t first, int64_t last, float* scores) {
    Product product;
    product.depth = head_size;
    product.a = base.query;
    product.lda = base.query_width;
    product.b = base.keys + first;
    product.ldb = kTile;
    product.c = scores + first;
    product.ldc = kTile;
    product.accumulate = false;
    gemm<Order::kPlain>(rows, last - first, product);
}

// Scores of tokens start + [first, last), multiples of 16, for all rows.
inline void score_quantized(const xquant_kivi_plan& plan, const Pages& pages, int64_t kv_head, int64_t rows, int64_t start,
                            int64_t first, int64_t last, const Scratch& base, const KiviScratch& scratch) {
    const int64_t head_size = plan.layer.head_size;
    const KeyView view{plan, kv_head};
    // A block holds whole groups, so what begins one lies in one page.
    for (int64_t column = first, end; column < last; column = end) {
        const int64_t position = start + column, next = (position / plan.key_group_size + 1) * plan.key_group_size;
        end = next - start < last ? next - start : last;
        const uint8_t* page = pages.page(0, position);
        load_group(view, page, pages.slot(position), scratch);
        if (!plan.layer.rope && keys_in_integers(view)) {
            score_integers(view, page, pages.slot(position), rows, column, end, base, scratch);
            continue;
        }
        for (int64_t strip = column; strip < end; strip += kStrip) {
            const int64_t slot = pages.slot(start + strip);
            if (!plan.layer.rope) {
                convert_strip(view, page, slot, base.keys + strip, scratch.bytes, [](vf codes, int64_t) { return codes; });
                continue;
            }
            convert_strip(view, page, slot, base.keys + strip, scratch.bytes, [&](vf codes, int64_t channel) {
                return codes * scratch.scales[channel] + scratch.zeros[channel];
            });
            rotate(plan.layer, (start + strip) / kStrip, base.keys + strip, kTile);
        }
        if (!plan.layer.rope) score_folded(base, scratch, rows, head_size, column, end);
    }
    if (plan.layer.rope) score_keys(base, rows, head_size, first, last, base.weights);
}

}  // namespace
}  // namespace xquant
