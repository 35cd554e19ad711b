// The rotation of X before it is quantized; see HadamardRotation in xquant_vllm/codec/rotation.py.
#pragma once

#include <stdint.h>

#include "api.h"

namespace xquant {
namespace {

// Unnormalized Hadamard transform of `size` numbers, a power of two. Sums and differences in the reference's order, and
// nothing to fuse: the same bits.
inline void hadamard(float* x, int64_t size) {
    for (int64_t half = 1; half < size; half *= 2) {
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

// Rotate `x` [width]; `scratch` has room for as much.
inline void rotate_input(const xquant_plan& plan, int64_t width, float* x, float* scratch) {
    const int64_t block = plan.rotation_block, blocks = width / block;
    for (int64_t i = 0; i < width; ++i) scratch[i] = x[i] * plan.rotation_signs[i];
    for (int64_t i = 0; i < blocks; ++i) hadamard(scratch + i * block, block);
    for (int64_t row = 0; row < blocks; ++row) {
        float* to = x + row * block;
        for (int64_t column = 0; column < blocks; ++column) {
            const float factor = plan.rotation_mix[row * blocks + column];
            const float* from = scratch + column * block;
            if (column == 0) {
                for (int64_t i = 0; i < block; ++i) to[i] = from[i] * factor;
            } else {
                for (int64_t i = 0; i < block; ++i) to[i] += from[i] * factor;
            }
        }
    }
}

}  // namespace
}  // namespace xquant
