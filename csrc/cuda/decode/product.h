// The product that rematerializes keys, codes times up-projection, by the type of its operands.
#ifndef XQUANT_CUDA_DECODE_PRODUCT_H
#define XQUANT_CUDA_DECODE_PRODUCT_H

#include "common/mma.h"

namespace xquant::decode {

template <int K>
struct Product;

template <>
struct Product<kFp16> {
    using Sum = float;
    static constexpr Sum kZero = 0;
    static XQUANT_DEVICE void add(Sum (&sum)[4], const uint32_t (&codes)[4], const uint32_t (&up)[2]) {
        mma_16816<kFp16>(sum, codes, up);
    }
    static XQUANT_DEVICE float value(Sum sum) { return sum; }
};

// Sums start at the bits of 1.5 * 2**23. Read as FP32 they are that number plus the sum, so that an addition converts
// them: sums are at most 255 * 127 * 128, which is less than 2**22.
template <>
struct Product<kInt8> {
    using Sum = int32_t;
    static constexpr Sum kZero = 0x4B400000;
    static XQUANT_DEVICE void add(Sum (&sum)[4], const uint32_t (&codes)[4], const uint32_t (&up)[2]) {
        mma_16832(sum, codes, up);
    }
    static XQUANT_DEVICE float value(Sum sum) { return __int_as_float(sum) - 12582912.0f; }
};

}  // namespace xquant::decode

#endif
