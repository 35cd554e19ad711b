// CUDA device code as ordinary C++20, for tests: what csrc/cuda/common asks for, and the few names that CUDA defines.
//
// The threads of a block are fibers of one thread of the process: one runs until its next barrier or warp operation,
// then another. Blocks run one after another. So results are reproducible, and because xquant_emulation_order() changes
// which thread runs first between two barriers, a missing barrier shows as different bits. Asynchronous copies are made
// when they are waited for, so a missing wait shows, too. Shared memory starts as NaN bytes.
#ifndef XQUANT_CUDA_EMULATION_H
#define XQUANT_CUDA_EMULATION_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidValue = 1;
constexpr cudaError_t cudaErrorLaunchFailure = 719;

extern dim3 threadIdx, blockIdx, gridDim, blockDim;

void __syncthreads();
void __syncwarp();
float __shfl_xor_sync(unsigned mask, float x, int distance);
uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift);
float __int_as_float(int x);
unsigned __ballot_sync(unsigned mask, int predicate);

namespace emulation {

// Run a block for every index of the grid. cudaErrorLaunchFailure where threads wait for each other in vain, or where
// an instruction gets what it does not take (stderr says what).
cudaError_t launch(const std::function<void()>& thread, dim3 grid, int threads, size_t shared_bytes);

unsigned char* shared_memory();

float from_fp16(uint16_t bits);
float from_bf16(uint16_t bits);
uint16_t to_fp16(float x);
uint16_t to_bf16(float x);

void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bf16);
void mma_16832(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void load_matrices(uint32_t (&r)[4], const void* row, bool transposed);

void copy_16(void* shared, const void* global);
void end_copy_group();
void wait_for_copies(int pending);

}  // namespace emulation

#endif
