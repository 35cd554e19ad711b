// One small matrix product, C (+)= A * B, for everything: rematerializing keys, scores, weighing value latents, and the
// value up-projection. Vector lanes go along the columns of B and C; elements of A are broadcast.
//
// An element of C is a chain of multiply-adds in ascending depth, whatever the number of rows and columns: a row of C
// has the same bits whether it is computed alone or in a tile.
#pragma once

#include <stdint.h>

#include "common/simd.h"

namespace xquant {
namespace {

#if defined(__AVX512F__)
constexpr int kBlockRows = 8;  // 8 x 2 accumulators of 32 registers hide the latency of two FMA units
#else
constexpr int kBlockRows = 6;  // 6 x 2 accumulators of 16 registers
#endif

// How A lies in memory: element (row, k) is at row * lda + k, or, transposed, at k * lda + row.
enum class Order { kPlain, kTransposed };

struct Product {
    int64_t depth;
    const float* a;
    int64_t lda;
    const float* b;
    int64_t ldb;
    float* c;
    int64_t ldc;
    bool accumulate;  // add to C, or overwrite it
};

template <Order kOrder, int kRows, int kVectors>
inline void gemm_block(const Product& p, const float* a, const float* b, float* c) {
    vf sums[kRows][kVectors];
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sums[row][j] = p.accumulate ? load(c + row * p.ldc + j * kLanes) : vf{};
    }
    const int64_t lda = p.lda, ldb = p.ldb;
    for (int64_t k = 0; k < p.depth; ++k, b += ldb) {
        vf columns[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) columns[j] = load(b + j * kLanes);
#pragma GCC unroll 12
        for (int row = 0; row < kRows; ++row) {
            const vf factor = broadcast(kOrder == Order::kTransposed ? a[k * lda + row] : a[row * lda + k]);
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) sums[row][j] += factor * columns[j];
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) store(c + row * p.ldc + j * kLanes, sums[row][j]);
    }
}

// All rows of kVectors vectors of columns; the last rows with a narrower block.
template <Order kOrder, int kRows, int kVectors>
inline void gemm_columns(const Product& p, int64_t row, int64_t rows, int64_t column) {
    for (; row + kRows <= rows; row += kRows) {
        const float* a = p.a + (kOrder == Order::kTransposed ? row : row * p.lda);
        gemm_block<kOrder, kRows, kVectors>(p, a, p.b + column, p.c + row * p.ldc + column);
    }
    if constexpr (kRows > 1) {
        if (row < rows) gemm_columns<kOrder, kRows - 1, kVectors>(p, row, rows, column);
    }
}

// `columns` is a multiple of 16.
template <Order kOrder>
inline void gemm(int64_t rows, int64_t columns, const Product& p) {
    int64_t column = 0;
    if (rows <= 4) {  // decode: few rows, so more columns at once
        for (; column + 4 * kLanes <= columns; column += 4 * kLanes) gemm_columns<kOrder, 4, 4>(p, 0, rows, column);
    }
    for (; column + 2 * kLanes <= columns; column += 2 * kLanes) gemm_columns<kOrder, kBlockRows, 2>(p, 0, rows, column);
    for (; column < columns; column += kLanes) gemm_columns<kOrder, kBlockRows, 1>(p, 0, rows, column);
}

// The same with more rows at once: for as many rows as a token has heads, and B outside the first cache. A is plain.
inline void gemm_tall(int64_t rows, int64_t columns, const Product& p) {
#if defined(__AVX512F__)
    constexpr int kTallRows = 12;  // 12 x 2 accumulators of 32 registers
#else
    constexpr int kTallRows = kBlockRows;
#endif
    int64_t column = 0;
    for (; column + 2 * kLanes <= columns; column += 2 * kLanes) {
        gemm_columns<Order::kPlain, kTallRows, 2>(p, 0, rows, column);
    }
    for (; column < columns; column += kLanes) gemm_columns<Order::kPlain, kTallRows, 1>(p, 0, rows, column);
}

}  // namespace
}  // namespace xquant
