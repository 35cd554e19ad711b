// Hadamard transforms of blocks in shared memory, by all threads of a block.
//
// A pass takes three stages at once: 8 numbers into registers, butterflies, back. Additions are those of
// xquant_vllm/codec/rotation.py in the same order, so sums have the same bits.
#ifndef XQUANT_CUDA_STORE_HADAMARD_H
#define XQUANT_CUDA_STORE_HADAMARD_H

#include "common/platform.h"

namespace xquant::store {

// Where number i lies: 8 places are left out after every 64, so that threads which are 64 numbers apart, as in the
// second pass, hit other banks.
XQUANT_DEVICE int padded(int i) { return i + i / 64 * 8; }

template <int Size>
XQUANT_DEVICE void butterflies(float (&x)[Size]) {
#pragma unroll
    for (int half = 1; half < Size; half *= 2) {
#pragma unroll
        for (int i = 0; i < Size; ++i) {
            if ((i & half) == 0) {
                const float first = x[i], second = x[i + half];
                x[i] = first + second;
                x[i + half] = first - second;
            }
        }
    }
}

// The stages whose partners are `distance`, 2 * distance, ... numbers apart, below Size * distance.
template <int Size>
XQUANT_DEVICE void hadamard_pass(float* numbers, int count, int distance, int thread, int threads) {
    for (int i = thread; i < count / Size; i += threads) {
        const int first = i / distance * distance * Size + i % distance;
        float x[Size];
#pragma unroll
        for (int j = 0; j < Size; ++j) x[j] = numbers[padded(first + j * distance)];
        butterflies(x);
#pragma unroll
        for (int j = 0; j < Size; ++j) numbers[padded(first + j * distance)] = x[j];
    }
    __syncthreads();
}

// The stages from `distance` on.
XQUANT_DEVICE void hadamard_from(float* numbers, int count, int block, int distance, int thread, int threads) {
    while (distance * 8 <= block) {
        hadamard_pass<8>(numbers, count, distance, thread, threads);
        distance *= 8;
    }
    if (distance * 4 <= block) {
        hadamard_pass<4>(numbers, count, distance, thread, threads);
    } else if (distance * 2 <= block) {
        hadamard_pass<2>(numbers, count, distance, thread, threads);
    }
}

}  // namespace xquant::store

#endif
