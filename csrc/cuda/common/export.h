// What the library's C interface is made of.
#ifndef XQUANT_CUDA_EXPORT_H
#define XQUANT_CUDA_EXPORT_H

#include <stdint.h>

#if defined(__GNUC__)
#define XQUANT_CUDA_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define XQUANT_CUDA_EXPORT extern "C"
#endif

// The size of a struct in bytes at the time of the build.
typedef struct {
    const char* name;
    int64_t size;
} xquant_cuda_struct_size;

// Every struct of the interface, then one without a name.
XQUANT_CUDA_EXPORT const xquant_cuda_struct_size* xquant_cuda_struct_sizes(void);

#endif
