// How large the structs of the C interface are: by this Python tells a library of another version.
#include "api.h"
#include "kivi/kivi_api.h"

#define XQUANT_SIZE_OF(type) {#type, sizeof(type)}

extern "C" const xquant_struct_size* xquant_cpu_struct_sizes(void) {
    static const xquant_struct_size sizes[] = {
        XQUANT_SIZE_OF(xquant_run),
        XQUANT_SIZE_OF(xquant_band),
        XQUANT_SIZE_OF(xquant_head),
        XQUANT_SIZE_OF(xquant_stream),
        XQUANT_SIZE_OF(xquant_term),
        XQUANT_SIZE_OF(xquant_latent),
        XQUANT_SIZE_OF(xquant_plan),
        XQUANT_SIZE_OF(xquant_pages),
        XQUANT_SIZE_OF(xquant_input),
        XQUANT_SIZE_OF(xquant_store_call),
        XQUANT_SIZE_OF(xquant_attention_call),
        XQUANT_SIZE_OF(xquant_read_call),
        XQUANT_SIZE_OF(xquant_finish_call),
        XQUANT_SIZE_OF(xquant_hot_places),
        XQUANT_SIZE_OF(xquant_hot_layer),
        XQUANT_SIZE_OF(xquant_hot_call),
        XQUANT_SIZE_OF(xquant_kivi_plan),
        XQUANT_SIZE_OF(xquant_kivi_residual),
        XQUANT_SIZE_OF(xquant_kivi_store_call),
        XQUANT_SIZE_OF(xquant_kivi_attention_call),
        {nullptr, 0},
    };
    return sizes;
}
