// What integer_values.h multiplies: weights as integers, and codes of four tokens in a lane.
#pragma once

#include <stdint.h>

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
// Two rows of a tile's tokens: the high parts of a row's weights, then the low ones.
constexpr int64_t kWeightBytes = 2 * kTile;

// The weights of a tile for channels that share scales.
struct IntegerWeights {
    const int8_t* weights;  // [rows][2][kTile], high parts and low ones; those of tokens without codes are 0
    const float* units;     // [rows]
    const float* sums;      // [rows]
    int64_t first_quad, last_quad;  // four tokens each
    const int32_t* codes;           // [kTile / 4][stride], a channel's of four tokens
    int64_t stride;
    const float* step;  // [channels] or NULL
    const float* zero;  // [channels] or NULL
    float* to;          // [rows][width], added to
    int64_t width;
};

// Add what a row's integers stand for, of kLanes channels from `at` on.
inline void add_integers(const IntegerWeights& p, int64_t row, int64_t at, vi high, vi low, vf step, vf zero) {
    float* to = p.to + row * p.width + at;
    store(to, load(to) + (to_float((high << 8) + low) * p.units[row] * step + zero * p.sums[row]));
}

inline vf step_of(const IntegerWeights& p, int64_t at) { return p.step ? load(p.step + at) : broadcast(1.0f); }
inline vf zero_of(const IntegerWeights& p, int64_t at) { return p.zero ? load(p.zero + at) : broadcast(1.0f); }

struct RowOfIntegers {
    float unit;
    vf integers;  // added up by lanes
};

// The largest integer: the low part is signed, so the high one is that of the next multiple of 256, at most 127.
constexpr float kLargestWeight = 32639.0f;

// Weights [columns] of a row times the tokens' scales, as integers: high parts [kTile], then low ones.
inline RowOfIntegers integer_weights(const float* weights, const float* scales, int64_t columns, int8_t* to) {
    vf top = {};
    for (int64_t j = 0; j < columns; j += kLanes) {
        const vf x = load(weights + j) * load(scales + j);
        top = maximum(x > 0.0f ? x : -x, top);
    }
    const float largest = reduce_max(top), unit = largest * (1.0f / kLargestWeight);
    // Weights that all have underflowed count as none: the inverse would be infinite.
    const vf inverse = broadcast(largest > 1e-33f ? kLargestWeight / largest : 0.0f);
    vi total = {};
    for (int64_t j = 0; j < columns; j += kLanes) {
        const vi x = (vi)_mm512_maskz_cvtps_epi32(0xffff, (__m512)(load(weights + j) * load(scales + j) * inverse));
        total = (vi)_mm512_add_epi32((__m512i)total, (__m512i)x);  // wraps around: NaN is INT_MIN
        _mm_storeu_si128((__m128i*)(to + j), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)((x + 128) >> 8)));
        _mm_storeu_si128((__m128i*)(to + kTile + j), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)x));
    }
    return {unit, to_float(total)};
}

// Field `field` of kBits bits of bytes.
template <int kBits>
inline vi byte_field(vi bytes, int64_t field) {
    return bytes >> (int32_t)(field * kBits) & (int32_t)(((1u << kBits) - 1) * 0x01010101u);
}

// 16 bytes of four tokens: the tokens' byte i in lane i.
inline vi quad_bytes(const uint8_t* from, int64_t row_bytes) {
    alignas(64) static const uint8_t kOrder[64] = {
        0, 16, 32, 48, 1, 17, 33, 49, 2,  18, 34, 50, 3,  19, 35, 51, 4,  20, 36, 52, 5,  21,
        37, 53, 6, 22, 38, 54, 7, 23, 39, 55, 8,  24, 40, 56, 9,  25, 41, 57, 10, 26, 42, 58,
        11, 27, 43, 59, 12, 28, 44, 60, 13, 29, 45, 61, 14, 30, 46, 62, 15, 31, 47, 63};
    return (vi)_mm512_maskz_permutexvar_epi8(~0ull, _mm512_load_si512(kOrder), (__m512i)load_rows(from, row_bytes));
}

// One run of four tokens. Writes up to kLanes - 1 lanes past it, as unpack_run_row does.
template <int kBits>
inline void unpack_run_quad(const uint8_t* from, int64_t row_bytes, int64_t channels, int32_t* to) {
    if constexpr (kTwoPlanes<kBits>) {
        constexpr int kHigh = kHighBits<kBits>;
        const int64_t size = channels * kHigh / 8;
        for (int64_t field = 0; field < 8 / kHigh; ++field, to += size) {
            const int64_t low = (field & 1) * size, high = 2 * size;
            for (int64_t i = 0; i < size; i += kLanes) {
                const vi codes = byte_field<2 * kHigh>(quad_bytes(from + low + i, row_bytes), field >> 1);
                const vi upper = byte_field<kHigh>(quad_bytes(from + high + i, row_bytes), field);
                _mm512_storeu_si512(to + i, (__m512i)(codes | upper << (2 * kHigh)));
            }
        }
    } else {
        const int64_t size = channels * kBits / 8;
        int64_t i = 0;
        for (; i + kLanes <= size; i += kLanes) {
            const vi bytes = quad_bytes(from + i, row_bytes);
#pragma GCC unroll 4
            for (int64_t field = 0; field < 8 / kBits; ++field) {
                _mm512_storeu_si512(to + field * size + i, (__m512i)byte_field<kBits>(bytes, field));
            }
        }
        if (i == size) return;
        // A narrow field's excess would overwrite the next one's start, which is not rewritten in this order.
        const vi bytes = quad_bytes(from + i, row_bytes);
        const __mmask16 mine = (1 << (size - i)) - 1;
#pragma GCC unroll 4
        for (int64_t field = 0; field < 8 / kBits; ++field) {
            _mm512_mask_storeu_epi32(to + field * size + i, mine, (__m512i)byte_field<kBits>(bytes, field));
        }
    }
}

// Codes of a strip's value latents to [4][stride], tokens 4i ... 4i + 3 in row i.
inline void load_code_quads(const HeadView& view, const uint8_t* page, int64_t slot, const xquant_band& band,
                            int32_t* to, int64_t stride, const StripScratch& scratch) {
    if (view.stream.allocated) {
        unpack_codes(view, page, slot, band, scratch);
        for (int64_t start = 0; start < band.channels; start += 16) {
            vi quads[4];
            transpose_words(scratch.codes + start * 16, 16, quads);
#pragma GCC unroll 4
            for (int64_t i = 0; i < 4; ++i) _mm512_storeu_si512(to + i * stride + start, (__m512i)quads[i]);
        }
        return;
    }
    const uint8_t* codes = page + view.codes(slot);
    const int64_t row_bytes = view.head.row_bytes;
    for (int64_t i = band.begin; i < band.end; ++i) {
        const xquant_run& run = view.head.runs[i];
        with_bits(run.bits, [&](auto bits) {
            for (int64_t quad = 0; quad < kStrip / 4; ++quad) {
                unpack_run_quad<bits.value>(codes + 4 * quad * row_bytes + run.byte, row_bytes, run.channels,
                                            to + quad * stride + run.channel - band.channel);
            }
        });
    }
}
#endif

}  // namespace
}  // namespace xquant
