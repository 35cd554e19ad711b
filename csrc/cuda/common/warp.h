// Reductions over neighbouring lanes: all of them get the result, by the same additions in the same order.
#ifndef XQUANT_CUDA_WARP_H
#define XQUANT_CUDA_WARP_H

#include "common/platform.h"

namespace xquant {

constexpr unsigned kEveryLane = 0xffffffffu;

template <int Lanes>
XQUANT_DEVICE float sum_over_lanes(float x) {
#pragma unroll
    for (int distance = 1; distance < Lanes; distance *= 2) x += __shfl_xor_sync(kEveryLane, x, distance);
    return x;
}

template <int Lanes>
XQUANT_DEVICE float max_over_lanes(float x) {
#pragma unroll
    for (int distance = 1; distance < Lanes; distance *= 2) x = fmaxf(x, __shfl_xor_sync(kEveryLane, x, distance));
    return x;
}

template <int Lanes>
XQUANT_DEVICE float min_over_lanes(float x) {
#pragma unroll
    for (int distance = 1; distance < Lanes; distance *= 2) x = fminf(x, __shfl_xor_sync(kEveryLane, x, distance));
    return x;
}

}  // namespace xquant

#endif
