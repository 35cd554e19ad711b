// Compiled with -mavx2 -mfma -mf16c.
#if defined(__x86_64__)
#define XQUANT_KERNELS kAvx2Kernels
#define XQUANT_KERNELS_NAME "avx2"
#include "kernels_impl.h"
#endif
