// Whatever vectors the compiler's baseline has: SSE2 on x86-64, NEON on ARM64.
#define XQUANT_KERNELS kPortableKernels
#define XQUANT_KERNELS_NAME "portable"
#include "kernels_impl.h"
