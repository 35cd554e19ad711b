// Weighed sums of value latents by integer arithmetic: weights, times a token's scale, rounded to 16 bits of the largest
// of their row and tile, in two integers of 8 bits, times the codes of four tokens in a lane:
//
//     sum_t w_t z_t = step * unit * (sum_t (256 high_t + low_t) code_t) + zero * sums,
//     where w_t scale_t = unit * (256 high_t + low_t)
//
// with step and zero of allocated streams' channels; in uniform ones both are 1 and sums are of weights times zeros, in
// allocated ones of the rounded weights times scales.
#pragma once

#include <stdint.h>
#include <string.h>

#include "api.h"
#include "attention/integer.h"
#include "attention/load_keys.h"
#include "attention/tile.h"
#include "attention/value_quads.h"
#include "common/layout.h"
#include "common/simd.h"
#include "kernels.h"
#include "tiles/registers.h"
#include "tiles/values.h"
#include "unpack/unpack.h"
#include "unpack/unpack_allocated.h"

namespace xquant {
namespace {

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#if !defined(XQUANT_TILES)
// Inlined into something large, GCC 12 keeps the sums in memory.
template <int kRows, int kVectors>
__attribute__((noinline)) void integer_values_block(const IntegerWeights& p, int64_t row, int64_t column) {
    __m512i high[kRows][kVectors], low[kRows][kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) high[i][j] = low[i][j] = _mm512_setzero_si512();
    }
    const int32_t* weights = (const int32_t*)(p.weights + row * kWeightBytes);
    const int32_t* codes = p.codes + p.first_quad * p.stride + column;
    for (int64_t k = p.first_quad; k < p.last_quad; ++k, codes += p.stride) {
        __m512i columns[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) columns[j] = _mm512_loadu_si512(codes + j * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
            const int32_t* quads = weights + i * (kWeightBytes / 4) + k;
            const __m512i upper = _mm512_set1_epi32(quads[0]), lower = _mm512_set1_epi32(quads[kTile / 4]);
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) {
                multiply_add<true>(high[i][j], columns[j], upper);
                multiply_add<true>(low[i][j], columns[j], lower);
            }
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
        const int64_t at = column + j * kLanes;
        const vf step = step_of(p, at), zero = zero_of(p, at);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) add_integers(p, row + i, at, (vi)high[i][j], (vi)low[i][j], step, zero);
    }
}

template <int kRows, int kVectors>
inline void integer_values_columns(const IntegerWeights& p, int64_t row, int64_t rows, int64_t column) {
    for (; row + kRows <= rows; row += kRows) integer_values_block<kRows, kVectors>(p, row, column);
    if constexpr (kRows > 1) {
        if (row < rows) integer_values_columns<kRows - 1, kVectors>(p, row, rows, column);
    }
}

// `channels` is a multiple of 16.
inline void integer_values(const IntegerWeights& p, int64_t rows, int64_t channels) {
    int64_t column = 0;
    if (rows <= 3) {  // decode: few rows, so more columns at once
        for (; column + 4 * kLanes <= channels; column += 4 * kLanes) integer_values_columns<3, 4>(p, 0, rows, column);
    }
    for (; column + 2 * kLanes <= channels; column += 2 * kLanes) integer_values_columns<4, 2>(p, 0, rows, column);
    for (; column < channels; column += kLanes) integer_values_columns<4, 1>(p, 0, rows, column);
}
#endif

// Whether sums of a band are made here: codes of one term, in runs of some length, and no FP16 numbers among them.
inline bool values_in_integers(const xquant_plan& plan, int64_t kv_head, const Band& band) {
    if (band.last - band.first > 1) return false;
    const HeadView view = head_view(plan, plan.value.terms[band.first], kv_head);
    if (view.stream.allocated) return true;
    const xquant_band& runs = view.head.bands[band.index];
    for (int64_t i = runs.begin; i < runs.end; ++i) {
        // What is added behind a run must be its own.
        if (view.head.runs[i].bits == 16 || view.head.runs[i].channels % kPad) return false;
    }
    return !view.stream.outlier_channels;
}

// Add the value latents of a band of tokens start + [first, last), times their weights. Others may hold anything: their
// scales and zeros are taken for 0.
inline void accumulate_integer_values(const xquant_plan& plan, const Pages& pages, int64_t kv_head, int64_t rows,
                                      int64_t start, int64_t first, int64_t last, const Band& band, const State& state,
                                      const Scratch& scratch) {
    const xquant_term& term = plan.value.terms[band.first];
    const HeadView view = head_view(plan, term, kv_head);
    const xquant_band& runs = view.head.bands[band.index];
    const bool allocated = view.stream.allocated;
    const int64_t begin = first / kStrip * kStrip, end = round_up(last, kStrip), stride = scratch.value_stride;
    int32_t* codes = (int32_t*)scratch.values;
    for (int64_t strip = begin; strip < end; strip += kStrip) {
        load_code_quads(view, pages.page(term, start + strip), pages.slot(start + strip), runs,
                        codes + strip / 4 * stride, stride, scratch.strip);
    }
    const int64_t count = allocated ? 1 : runs.end - runs.begin;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t channel = allocated ? 0 : view.head.runs[runs.begin + i].channel - runs.channel;
        for (int64_t strip = begin; strip < end; strip += kStrip) {
            const uint8_t* page = pages.page(term, start + strip);
            load_factors(view, page, pages.slot(start + strip), runs.begin + i, scratch.scales + strip,
                         scratch.zeros + strip);
        }
        for (int64_t j = begin; j < first; ++j) scratch.scales[j] = scratch.zeros[j] = 0.0f;
        for (int64_t j = last; j < end; ++j) scratch.scales[j] = scratch.zeros[j] = 0.0f;
        // What was rounded off a weight is to be multiplied by a code's distance from the middle, not by the code.
        const float middle = allocated ? 0.0f : float((1 << view.head.runs[runs.begin + i].bits) - 1) / 2;
        // So zeros become what the middle stands for.
        for (int64_t j = begin; j < end; j += kLanes) {
            store(scratch.zeros + j, load(scratch.zeros + j) + load(scratch.scales + j) * middle);
        }
        for (int64_t row = 0; row < rows; ++row) {
            const float* weights = scratch.weights + row * kTile;
            int8_t* to = scratch.integers + row * kWeightBytes;
            if (kTiles && end - begin < kTile) memset(to, 0, kWeightBytes);
            const RowOfIntegers integers =
                integer_weights(weights + begin, scratch.scales + begin, end - begin, to + begin);
            scratch.units[row] = integers.unit;
            if (allocated) {
                scratch.sums[row] = integers.unit * reduce_add(integers.integers);
                continue;
            }
            vf sum = integers.integers * (-integers.unit * middle);
            for (int64_t j = begin; j < end; j += kLanes) sum += load(weights + j) * load(scratch.zeros + j);
            scratch.sums[row] = reduce_add(sum);
        }
        IntegerWeights p;
        p.weights = scratch.integers;
        p.first_quad = begin / 4;
        p.last_quad = end / 4;
        p.units = scratch.units;
        p.sums = scratch.sums;
        p.codes = codes + channel;
        p.stride = stride;
        p.step = allocated ? view.head.step + runs.channel : nullptr;
        p.zero = allocated ? view.head.zero + runs.channel : nullptr;
        p.width = round_up(plan.value.width, kPad);
        p.to = state.accumulator + band.row + channel;
        const int64_t channels = round_up(allocated ? band.channels : view.head.runs[runs.begin + i].channels, kPad);
#if defined(XQUANT_TILES)
        tile_values(p, rows, channels, (int32_t*)scratch.products);
#else
        integer_values(p, rows, channels);
#endif
    }
}
#else
inline bool values_in_integers(const xquant_plan&, int64_t, const Band&) { return false; }
inline void accumulate_integer_values(const xquant_plan&, const Pages&, int64_t, int64_t, int64_t, int64_t, int64_t,
                                      const Band&, const State&, const Scratch&) {}
#endif

}  // namespace
}  // namespace xquant
