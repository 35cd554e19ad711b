// Scores against quantized keys by integer arithmetic: a query times a group's scales, rounded to 16 bits of its largest,
// times the codes of four channels in a lane:
//
//     sum_c (q_c s_c) code_tc = unit * sum_c (256 high_c + low_c) code_tc,    where q_c s_c = unit * (256 high_c + low_c)
//
// and what was rounded off is multiplied by a code's distance from the middle, not by the code.
#pragma once

#include <stdint.h>

#include "attention/integer.h"
#include "attention/tile.h"
#include "common/layout.h"
#include "common/simd.h"
#include "kernels.h"
#include "kivi/pages.h"
#include "kivi/scratch.h"

namespace xquant {
namespace {

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
// Whether a token's codes are whole quadruples that transpose_words reaches.
inline bool keys_in_integers(const KeyView& view) { return view.row_bytes() % 16 == 0; }

// A row of queries in integers.
inline void fold_integers(const float* query, int64_t row, int64_t head_size, float middle, const KiviScratch& scratch) {
    float* folded = scratch.folded;
    vf top = {}, offset = {};  // as if all codes were the middle
    for (int64_t i = 0; i < head_size; i += kLanes) {
        const vf q = load(query + i), x = q * load(scratch.scales + i);
        store(folded + i, x);
        offset += q * load(scratch.zeros + i) + x * middle;
        top = maximum(x > 0.0f ? x : -x, top);
    }
    const float largest = reduce_max(top), unit = largest * (1.0f / 32512.0f);
    const vf inverse = broadcast(largest > 0.0f ? 32512.0f / largest : 0.0f);
    int8_t* high = scratch.integers + row * 2 * head_size;
    vi total = {};
    for (int64_t i = 0; i < head_size; i += kLanes) {
        const vi x = (vi)_mm512_maskz_cvtps_epi32(0xffff, (__m512)(load(folded + i) * inverse));
        total = (vi)_mm512_add_epi32((__m512i)total, (__m512i)x);  // wraps around: NaN is INT_MIN
        // The low part is signed, too, so the high one is of the next multiple of 256.
        _mm_storeu_si128((__m128i*)(high + i), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)((x + 128) >> 8)));
        _mm_storeu_si128((__m128i*)(high + head_size + i), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)x));
    }
    scratch.units[row] = unit;
    scratch.offsets[row] = reduce_add(offset - to_float(total) * (unit * middle));
}

// Not inlined: see integer_values_block.
template <int kRows, int kVectors>
__attribute__((noinline)) void integer_scores_block(const KiviScratch& scratch, const int32_t* codes, int64_t quads, int64_t row,
                                 float* scores) {
    __m512i high[kRows][kVectors], low[kRows][kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) high[i][j] = low[i][j] = _mm512_setzero_si512();
    }
    const int32_t* integers = (const int32_t*)scratch.integers + row * 2 * quads;
    for (int64_t k = 0; k < quads; ++k, codes += kTile) {
        __m512i columns[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) columns[j] = _mm512_loadu_si512(codes + j * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
            const __m512i upper = _mm512_set1_epi32(integers[2 * i * quads + k]);
            const __m512i lower = _mm512_set1_epi32(integers[(2 * i + 1) * quads + k]);
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) {
                multiply_add<true>(high[i][j], columns[j], upper);
                multiply_add<true>(low[i][j], columns[j], lower);
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
            const vf sum = to_float(((vi)high[i][j] << 8) + (vi)low[i][j]);
            store(scores + (row + i) * kTile + j * kLanes, sum * scratch.units[row + i] + scratch.offsets[row + i]);
        }
    }
}

template <int kRows, int kVectors>
inline void integer_scores(const KiviScratch& scratch, const int32_t* codes, int64_t quads, int64_t row, int64_t rows,
                           float* scores) {
    for (; row + kRows <= rows; row += kRows) {
        integer_scores_block<kRows, kVectors>(scratch, codes, quads, row, scores);
    }
    if constexpr (kRows > 1) {
        if (row < rows) integer_scores<kRows - 1, kVectors>(scratch, codes, quads, row, rows, scores);
    }
}

// Scores of the columns [first, last) of a tile: tokens from `slot` of a page on, all of one group, which is loaded.
inline void score_integers(const KeyView& view, const uint8_t* page, int64_t slot, int64_t rows, int64_t first,
                           int64_t last, const Scratch& base, const KiviScratch& scratch) {
    const int64_t head_size = view.plan.layer.head_size, bits = view.plan.key_bits, row_bytes = view.row_bytes();
    const float middle = float((1 << bits) - 1) / 2;
    for (int64_t row = 0; row < rows; ++row) {
        fold_integers(base.query + row * base.query_width, row, head_size, middle, scratch);
    }
    int32_t* codes = (int32_t*)base.keys;
    const auto interleave = bits == 4 ? interleave_run<4> : interleave_run<2>;
    for (int64_t strip = first; strip < last; strip += kStrip) {
        interleave(page + view.codes(slot + strip - first), row_bytes, row_bytes, codes + strip);
    }
    int64_t column = first;
    for (; column + 2 * kLanes <= last; column += 2 * kLanes) {
        integer_scores<4, 2>(scratch, codes + column, head_size / 4, 0, rows, base.weights + column);
    }
    for (; column < last; column += kLanes) {
        integer_scores<4, 1>(scratch, codes + column, head_size / 4, 0, rows, base.weights + column);
    }
}
#else
inline bool keys_in_integers(const KeyView&) { return false; }
inline void score_integers(const KeyView&, const uint8_t*, int64_t, int64_t, int64_t, int64_t, const Scratch&,
                           const KiviScratch&) {}
#endif

}  // namespace
}  // namespace xquant
