// A latent head of an allocated stream, by one warp; see quantize_allocated() in xquant_vllm/codec/allocated.py.
#ifndef XQUANT_CUDA_STORE_ALLOCATED_H
#define XQUANT_CUDA_STORE_ALLOCATED_H

#include "common/warp.h"
#include "store/slot.h"

namespace xquant::store {

// Scales that are tried: every second one from 6 below to 10 above the one that matches the mean square.
constexpr int kCandidates = 9;
XQUANT_DEVICE int candidate(int middle, int index) { return min(max(middle - 6 + 2 * index, 1), 255); }

// Infinities become large numbers, NaN becomes 0: a token that overflowed must not spoil its scale.
XQUANT_DEVICE float finite(float x) {
    if (x != x) return 0.0f;
    return fminf(fmaxf(x, -3e38f), 3e38f);
}

XQUANT_DEVICE float code_of(float x, float divisor, float half_levels) {
    return fminf(fmaxf(rintf(x / divisor + half_levels), 0.0f), 2.0f * half_levels);
}

// `values` and `codes` are [channels] in shared memory, for this head alone; values are finite.
XQUANT_DEVICE void store_allocated_head(const xquant_cuda_store_stream& stream, const Slot& slot, const float* values,
                                        uint8_t* codes, int head_index, int lane) {
    const xquant_cuda_store_head head = stream.heads[head_index];
    const float* step = stream.step + head.first;
    const float* half_levels = stream.half_levels + head.first;
    const float* worth = stream.worth + head.first;
    float squares = 0;
    for (int i = lane; i < head.channels; i += kWarp) squares += values[i] * values[i] * worth[i];
    const float mean_square = sum_over_lanes<kWarp>(squares) / stream.total_worth[head_index];
    const double bounded = fmin(fmax(static_cast<double>(mean_square), 1e-30), 1e30);
    const int middle = static_cast<int>(rint(log2(bounded) / 2 * 8)) + 128;

    float scale_value[kCandidates], error[kCandidates];
#pragma unroll
    for (int k = 0; k < kCandidates; ++k) {
        scale_value[k] = stream.scale_values[candidate(middle, k)];
        error[k] = 0;
    }
    for (int i = lane; i < head.channels; i += kWarp) {
        const float x = values[i], of_step = step[i], half = half_levels[i], of_worth = worth[i];
#pragma unroll
        for (int k = 0; k < kCandidates; ++k) {
            const float of_channel = scale_value[k] * of_step;
            const float missed = x - (code_of(x, of_channel, half) - half) * of_channel;
            error[k] += missed * missed * of_worth;
        }
    }
    float best_error = INFINITY, best_value = 1;
    int best = -1;
#pragma unroll
    for (int k = 0; k < kCandidates; ++k) {
        const float sum = sum_over_lanes<kWarp>(error[k]);
        if (sum < best_error) {
            best_error = sum;
            best_value = scale_value[k];
            best = candidate(middle, k);
        }
    }
    for (int i = lane; i < head.channels; i += kWarp) {
        codes[i] = static_cast<uint8_t>(best < 0 ? 0.0f : code_of(values[i], best_value * step[i], half_levels[i]));
    }
    if (lane == 0) {
        slot.page[stream.scales + head_index * slot.block_size + slot.offset] =
            static_cast<uint8_t>(best < 0 ? 1 : best);
    }
    __syncwarp();
    uint8_t* row = slot.page + head.codes + static_cast<int64_t>(slot.offset) * head.row_bytes;
    pack_codes(row, codes, stream.bytes + head.bytes, head.row_bytes, lane);
}

}  // namespace xquant::store

#endif
