// What device code is written against: CUDA's own headers, or tests/cuda_emulation, under which the same sources are
// ordinary C++ that a test runs on a CPU. Everything that is not C++ in both worlds is wrapped by a function in this
// folder.
#ifndef XQUANT_CUDA_PLATFORM_H
#define XQUANT_CUDA_PLATFORM_H

#include <stddef.h>
#include <stdint.h>

#ifdef XQUANT_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#define XQUANT_DEVICE __device__ __forceinline__

namespace xquant {

constexpr int kWarp = 32;

// The block's dynamic shared memory, aligned to 16 bytes.
XQUANT_DEVICE unsigned char* shared_memory() {
#ifdef XQUANT_EMULATION
    return emulation::shared_memory();
#else
    extern __shared__ __align__(16) unsigned char bytes[];
    return bytes;
#endif
}

}  // namespace xquant

#endif
