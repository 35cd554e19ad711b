// Transposes of 16 x 16 bytes.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/simd.h"

namespace xquant {
namespace {

#if defined(__AVX512F__)
// Transposes of the 4 x 4 32-bit numbers that each quarter of the four vectors holds.
inline void transpose_quarters(vi (&rows)[4]) {
    const auto low = [](vi a, vi b) { return (vi)_mm512_maskz_unpacklo_epi32(0xffff, (__m512i)a, (__m512i)b); };
    const auto high = [](vi a, vi b) { return (vi)_mm512_maskz_unpackhi_epi32(0xffff, (__m512i)a, (__m512i)b); };
    const vi a = low(rows[0], rows[2]), b = high(rows[0], rows[2]);
    const vi c = low(rows[1], rows[3]), d = high(rows[1], rows[3]);
    rows[0] = low(a, c);
    rows[1] = high(a, c);
    rows[2] = low(b, d);
    rows[3] = high(b, d);
}

// 16 x 16 bytes in four vectors, rows 4i ... 4i + 3 in vector i. Columns 4m ... 4m + 3 come out in vector m, or, not
// kOrdered, columns m, 4 + m, 8 + m, 12 + m, which is cheaper.
template <bool kOrdered>
inline void transpose_block(vi (&rows)[4]) {
    const auto shuffle_lanes = [](vi x, __m128i order) {
        return (vi)_mm512_maskz_shuffle_epi8(~0ull, (__m512i)x, _mm512_maskz_broadcast_i32x4(0xffff, order));
    };
    // Of a row's 16 bytes: every fourth together. Of a 4 x 4 block in 16 bytes: transposed. Both are the same shuffle.
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const vi quads = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    for (int i = 0; i < 4; ++i) {
        if (kOrdered) rows[i] = shuffle_lanes(rows[i], order);
        rows[i] = shuffle_lanes(__builtin_shuffle(rows[i], quads), order);
    }
    transpose_quarters(rows);  // 16 bytes hold four columns of four rows now
}

// Four rows of 16 bytes, `stride` apart.
inline vi load_rows(const uint8_t* from, int64_t stride) {
    const auto row = [=](int i) { return _mm_loadu_si128((const __m128i*)(from + i * stride)); };
    __m512i rows = _mm512_maskz_broadcast_i32x4(0xffff, row(0));
    rows = _mm512_mask_broadcast_i32x4(rows, 0x00f0, row(1));
    rows = _mm512_mask_broadcast_i32x4(rows, 0x0f00, row(2));
    return (vi)_mm512_mask_broadcast_i32x4(rows, 0xf000, row(3));
}

// Four 32-bit numbers of 16 rows become four rows of 16.
inline void transpose_words(const uint8_t* from, int64_t stride, vi (&words)[4]) {
    for (int i = 0; i < 4; ++i) words[i] = load_rows(from + i * stride, 4 * stride);
    transpose_quarters(words);
}

// 16 bytes of 16 rows become 16 rows of 16 bytes.
inline void transpose_bytes(const uint8_t* from, int64_t stride, uint8_t* to) {
    vi rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = load_rows(from + 4 * i * stride, stride);
    transpose_block<true>(rows);
    memcpy(to, rows, sizeof rows);
}
#else
typedef uint8_t bytes16 __attribute__((vector_size(16)));

// A multiply-free 16 x 16 transpose: four perfect shuffles, each interleaving rows i and i + 8.
inline void transpose_bytes(const uint8_t* from, int64_t stride, uint8_t* to) {
    bytes16 rows[16];
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) memcpy(&rows[i], from + i * stride, 16);
    for (int step = 0; step < 4; ++step) {
        bytes16 next[16];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const bytes16 low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
            const bytes16 high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
            next[2 * i] = __builtin_shuffle(rows[i], rows[i + 8], low);
            next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + 8], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) rows[i] = next[i];
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) memcpy(to + i * 16, &rows[i], 16);
}
#endif

// `count` bytes of 16 rows become `count` rows of 16 bytes; `to` has room for `count` rounded up to 16.
inline void transpose_codes(const uint8_t* from, int64_t row_bytes, int64_t count, uint8_t* to) {
    for (int64_t start = 0; start < count; start += 16) transpose_bytes(from + start, row_bytes, to + start * 16);
}

// Where transpose_back puts row i.
inline int64_t back_row(int64_t i) {
#if defined(__AVX512F__)
    return i % 4 * 64 + i / 4 * 16;
#else
    return i * 16;
#endif
}

// 16 neighbouring rows of 16 bytes become 16 others, in an order of their own.
inline void transpose_back(const uint8_t* from, uint8_t* to) {
#if defined(__AVX512F__)
    vi rows[4];
    memcpy(rows, from, sizeof rows);
    transpose_block<false>(rows);
    memcpy(to, rows, sizeof rows);
#else
    transpose_bytes(from, 16, to);
#endif
}

}  // namespace
}  // namespace xquant
