// The few vector operations that the compiler does not derive from plain loops, for the instruction set this file is
// compiled for.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace xquant {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

// The unmasked AVX-512 intrinsics make GCC 12 warn of uninitialized variables in its own headers; a full mask costs
// nothing and does not.
typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));

inline vf load(const float* from) {
    vf x;
    memcpy(&x, from, sizeof x);
    return x;
}

inline void store(float* to, vf x) { memcpy(to, &x, sizeof x); }

inline vf broadcast(float x) { return x - vf{}; }

inline vf select(vi condition, vf yes, vf no) { return condition ? yes : no; }

// Of two numbers; of a number and NaN the second argument, so that a running maximum goes second.
inline vf maximum(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select(a > b, a, b);
#endif
}

inline vf minimum(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return select(a < b, a, b);
#endif
}

// Lanes are folded by halves: a fixed order, the same for a given instruction set.
template <typename Fold>
inline float fold(vf x, const Fold& of) {
    typedef float v4 __attribute__((vector_size(16)));
    v4 quarters[kLanes / 4];
    memcpy(quarters, &x, sizeof x);
#pragma GCC unroll 4
    for (int64_t count = kLanes / 8; count > 0; count /= 2) {
#pragma GCC unroll 4
        for (int64_t i = 0; i < count; ++i) quarters[i] = of(quarters[i], quarters[i + count]);
    }
    const v4 two = of(quarters[0], __builtin_shuffle(quarters[0], (__typeof__(quarters[0] > quarters[0])){2, 3, 0, 1}));
    return of(two, __builtin_shuffle(two, (__typeof__(two > two)){1, 0, 3, 2}))[0];
}

inline float reduce_max(vf x) {
    return fold(x, [](auto a, auto b) { return a > b ? a : b; });
}

inline float reduce_min(vf x) {
    return fold(x, [](auto a, auto b) { return a < b ? a : b; });
}

inline float reduce_add(vf x) {
    return fold(x, [](auto a, auto b) { return a + b; });
}

inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// kLanes bytes as integers.
inline vi load_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
    return (vi)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    return vi{from[0], from[1], from[2], from[3]};
#endif
}

// kLanes FP16 numbers.
inline vf load_half(const uint8_t* from) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
    uint16_t half[kLanes];
    memcpy(half, from, sizeof half);
    vi bits;
    for (int64_t i = 0; i < kLanes; ++i) bits[i] = half[i];
    // The exponent of FP16 lands in that of FP32 2^112 too low, subnormals included; infinity and NaN keep all ones.
    const vi magnitude = (bits & 0x7fff) << 13;
    const vi scaled = (vi)((vf)magnitude * 0x1p112f);
    const vi special = magnitude >= 0x0f800000;
    return (vf)((special ? (magnitude | 0x7f800000) : scaled) | ((bits & 0x8000) << 16));
#endif
}

}  // namespace
}  // namespace xquant
