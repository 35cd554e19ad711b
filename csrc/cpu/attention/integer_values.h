// Weighed sums of value latents by integer arithmetic: weights, times a token's scale, rounded to 16 bits of the largest
// of their row and tile, times the codes of two tokens in a lane:
//
//     sum_t w_t z_t = step * unit * (sum_t integer_t code_t) + zero * sums,   where w_t scale_t = unit * integer_t
//
// with step and zero of allocated streams' channels; in uniform ones both are 1 and sums are of weights times zeros, in
// allocated ones of the rounded weights times scales.
#pragma once

#include <stdint.h>

#include "api.h"
#include "attention/integer.h"
#include "attention/load_keys.h"
#include "attention/tile.h"
#include "common/layout.h"
#include "common/simd.h"
#include "common/transpose.h"
#include "kernels.h"
#include "unpack/unpack.h"
#include "unpack/unpack_allocated.h"

namespace xquant {
namespace {

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
// The weights of a tile for channels that share scales.
struct IntegerWeights {
    int64_t pairs;           // of tokens
    const int32_t* weights;  // [rows][kTile / 2], of a token and of the next
    const float* units;      // [rows]
    const float* sums;       // [rows]
    const int32_t* codes;    // [pairs][stride], of a token and of the next
    int64_t stride;
    const float* step;  // [channels] or NULL
    const float* zero;  // [channels] or NULL
    float* to;          // [rows][width], added to
    int64_t width;
};

// Inlined into something large, GCC 12 keeps the sums in memory.
template <int kRows, int kVectors>
__attribute__((noinline)) void integer_values_block(const IntegerWeights& p, int64_t row, int64_t column) {
    __m512i sums[kRows][kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_setzero_si512();
    }
    const int32_t* weights = p.weights + row * (kTile / 2);
    const int32_t* codes = p.codes + column;
    for (int64_t k = 0; k < p.pairs; ++k, codes += p.stride) {
        __m512i columns[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) columns[j] = _mm512_loadu_si512(codes + j * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
            const __m512i weight = _mm512_set1_epi32(weights[i * (kTile / 2) + k]);
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) multiply_add<false>(sums[i][j], columns[j], weight);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
        const int64_t at = column + j * kLanes;
        const vf step = p.step ? load(p.step + at) : broadcast(1.0f), zero = p.zero ? load(p.zero + at) : broadcast(1.0f);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
            float* to = p.to + (row + i) * p.width + at;
            store(to, load(to) + (to_float((vi)sums[i][j]) * p.units[row + i] * step + zero * p.sums[row + i]));
        }
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
    for (; column + 4 * kLanes <= channels; column += 4 * kLanes) integer_values_columns<4, 4>(p, 0, rows, column);
    for (; column + 2 * kLanes <= channels; column += 2 * kLanes) integer_values_columns<4, 2>(p, 0, rows, column);
    for (; column < channels; column += kLanes) integer_values_columns<4, 1>(p, 0, rows, column);
}

struct RowOfIntegers {
    float unit;
    vf integers;  // added up by lanes
};

// Weights [columns] of a row times the tokens' scales, as integers of 16 bits, two in a lane.
inline RowOfIntegers integer_weights(const float* weights, const float* scales, int64_t columns, int32_t* to) {
    vf top = {};
    for (int64_t j = 0; j < columns; j += kLanes) {
        const vf x = load(weights + j) * load(scales + j);
        top = maximum(x > 0.0f ? x : -x, top);
    }
    const float largest = reduce_max(top), unit = largest * (1.0f / 32767.0f);
    // Weights that all have underflowed count as none: the inverse would be infinite.
    const vf inverse = broadcast(largest > 1e-33f ? 32767.0f / largest : 0.0f);
    vi total = {};
    for (int64_t j = 0; j < columns; j += kLanes) {
        const __m512i x = _mm512_maskz_cvtps_epi32(0xffff, (__m512)(load(weights + j) * load(scales + j) * inverse));
        total = (vi)_mm512_add_epi32((__m512i)total, x);  // wraps around: NaN is INT_MIN
        _mm256_storeu_si256((__m256i*)(to + j / 2), _mm512_maskz_cvtsepi32_epi16(0xffff, x));
    }
    return {unit, to_float(total)};
}

// Field `field` of kBits bits of two tokens' bytes in a lane.
template <int kBits>
inline vi pair_field(vi bytes, int64_t field) {
    return bytes >> (int32_t)(field * kBits) & (((1 << kBits) - 1) * 0x10001);
}

inline vi pair_bytes(const uint8_t* first, const uint8_t* second) {
    return load_bytes(first) | load_bytes(second) << 16;
}

// One run of two tokens. Writes up to kLanes - 1 lanes past it, as unpack_run_row does.
template <int kBits>
inline void unpack_run_pair(const uint8_t* first, const uint8_t* second, int64_t channels, int32_t* to) {
    if constexpr (kTwoPlanes<kBits>) {
        constexpr int kHigh = kHighBits<kBits>;
        const int64_t size = channels * kHigh / 8;
        for (int64_t field = 0; field < 8 / kHigh; ++field, to += size) {
            const int64_t low = (field & 1) * size, high = 2 * size;
            for (int64_t i = 0; i < size; i += kLanes) {
                const vi codes = pair_field<2 * kHigh>(pair_bytes(first + low + i, second + low + i), field >> 1);
                const vi upper = pair_field<kHigh>(pair_bytes(first + high + i, second + high + i), field);
                _mm512_storeu_si512(to + i, (__m512i)(codes | upper << (2 * kHigh)));
            }
        }
    } else {
        const int64_t size = channels * kBits / 8;
        int64_t i = 0;
        for (; i + kLanes <= size; i += kLanes) {
            const vi bytes = pair_bytes(first + i, second + i);
#pragma GCC unroll 4
            for (int64_t field = 0; field < 8 / kBits; ++field) {
                _mm512_storeu_si512(to + field * size + i, (__m512i)pair_field<kBits>(bytes, field));
            }
        }
        if (i == size) return;
        // A narrow field's excess would overwrite the next one's start, which is not rewritten in this order.
        const vi bytes = pair_bytes(first + i, second + i);
        const __mmask16 mine = (1 << (size - i)) - 1;
#pragma GCC unroll 4
        for (int64_t field = 0; field < 8 / kBits; ++field) {
            _mm512_mask_storeu_epi32(to + field * size + i, mine, (__m512i)pair_field<kBits>(bytes, field));
        }
    }
}

// Codes of a strip's value latents to [8][stride], tokens 2i and 2i + 1 in row i.
inline void load_code_pairs(const HeadView& view, const uint8_t* page, int64_t slot, const xquant_band& band,
                            int32_t* to, int64_t stride, const StripScratch& scratch) {
    if (view.stream.allocated) {
        unpack_codes(view, page, slot, band, scratch);
        for (int64_t start = 0; start < band.channels; start += 16) {
            uint8_t rows[kStrip * 16];
            transpose_back(scratch.codes + start * 16, rows);
#pragma GCC unroll 8
            for (int64_t i = 0; i < kStrip / 2; ++i) {
                const vi codes = pair_bytes(rows + back_row(2 * i), rows + back_row(2 * i + 1));
                _mm512_storeu_si512(to + i * stride + start, (__m512i)codes);
            }
        }
        return;
    }
    const uint8_t* codes = page + view.codes(slot);
    const int64_t row_bytes = view.head.row_bytes;
    for (int64_t i = band.begin; i < band.end; ++i) {
        const xquant_run& run = view.head.runs[i];
        with_bits(run.bits, [&](auto bits) {
            for (int64_t token = 0; token < kStrip; token += 2) {
                const uint8_t* first = codes + token * row_bytes + run.byte;
                unpack_run_pair<bits.value>(first, first + row_bytes, run.channels,
                                            to + token / 2 * stride + run.channel - band.channel);
            }
        });
    }
}

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
        load_code_pairs(view, pages.page(term, start + strip), pages.slot(start + strip), runs,
                        codes + (strip - begin) / 2 * stride, stride, scratch.strip);
    }
    const int64_t count = allocated ? 1 : runs.end - runs.begin;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t channel = allocated ? 0 : view.head.runs[runs.begin + i].channel - runs.channel;
        for (int64_t strip = begin; strip < end; strip += kStrip) {
            const uint8_t* page = pages.page(term, start + strip);
            load_factors(view, page, pages.slot(start + strip), runs.begin + i, scratch.scales + strip,
                         scratch.zeros + strip);
        }
        for (int64_t j = begin; j < end; ++j) {
            if (j < first || j >= last) scratch.scales[j] = scratch.zeros[j] = 0.0f;
        }
        // What was rounded off a weight is to be multiplied by a code's distance from the middle, not by the code.
        const float middle = allocated ? 0.0f : float((1 << view.head.runs[runs.begin + i].bits) - 1) / 2;
        // So zeros become what the middle stands for.
        for (int64_t j = begin; j < end; j += kLanes) {
            store(scratch.zeros + j, load(scratch.zeros + j) + load(scratch.scales + j) * middle);
        }
        for (int64_t row = 0; row < rows; ++row) {
            const float* weights = scratch.weights + row * kTile;
            const RowOfIntegers integers = integer_weights(weights + begin, scratch.scales + begin, end - begin,
                                                           scratch.integers + row * (kTile / 2));
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
        p.pairs = (end - begin) / 2;
        p.weights = scratch.integers;
        p.units = scratch.units;
        p.sums = scratch.sums;
        p.codes = codes + channel;
        p.stride = stride;
        p.step = allocated ? view.head.step + runs.channel : nullptr;
        p.zero = allocated ? view.head.zero + runs.channel : nullptr;
        p.width = round_up(plan.value.width, kPad);
        p.to = state.accumulator + band.row + channel;
        integer_values(p, rows, round_up(allocated ? band.channels : view.head.runs[runs.begin + i].channels, kPad));
    }
}
#else
inline bool values_in_integers(const xquant_plan&, int64_t, const Band&) { return false; }
inline void accumulate_integer_values(const xquant_plan&, const Pages&, int64_t, int64_t, int64_t, int64_t, int64_t,
                                      const Band&, const State&, const Scratch&) {}
#endif

}  // namespace
}  // namespace xquant
