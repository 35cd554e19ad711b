#include "common/export.h"

// XQUANT_CUDA_ABI at the time of the build.
XQUANT_CUDA_EXPORT int xquant_cuda_abi(void);

int xquant_cuda_abi(void) { return XQUANT_CUDA_ABI; }
