// Keys by integer arithmetic: up_key in integers times the codes themselves, summed exactly in INT32. A lane does two
// multiply-adds of INT16 at once or four of INT8, and codes need not be dequantized first:
//
//     up^T z = scale * unit * (integers^T codes) + zero * sums,   where up = unit * integers and sums = up^T 1
//
// for channels that share a token's scale and zero: a scale group, see xquant_vllm/attention/cpu/integers.py.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/bfloat.h"
#include "common/layout.h"
#include "common/simd.h"
#include "common/transpose.h"
#include "kernels.h"
#include "tiles/registers.h"

namespace xquant {
namespace {

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
constexpr bool kIntegers = true;

// A scale group of a tile: what its sums are multiplied by. Rows of [tokens] are kTile apart.
struct ScaleGroup {
    int64_t pairs;            // of channels with integers of 16 bits, which come first
    int64_t quads;            // four channels with integers of 8 bits
    const int32_t* up;        // [pairs + quads][head_size]
    const int8_t* tiles;      // the same for tiles/keys.h, or NULL
    const int32_t* codes;     // [pairs + quads][kTile]
    const float* scales;      // [tokens]
    const float* zeros;       // [tokens]
    const float* units;       // [head_size]
    const float* sums;        // [head_size]
    int64_t outlier_channels;
    const float* outliers;    // [outlier_channels][kTile]
    const float* up_outliers; // [outlier_channels][head_size]
    bool accumulate;
};

// What the last scale group does to keys while they are in registers.
struct Finish {
    const float* bias;  // [head_size] or NULL
    const float* rope;  // of the tile's first strip, [pairs of channels][2][16], or NULL: keys are not turned
    int64_t half;       // pairs of channels
    uint32_t* bfloats;  // [head_size / 2][kTile], where keys go as BF16 in place of FP32, or NULL
};

// Codes times integers, two of 16 bits or four of 8. GCC 12 copies the accumulators of the intrinsics from register to
// register, and has too few of them.
template <bool kBytes>
inline void multiply_add(__m512i& sum, __m512i codes, __m512i integers) {
    if constexpr (kBytes) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(integers));
    } else {
        asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(integers));
    }
}

// `low` are the first half of the rows, `high` the others.
template <bool kBytes, int kRows, int kVectors>
inline void multiply_rows(int64_t depth, int64_t head_size, const int32_t* low, const int32_t* high, const int32_t* codes,
                          __m512i (&sums)[kRows][kVectors]) {
    constexpr int kHalf = kRows / 2;
    for (int64_t k = 0; k < depth; ++k, low += head_size, high += head_size, codes += kTile) {
        __m512i columns[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) columns[j] = _mm512_loadu_si512(codes + j * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const __m512i factor = _mm512_set1_epi32(i < kHalf ? low[i] : high[i - kHalf]);
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) multiply_add<kBytes>(sums[i][j], columns[j], factor);
        }
    }
}

// Whether RoPE turns rows, as a type.
template <bool kTurn>
struct Turned {
    static constexpr bool value = kTurn;
};

// Which kRows rows a block computes: neighbours, or half of them, and as many `apart`, with which they are turned.
struct Rows {
    int64_t first, apart;
};

// Keys from their sums: kRows rows of vectors from `column` on, of which sum(i, j) has integers.
template <int kRows, int kVectors, bool kTurn, typename Sum>
inline void finish_block(const ScaleGroup& scale_group, const Finish& finish, int64_t head_size, const Rows& rows,
                         int64_t pair, int64_t column, const Sum& sum, float* keys) {
    constexpr int kHalf = kRows / 2;
    const auto row = [&](int i) { return kTurn && i >= kHalf ? rows.first + rows.apart + i - kHalf : rows.first + i; };
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
        const int64_t at = column + j * kLanes;
        const vf scale = load(scale_group.scales + at), zero = load(scale_group.zeros + at);
        vf key[kRows];
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            key[i] = to_float(sum(i, j)) * scale * scale_group.units[row(i)] + zero * scale_group.sums[row(i)];
        }
        for (int64_t k = 0; k < scale_group.outlier_channels; ++k) {
            const vf outlier = load(scale_group.outliers + k * kTile + at);
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) key[i] += outlier * scale_group.up_outliers[k * head_size + row(i)];
        }
        if (scale_group.accumulate) {
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) key[i] += load(keys + row(i) * kTile + at);
        }
        if (finish.bias) {
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) key[i] += finish.bias[row(i)];
        }
        if constexpr (kTurn) {
            const float* table = finish.rope + (at / kStrip * finish.half + pair) * 2 * kStrip;
#pragma GCC unroll 8
            for (int i = 0; i < kHalf; ++i, table += 2 * kStrip) {
                const vf cosine = load(table), sine = load(table + kStrip), x = key[i], y = key[i + kHalf];
                key[i] = x * cosine - y * sine;
                key[i + kHalf] = y * cosine + x * sine;
            }
        }
        if (kTiles && finish.bfloats) {
#pragma GCC unroll 4
            for (int i = 0; i < kRows; i += 2) {
                const vi two = bfloat_pairs(key[i], key[i + 1]);
                memcpy(finish.bfloats + row(i) / 2 * kTile + at, &two, sizeof two);
            }
            continue;
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) store(keys + row(i) * kTile + at, key[i]);
    }
}

// Call block(rows, pair, turned), turned as a constant, for all rows of keys.
template <typename Block>
inline void for_rows(const Finish& finish, int64_t head_size, const Block& block) {
    int64_t row = 0;
    if (finish.rope) {
        for (int64_t pair = 0; pair < finish.half; pair += 4) block(Rows{pair, finish.half}, pair, Turned<true>{});
        row = 2 * finish.half;
    }
    for (; row < head_size; row += 8) block(Rows{row, 0}, int64_t(0), Turned<false>{});
}

template <int kRows, int kVectors, bool kTurn>
inline void integer_block(const ScaleGroup& scale_group, const Finish& finish, int64_t head_size, const Rows& rows,
                          int64_t pair, int64_t column, float* keys) {
    constexpr int kHalf = kRows / 2;
    const auto row = [&](int i) { return kTurn && i >= kHalf ? rows.first + rows.apart + i - kHalf : rows.first + i; };
    __m512i sums[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_setzero_si512();
    }
    const int64_t words = scale_group.pairs * head_size;
    const int32_t* low = scale_group.up + row(0);
    const int32_t* high = scale_group.up + row(kHalf);
    const int32_t* codes = scale_group.codes + column;
    multiply_rows<true>(scale_group.quads, head_size, low + words, high + words, codes + scale_group.pairs * kTile,
                        sums);
    if (scale_group.pairs) {
        // Integers of 8 bits count 256 of those of 16.
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) sums[i][j] = (__m512i)((vi)sums[i][j] << 8);
        }
        multiply_rows<false>(scale_group.pairs, head_size, low, high, codes, sums);
    }
    finish_block<kRows, kVectors, kTurn>(scale_group, finish, head_size, rows, pair, column,
                                         [&](int i, int j) { return (vi)sums[i][j]; }, keys);
}

template <int kVectors>
inline void integer_columns(const ScaleGroup& scale_group, const Finish& finish, int64_t head_size, int64_t column,
                            float* keys) {
    for_rows(finish, head_size, [&](const Rows& rows, int64_t pair, auto turned) {
        integer_block<8, kVectors, turned.value>(scale_group, finish, head_size, rows, pair, column, keys);
    });
}

// keys [head_size][kTile], columns [first, last), which are multiples of 16.
inline void integer_keys(const ScaleGroup& scale_group, const Finish& finish, int64_t head_size, int64_t first, int64_t last,
                         float* keys) {
    int64_t column = first;
    for (; column + 2 * kLanes <= last; column += 2 * kLanes) {
        integer_columns<2>(scale_group, finish, head_size, column, keys);
    }
    for (; column < last; column += kLanes) integer_columns<1>(scale_group, finish, head_size, column, keys);
}

// Codes of a strip, [channels][16] bytes, to rows of kTile, as many channels in a lane as their integers: `words` channels
// of them two, the others four. Both numbers are multiples of 4.
inline void interleave_codes(const uint8_t* codes, int64_t words, int64_t channels, int32_t* to) {
    alignas(16) static const uint8_t kTokens[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    // Bytes of a lane: a token's code of one channel, and of the next, 16 bytes further. Of a pair in the even bytes, with
    // zeros in the odd ones.
    const vi token = (vi)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_load_si128((const __m128i*)kTokens));
    const vi first = token | (token + 16) << 16, second = first + (32 | 32 << 16);
    const vi all = token | (token + 16) << 8 | (token + 32) << 16 | (token + 48) << 24;
    constexpr __mmask64 kEven = 0x5555555555555555;
    int64_t channel = 0;
    for (; channel < words; channel += 4, to += 2 * kTile) {
        const __m512i four = _mm512_loadu_si512(codes + channel * 16);
        _mm512_storeu_si512(to, _mm512_maskz_permutexvar_epi8(kEven, (__m512i)first, four));
        _mm512_storeu_si512(to + kTile, _mm512_maskz_permutexvar_epi8(kEven, (__m512i)second, four));
    }
    for (; channel < channels; channel += 4, to += kTile) {
        const __m512i four = _mm512_loadu_si512(codes + channel * 16);
        _mm512_storeu_si512(to, _mm512_maskz_permutexvar_epi8(~0ull, (__m512i)all, four));
    }
}

// One run of a strip whose codes are four in a lane, straight from the page: they are neighbours there as well. `size` is
// the run's bytes of a token, a multiple of 16.
template <int kBits>
inline void interleave_run(const uint8_t* codes, int64_t row_bytes, int64_t size, int32_t* to) {
    for (int64_t byte = 0; byte < size; byte += 16) {
        vi quads[4];
        transpose_words(codes + byte, row_bytes, quads);
#pragma GCC unroll 4
        for (int field = 0; field < 8 / kBits; ++field) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const vi four = quads[i] >> (field * kBits) & (((1 << kBits) - 1) * 0x01010101);
                _mm512_storeu_si512(to + (field * size + byte + 4 * i) / 4 * kTile, (__m512i)four);
            }
        }
    }
}
#else
constexpr bool kIntegers = false;
#endif

}  // namespace
}  // namespace xquant
