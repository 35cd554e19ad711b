// Weights times value codes. Values are not rematerialized: sums are over codes, and up-projected after the merge.
#ifndef XQUANT_CUDA_DECODE_VALUES_H
#define XQUANT_CUDA_DECODE_VALUES_H

#include "common/mma.h"
#include "decode/shape.h"
#include "decode/softmax.h"
#include "decode/unpack.h"

namespace xquant::decode {

// A thread's part of [kRows, HeadSize]: 16 channels are a pair of tiles of 8, and pairs go round the warps.
template <int HeadSize>
struct ValueSums {
    float of_pair[Shape<HeadSize>::kValuePairs][2][4] = {};
};

template <int HeadSize>
XQUANT_DEVICE void add_values(ValueSums<HeadSize>& sums, const Shared<HeadSize>& shared, int warp, int lane) {
    using S = Shape<HeadSize>;
    const float decay[2] = {shared.decay[lane / 4], shared.decay[lane / 4 + 8]};
    const float largest_scale = shared.largest_scale;
    uint32_t weights[kTokens / 16][4];
#pragma unroll
    for (int step = 0; step < kTokens / 16; ++step) {
        load_matrices(weights[step], shared.weights + lane % 16 * S::kWeightPitch + step * 16 + lane / 16 * 8);
    }
#pragma unroll
    for (int index = 0; index < S::kValuePairs; ++index) {
        const int pair = warp + index * kWarps;
        if (2 * pair < shared.value.vectors) {
            float product[2][4] = {};
#pragma unroll
            for (int step = 0; step < kTokens / 16; ++step) {
                uint32_t codes[4];
                load_matrices_transposed(codes, shared.codes +
                                                    (step * 16 + lane % 16) * S::template kCodePitch<kFp16> +
                                                    pair * 32 + lane / 16 * 16);
                const uint32_t first[2] = {codes[0], codes[1]}, second[2] = {codes[2], codes[3]};
                mma_16816<kFp16>(product[0], weights[step], first);
                mma_16816<kFp16>(product[1], weights[step], second);
            }
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& sum = sums.of_pair[index][tile][i];
                    sum = sum * decay[i / 2] + product[tile][i] * largest_scale;
                }
            }
        }
    }
}

// The split's sums and statistics, in channel order.
template <int HeadSize>
XQUANT_DEVICE void write_partial(const ValueSums<HeadSize>& sums, const RowState& state, Shared<HeadSize>& shared,
                                 const Params& params, const Share& share, int thread) {
    using S = Shape<HeadSize>;
    const auto& call = params.call;
    const int warp = thread / kWarp, lane = thread % kWarp;
    const int group = params.plan.num_heads / params.plan.num_kv_heads;
    const bool allocated = params.plan.value_allocated;
    float* output = reinterpret_cast<float*>(shared.codes);
    static_assert(kRows * S::kOutputPitch * sizeof(float) <= sizeof(shared.codes));
    if (thread % kRowLanes == 0) shared.weighed[thread / kRowLanes] = state.weighed;
    __syncthreads();
    // Columns without a channel are read by the merge, too.
    for (int i = thread; i < kRows * S::kOutputPitch; i += kThreads) output[i] = 0;
    __syncthreads();
#pragma unroll
    for (int index = 0; index < S::kValuePairs; ++index) {
        const int pair = warp + index * kWarps;
        if (2 * pair < shared.value.vectors) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int at = pair * 16 + i / 4 * 8 + 2 * (lane % 4) + i % 2, row = lane / 4 + i % 4 / 2 * 8;
                const int channel = params.plan.value_channels[share.head * HeadSize + at];
                float sum = sums.of_pair[index][i / 4][i % 4] * kCodeFactor;
                if (allocated) {
                    const float level = params.plan.value_levels[share.head * HeadSize + at];
                    sum = 2.0f * (sum - level * shared.weighed[row]);
                }
                if (channel >= 0) output[row * S::kOutputPitch + channel] = sum;
            }
        }
    }
    __syncthreads();
    for (int i = thread; i < share.rows * call.sum_columns; i += kThreads) {
        const int row = i / call.sum_columns, column = i % call.sum_columns;
        const int64_t token = share.first_query + row / group;
        const int64_t at = (token * params.plan.num_heads + share.head * group + row % group) * call.splits + share.split;
        call.sums[at * call.sum_columns + column] = output[row * S::kOutputPitch + column];
    }
    const int row = thread / kRowLanes, which = thread % kRowLanes;
    if (row < share.rows && which < 3) {
        const int64_t token = share.first_query + row / group;
        const int64_t at = (token * params.plan.num_heads + share.head * group + row % group) * call.splits + share.split;
        call.stats[at * 3 + which] = which == 0 ? state.largest : which == 1 ? state.total : allocated ? 0 : state.zeros;
    }
}

}  // namespace xquant::decode

#endif
