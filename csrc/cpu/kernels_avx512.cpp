// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c.
#if defined(__x86_64__)
#define XQUANT_KERNELS kAvx512Kernels
#define XQUANT_KERNELS_NAME "avx512"
#include "kernels_impl.h"
#endif
