// The rotation of X before it is quantized; see HadamardRotation in xquant_vllm/codec/rotation.py.
#pragma once

#include <stdint.h>

#include "api.h"
#include "common/simd.h"

namespace xquant {
namespace {

// Sums and differences of lanes that are kHalf apart, where the sums go first.
template <int kHalf>
inline vf butterfly(vf x) {
    vi apart;
    vf signs;
#pragma GCC unroll 16
    for (int32_t lane = 0; lane < kLanes; ++lane) {
        apart[lane] = lane ^ kHalf;
        signs[lane] = lane & kHalf ? -1.0f : 1.0f;
    }
    return __builtin_shuffle(x, apart) + x * signs;  // fused or not: a product with 1 or -1 is exact
}

// Unnormalized Hadamard transform of `size` numbers, a power of two. Sums and differences in the reference's order, and
// nothing that fusing would round in another way: the same bits.
inline void hadamard(float* x, int64_t size) {
    int64_t half = 1;
    if (size >= kLanes) {
        for (int64_t i = 0; i < size; i += kLanes) {
            vf numbers = butterfly<2>(butterfly<1>(load(x + i)));
            if constexpr (kLanes > 4) numbers = butterfly<4>(numbers);
            if constexpr (kLanes > 8) numbers = butterfly<8>(numbers);
            store(x + i, numbers);
        }
        half = kLanes;
    }
    for (; half < size; half *= 2) {
        for (int64_t start = 0; start < size; start += 2 * half) {
            float* __restrict first = x + start;
            float* __restrict second = first + half;
            for (int64_t i = 0; i < half; ++i) {
                const float a = first[i], b = second[i];
                first[i] = a + b;
                second[i] = a - b;
            }
        }
    }
}

// Row `row` of the mix: `block` numbers of as many transforms as the mix has columns.
inline void mix_row(const float* factors, int64_t blocks, int64_t block, const float* __restrict from,
                    float* __restrict to) {
    int64_t i = 0;
    for (; i + kLanes <= block; i += kLanes) {
        vf sum = load(from + i) * factors[0];
        for (int64_t column = 1; column < blocks; ++column) sum += load(from + column * block + i) * factors[column];
        store(to + i, sum);
    }
    for (; i < block; ++i) {
        float sum = from[i] * factors[0];
        for (int64_t column = 1; column < blocks; ++column) sum += from[column * block + i] * factors[column];
        to[i] = sum;
    }
}

// Rotate `x` [width]; `scratch` has room for as much.
inline void rotate_input(const xquant_plan& plan, int64_t width, float* x, float* scratch) {
    const int64_t block = plan.rotation_block, blocks = width / block;
    for (int64_t i = 0; i < width; ++i) scratch[i] = x[i] * plan.rotation_signs[i];
    for (int64_t i = 0; i < blocks; ++i) hadamard(scratch + i * block, block);
    for (int64_t row = 0; row < blocks; ++row) {
        mix_row(plan.rotation_mix + row * blocks, blocks, block, scratch, x + row * block);
    }
}

}  // namespace
}  // namespace xquant
