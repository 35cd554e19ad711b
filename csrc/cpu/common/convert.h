// FP16 and BF16 from and to FP32, as torch converts.
#pragma once

#include <stdint.h>
#include <string.h>

#include "api.h"
#include "common/simd.h"

namespace xquant {
namespace {

inline uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

inline float half_to_float(uint16_t half) {
    const uint32_t magnitude = (half & 0x7fffu) << 13;
    const uint32_t scaled = float_bits(bits_float(magnitude) * 0x1p112f);
    return bits_float((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled) | (half & 0x8000u) << 16);
}

// Round to nearest even; overflow becomes infinity.
inline uint16_t float_to_half(float x) {
    const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7e00u;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
    if (magnitude < 0x38800000u) {
        // Subnormal: the unit in the last place of 0.5 is the FP16 subnormal step, so the addition does the rounding.
        return sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u);
    }
    magnitude += 0xc8000fffu + (magnitude >> 13 & 1);
    return sign | magnitude >> 13;
}

inline uint16_t float_to_bfloat(float x) {
    const uint32_t bits = float_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded;
}

// Read `count` elements (a multiple of 8) of type `dtype`, starting with element `at` of `from`.
inline void load_row(int64_t dtype, const void* from, int64_t at, int64_t count, float* __restrict to) {
    if (dtype == XQUANT_FP32) {
        memcpy(to, (const float*)from + at, count * sizeof(float));
        return;
    }
    const uint16_t* __restrict x = (const uint16_t*)from + at;
    int64_t i = 0;
    if (dtype == XQUANT_BF16) {
        for (; i < count; ++i) to[i] = bits_float((uint32_t)x[i] << 16);
        return;
    }
    for (; i + kLanes <= count; i += kLanes) store(to + i, load_half((const uint8_t*)(x + i)));
    for (; i < count; ++i) to[i] = half_to_float(x[i]);
}

// Invert load_row.
inline void store_row(int64_t dtype, const float* __restrict from, int64_t count, void* to, int64_t at) {
    if (dtype == XQUANT_FP32) {
        memcpy((float*)to + at, from, count * sizeof(float));
        return;
    }
    uint16_t* __restrict x = (uint16_t*)to + at;
    if (dtype == XQUANT_BF16) {
        for (int64_t i = 0; i < count; ++i) x[i] = float_to_bfloat(from[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) x[i] = float_to_half(from[i]);
    }
}

}  // namespace
}  // namespace xquant
