// How large the structs of the C interface are: by this Python tells a library of another version.
#include "common/export.h"
#include "decode/decode.h"
#include "store/store.h"

#define XQUANT_CUDA_SIZE_OF(type) {#type, sizeof(type)}

const xquant_cuda_struct_size* xquant_cuda_struct_sizes(void) {
    static const xquant_cuda_struct_size sizes[] = {
        XQUANT_CUDA_SIZE_OF(xquant_cuda_quad),
        XQUANT_CUDA_SIZE_OF(xquant_cuda_latent),
        XQUANT_CUDA_SIZE_OF(xquant_cuda_decode_plan),
        XQUANT_CUDA_SIZE_OF(xquant_cuda_decode_call),
        XQUANT_CUDA_SIZE_OF(xquant_cuda_byte),
        XQUANT_CUDA_SIZE_OF(xquant_cuda_store_head),
        XQUANT_CUDA_SIZE_OF(xquant_cuda_store_stream),
        XQUANT_CUDA_SIZE_OF(xquant_cuda_store_call),
        {nullptr, 0},
    };
    return sizes;
}
