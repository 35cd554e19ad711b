// Compiled with -mavx512vnni -mavx512vbmi and the flags of kernels_avx512.cpp.
#if defined(__x86_64__)
#define XQUANT_KERNELS kVnniKernels
#define XQUANT_KERNELS_NAME "vnni"
#include "kernels_impl.h"
#endif
