// Products of some tokens' latents with an up-projection for the pool of hot blocks: in BF16 as the model's own, summed in
// FP32. FP32 and FP16 models multiply in FP32 (common/gemm.h).
//
// An element is a chain of multiply-adds in ascending depth, whatever the number of tokens: a token has the same bits
// whether it is multiplied alone or with others, so what is written when it is new and what is promoted later are one.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/convert.h"
#include "common/gemm.h"
#include "common/simd.h"

namespace xquant {
namespace {

// Columns of an up-projection that lie together: [columns / 32][pairs of channels][32][2], the last panel 16 wide if
// these are an odd number of 16.
constexpr int64_t kPanel = 32;

struct PairProduct {
    int64_t pairs;     // of channels
    const uint16_t* a; // [rows][lda], BF16
    int64_t lda;
    const uint16_t* b; // panels
    float* c;
    int64_t ldc;
};

#if defined(__AVX512VNNI__)
#define XQUANT_HAS_BF16 1

// Needs avx512bf16 of the processor: see bf16_product.
template <int kRows, int kVectors>
__attribute__((target("avx512bf16"))) inline void bf16_block(const PairProduct& p, const uint16_t* a, const uint16_t* b,
                                                             float* c) {
    __m512 sums[kRows][kVectors];
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) sums[row][j] = (__m512)vf{};
    }
    const int64_t lda = p.lda;
    for (int64_t k = 0; k < p.pairs; ++k, b += kVectors * kLanes * 2) {
        __m512bh columns[kVectors];
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) memcpy(&columns[j], b + j * kLanes * 2, sizeof columns[j]);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
            int32_t pair;
            memcpy(&pair, a + row * lda + 2 * k, sizeof pair);
            const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j) sums[row][j] = _mm512_dpbf16_ps(sums[row][j], factor, columns[j]);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) store(c + row * p.ldc + j * kLanes, (vf)sums[row][j]);
    }
}

template <int kRows, int kVectors>
__attribute__((target("avx512bf16"))) inline void bf16_rows(const PairProduct& p, int64_t row, int64_t rows,
                                                            const uint16_t* b, float* c) {
    for (; row + kRows <= rows; row += kRows) bf16_block<kRows, kVectors>(p, p.a + row * p.lda, b, c + row * p.ldc);
    if constexpr (kRows > 1) {
        if (row < rows) bf16_rows<kRows - 1, kVectors>(p, row, rows, b, c);
    }
}
#endif

// The same without such instructions: a pair of BF16 numbers is two FP32 numbers.
template <int kRows, int kVectors>
inline void pair_block(const PairProduct& p, int64_t width, const uint16_t* a, const uint16_t* b, float* c) {
    vf sums[kRows][kVectors] = {};
    const int64_t lda = p.lda;
    for (int64_t k = 0; k < p.pairs; ++k, b += width * 2) {
        vf even[kVectors], odd[kVectors];
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) {
            vi words;
            memcpy(&words, b + j * kLanes * 2, sizeof words);
            even[j] = (vf)(words << 16);
            odd[j] = (vf)(words & (int32_t)0xffff0000);
        }
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
            uint32_t pair;
            memcpy(&pair, a + row * lda + 2 * k, sizeof pair);
            const vf first = broadcast(bits_float(pair << 16)), second = broadcast(bits_float(pair & 0xffff0000u));
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j) {
                sums[row][j] += first * even[j];
                sums[row][j] += second * odd[j];
            }
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) store(c + row * p.ldc + j * kLanes, sums[row][j]);
    }
}

template <int kRows>
inline void pair_rows(const PairProduct& p, int64_t row, int64_t rows, int64_t width, const uint16_t* b, float* c) {
    for (; row + kRows <= rows; row += kRows) {
        for (int64_t column = 0; column < width; column += kLanes) {
            pair_block<kRows, 1>(p, width, p.a + row * p.lda, b + column * 2, c + row * p.ldc + column);
        }
    }
    if constexpr (kRows > 1) {
        if (row < rows) pair_rows<kRows - 1>(p, row, rows, width, b, c);
    }
}

// `columns` is a multiple of 16.
inline void bf16_product(int64_t rows, int64_t columns, const PairProduct& p) {
#if defined(XQUANT_HAS_BF16)
    const bool instructions = __builtin_cpu_supports("avx512bf16");
#endif
    for (int64_t column = 0; column < columns; column += kPanel) {
        const int64_t width = columns - column < kPanel ? columns - column : kPanel;
        const uint16_t* b = p.b + column * p.pairs * 2;
#if defined(XQUANT_HAS_BF16)
        if (instructions) {
            if (width == kPanel) {
                bf16_rows<8, 2>(p, 0, rows, b, p.c + column);
            } else {
                bf16_rows<8, 1>(p, 0, rows, b, p.c + column);
            }
            continue;
        }
#endif
        pair_rows<kBlockRows>(p, 0, rows, width, b, p.c + column);
    }
}

}  // namespace
}  // namespace xquant
