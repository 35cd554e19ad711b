// What the library's C interface is made of.
#ifndef XQUANT_CUDA_EXPORT_H
#define XQUANT_CUDA_EXPORT_H

#include <stdint.h>

// Changes whenever a struct of the interface does.
#define XQUANT_CUDA_ABI 2

#if defined(__GNUC__)
#define XQUANT_CUDA_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define XQUANT_CUDA_EXPORT extern "C"
#endif

#endif
