// Host side: starts a kernel whose only argument is a struct.
#ifndef XQUANT_CUDA_LAUNCH_H
#define XQUANT_CUDA_LAUNCH_H

#include "common/platform.h"

namespace xquant {

// Returns what the runtime says: errors of the launch, not of the kernel's run.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, size_t shared_bytes, void* stream,
                   const Params& params) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
#ifdef XQUANT_EMULATION
    (void)stream;
    return emulation::launch([=] { kernel(params); }, grid, threads, shared_bytes);
#else
    // More than 48 KiB must be asked for.
    if (shared_bytes > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return error;
    }
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
    return cudaGetLastError();
#endif
}

}  // namespace xquant

#endif
