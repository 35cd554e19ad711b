// Compiled with -mamx-tile -mamx-int8 -mamx-bf16 -mavx512bf16 and the flags of kernels_vnni.cpp.
#if defined(__x86_64__)
#define XQUANT_KERNELS kAmxKernels
#define XQUANT_KERNELS_NAME "amx"
#include "kernels_impl.h"
#endif
