// Online softmax: from a tile's products to weights. Eight neighbouring lanes have a query row.
#ifndef XQUANT_CUDA_DECODE_SOFTMAX_H
#define XQUANT_CUDA_DECODE_SOFTMAX_H

#include "common/numbers.h"
#include "common/warp.h"
#include "decode/shape.h"

namespace xquant::decode {

constexpr int kRowLanes = kThreads / kRows;
constexpr int kTokensOfLane = kTokens / kRowLanes;

// A row's state, the same in its eight lanes.
struct RowState {
    float largest = -INFINITY;
    float total = 0;    // of the weights
    float zeros = 0;    // of weights times zero points
    float weighed = 0;  // of weights times scales, rounded as they are multiplied with codes
};

XQUANT_DEVICE float exponential(float x) { return exp2f(x * 1.4426950408889634f); }

// Which tokens a lane has: two times four neighbours.
XQUANT_DEVICE int token_of(int of_row, int index) { return of_row * 4 + index / 4 * (kTokens / 2) + index % 4; }

template <int HeadSize>
XQUANT_DEVICE void load_scores(float (&score)[kTokensOfLane], const Scores<HeadSize>& scores, const Params& params,
                               int row, int of_row) {
    using S = Shape<HeadSize>;
#pragma unroll
    for (int part = 0; part < kTokensOfLane / 4; ++part) {
        const int at = row * S::kScorePitch + token_of(of_row, part * 4);
        float4 sum = *reinterpret_cast<const float4*>(scores.data + at);
#pragma unroll
        for (int warp = 1; warp < S::kColumnWarps; ++warp) {
            const float4 more = *reinterpret_cast<const float4*>(scores.data + warp * scores.of_warp + at);
            sum.x += more.x;
            sum.y += more.y;
            sum.z += more.z;
            sum.w += more.w;
        }
        score[part * 4] = sum.x * params.plan.scale;
        score[part * 4 + 1] = sum.y * params.plan.scale;
        score[part * 4 + 2] = sum.z * params.plan.scale;
        score[part * 4 + 3] = sum.w * params.plan.scale;
    }
    const float cap = params.plan.soft_cap;
    if (cap > 0) {
        // tanh; the exponential may overflow, and 1 - 2 / infinity is right.
#pragma unroll
        for (float& x : score) x = cap * (1.0f - 2.0f / (1.0f + exponential(2.0f * x / cap)));
    }
}

// Weights of a tile into shared.weights, times the values' scales and divided by the largest of these, so that FP16 has
// room for them.
template <int HeadSize>
XQUANT_DEVICE void weigh(RowState& state, Shared<HeadSize>& shared, const Scores<HeadSize>& scores,
                         const Params& params, const Share& share, int tile_start, int thread) {
    const int row = thread / kRowLanes, of_row = thread % kRowLanes;
    const int position = share.past + row / (params.plan.num_heads / params.plan.num_kv_heads);
    float weight[kTokensOfLane], scale[kTokensOfLane];
    load_scores<HeadSize>(weight, scores, params, row, of_row);
    float largest = state.largest, largest_scale = 0;
#pragma unroll
    for (int i = 0; i < kTokensOfLane; ++i) {
        const int token = token_of(of_row, i), at = tile_start + token;
        const bool seen = at <= position && at < share.end &&
                          (params.plan.window <= 0 || at > position - params.plan.window);
        if (!seen) weight[i] = -INFINITY;
        scale[i] = shared.value_scale[token];
        largest = fmaxf(largest, weight[i]);
        largest_scale = fmaxf(largest_scale, scale[i]);
    }
    largest = max_over_lanes<kRowLanes>(largest);
    largest_scale = max_over_lanes<kRowLanes>(largest_scale);
    if (largest_scale == 0) largest_scale = 1;
    // A row may see nothing yet.
    const float shift = largest == -INFINITY ? 0 : largest;
    const float decay = exponential(state.largest - shift), inverse = 1.0f / largest_scale;
    float total = 0, zeros = 0, weighed = 0;
    uint32_t packed[kTokensOfLane / 2];
#pragma unroll
    for (int i = 0; i < kTokensOfLane; ++i) {
        weight[i] = exponential(weight[i] - shift);
        total += weight[i];
        zeros += weight[i] * shared.value_zero[token_of(of_row, i)];
        weight[i] *= scale[i] * inverse;
    }
#pragma unroll
    for (int i = 0; i < kTokensOfLane / 2; ++i) {
        packed[i] = pack_fp16(weight[2 * i], weight[2 * i + 1]);
        const float2 rounded = unpack_fp16(packed[i]);
        weighed += rounded.x + rounded.y;
    }
    state.largest = largest;
    state.total = state.total * decay + sum_over_lanes<kRowLanes>(total);
    state.zeros = state.zeros * decay + sum_over_lanes<kRowLanes>(zeros);
    state.weighed = state.weighed * decay + sum_over_lanes<kRowLanes>(weighed) * largest_scale;
    uint16_t* weights = shared.weights + row * Shape<HeadSize>::kWeightPitch;
#pragma unroll
    for (int part = 0; part < kTokensOfLane / 4; ++part) {
        *reinterpret_cast<uint2*>(weights + token_of(of_row, part * 4)) =
            make_uint2(packed[2 * part], packed[2 * part + 1]);
    }
    if (of_row == 0) {
        shared.decay[row] = decay;
        if (row == 0) shared.largest_scale = largest_scale;
    }
}

}  // namespace xquant::decode

#endif
