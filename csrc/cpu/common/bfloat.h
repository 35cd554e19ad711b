// FP32 to BF16 as AVX-512 rounds: to nearest even, subnormal numbers to 0.
#pragma once

#include <stdint.h>

#include "common/simd.h"

namespace xquant {
namespace {

#if defined(__AVX512F__)
// The BF16 of two numbers in a lane, the first in the lower half.
inline vi bfloat_pairs(vf first, vf second) {
#if defined(__AVX512BF16__)
    // All of the first, then all of the second.
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    alignas(64) static const uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (vi)_mm512_maskz_permutexvar_epi16(0xffffffff, _mm512_load_si512(kOrder), halves);
#else
    // In the upper halves of lanes.
    const auto rounded = [](vf x) {
        const vi bits = (vi)x, magnitude = bits & 0x7fffffff;
        const vi nearest = bits + 0x7fff + (bits >> 16 & 1);
        const vi number = magnitude > 0x7f800000 ? vi{} + 0x7fc00000 : nearest;
        return magnitude < 0x00800000 ? bits & (vi{} + INT32_MIN) : number;
    };
    return (rounded(second) & (vi{} + (int32_t)0xffff0000)) | (rounded(first) >> 16 & 0xffff);
#endif
}

// kLanes numbers.
inline void store_bfloats(uint16_t* to, vf x) {
    _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bfloat_pairs(x, vf{})));
}
#endif

}  // namespace
}  // namespace xquant
