// What the model does to a key after its projection, on channel-major keys: lanes are tokens, so that the norm needs no
// reduction across lanes and RoPE no shuffle.
#pragma once

#include <stdint.h>

#include "api.h"
#include "common/layout.h"
#include "common/simd.h"

namespace xquant {
namespace {

inline void add_bias(const float* bias, int64_t head_size, float* keys, int64_t stride, int64_t columns) {
    for (int64_t channel = 0; channel < head_size; ++channel) {
        const vf shift = broadcast(bias[channel]);
        float* row = keys + channel * stride;
        for (int64_t j = 0; j < columns; j += kLanes) store(row + j, load(row + j) + shift);
    }
}

inline void normalize(const float* weight, float eps, int64_t head_size, float* keys, int64_t stride,
                      int64_t columns) {
    for (int64_t j = 0; j < columns; j += kLanes) {
        vf squares = {};
        for (int64_t channel = 0; channel < head_size; ++channel) {
            const vf x = load(keys + channel * stride + j);
            squares += x * x;
        }
        float roots[kLanes];
        store(roots, squares / (float)head_size + eps);
        for (int64_t lane = 0; lane < kLanes; ++lane) roots[lane] = 1.0f / __builtin_sqrtf(roots[lane]);
        const vf factor = load(roots);
        for (int64_t channel = 0; channel < head_size; ++channel) {
            float* at = keys + channel * stride + j;
            store(at, load(at) * factor * weight[channel]);
        }
    }
}

// Rotate 16 tokens whose positions are 16 * block ... 16 * block + 15.
inline void rotate(const xquant_plan& plan, int64_t block, float* keys, int64_t stride) {
    const int64_t half = plan.rotary_size / 2;
    const float* table = plan.rope + block * half * 2 * kStrip;
    const int64_t step = plan.rotary_interleaved ? 2 : 1, apart = plan.rotary_interleaved ? 1 : half;
    for (int64_t pair = 0; pair < half; ++pair, table += 2 * kStrip) {
        float* first = keys + pair * step * stride;
        float* second = first + apart * stride;
        for (int64_t lane = 0; lane < kStrip; lane += kLanes) {
            const vf cosine = load(table + lane), sine = load(table + kStrip + lane);
            const vf x = load(first + lane), y = load(second + lane);
            store(first + lane, x * cosine - y * sine);
            store(second + lane, y * cosine + x * sine);
        }
    }
}

}  // namespace
}  // namespace xquant
