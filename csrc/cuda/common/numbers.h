// 16-bit floating-point numbers as bits.
#ifndef XQUANT_CUDA_NUMBERS_H
#define XQUANT_CUDA_NUMBERS_H

#include "common/platform.h"

namespace xquant {

// Element types of tensors; the numbers are part of the C interface.
enum Type { kFp32 = 0, kFp16 = 1, kBf16 = 2, kInt8 = 3 };

XQUANT_DEVICE float from_fp16(uint16_t bits) {
#ifdef XQUANT_EMULATION
    return emulation::from_fp16(bits);
#else
    return __half2float(__ushort_as_half(bits));
#endif
}

XQUANT_DEVICE float from_bf16(uint16_t bits) {
#ifdef XQUANT_EMULATION
    return emulation::from_bf16(bits);
#else
    return __bfloat162float(__ushort_as_bfloat16(bits));
#endif
}

// Rounded to the nearest, ties to even; too large becomes infinity.
XQUANT_DEVICE uint16_t to_fp16(float x) {
#ifdef XQUANT_EMULATION
    return emulation::to_fp16(x);
#else
    return __half_as_ushort(__float2half_rn(x));
#endif
}

// Two numbers in a register, the first in its low half.
XQUANT_DEVICE uint32_t pack_fp16(float first, float second) {
#ifdef XQUANT_EMULATION
    return emulation::to_fp16(first) | static_cast<uint32_t>(emulation::to_fp16(second)) << 16;
#else
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
#endif
}

XQUANT_DEVICE uint32_t pack_bf16(float first, float second) {
#ifdef XQUANT_EMULATION
    return emulation::to_bf16(first) | static_cast<uint32_t>(emulation::to_bf16(second)) << 16;
#else
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
#endif
}

// Two numbers of type T, which is kFp16 or kBf16.
template <int T>
XQUANT_DEVICE uint32_t pack(float first, float second) {
    return T == kBf16 ? pack_bf16(first, second) : pack_fp16(first, second);
}

XQUANT_DEVICE float2 unpack_fp16(uint32_t pair) {
    return make_float2(from_fp16(static_cast<uint16_t>(pair)), from_fp16(static_cast<uint16_t>(pair >> 16)));
}

// Element `index` of a tensor whose type is known when the kernel runs.
XQUANT_DEVICE float load_as_float(const void* data, int64_t index, int type) {
    if (type == kFp32) return static_cast<const float*>(data)[index];
    const uint16_t bits = static_cast<const uint16_t*>(data)[index];
    return type == kFp16 ? from_fp16(bits) : from_bf16(bits);
}

}  // namespace xquant

#endif
