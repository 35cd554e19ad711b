// The part of the C interface that is KIVI's; see api.h. xquant_vllm/kivi/cpu/abi.py mirrors the structs, whose layout in
// memory is drawn in xquant_vllm/kivi/pages.py.
#ifndef XQUANT_CPU_KIVI_API_H
#define XQUANT_CPU_KIVI_API_H

#include "api.h"

#ifdef __cplusplus
extern "C" {
#endif

// One layer: everything that does not change from call to call.
typedef struct {
    // Heads, mask and quantized pages. The values are its only stream and its value latent, without an up-projection; the
    // key latent has no terms; rope, if it is there, turns keys when they are read.
    xquant_plan layer;
    int64_t key_bits;             // 4 or 2
    int64_t key_group_size;       // tokens that share a channel's scale and zero; a multiple of 16
    int64_t key_codes;            // section offsets in bytes from the start of a page
    int64_t key_scales;
    int64_t key_zeros;
    int64_t residual_block_size;  // slots per residual page; a multiple of 16
    int64_t residual_values;      // offset in bytes of the values, which follow the keys
    int64_t residual_dtype;
    int64_t residual_tokens;      // R: keys are read quantized R at a time, and the last R values exactly
    int64_t exact_step;           // 1: tokens of a step are exact to its queries
} xquant_kivi_plan;

// Residual pages, and the sequences' blocks of them.
typedef struct {
    xquant_pages pages;
    int64_t num_blocks;
    const int32_t* block_table;  // [num_seqs, max_blocks], rows block_table_stride apart
    int64_t block_table_stride;
    int64_t max_blocks;
} xquant_kivi_residual;

// Write new tokens to residual pages, their values to quantized pages, and the groups of keys that they complete.
typedef struct {
    xquant_attention_call batch;  // the sequences and their quantized pages; query and output are not looked at
    xquant_kivi_residual residual;
    xquant_store_call values;     // into the quantized pages
    xquant_input keys;            // [num_tokens, num_kv_heads * head_size]
    const int64_t* residual_slot_mapping;  // [num_tokens]: block * residual_block_size + offset; negative: not stored
} xquant_kivi_store_call;

// Causal attention of query tokens over their sequences' pages of both kinds.
typedef struct {
    xquant_attention_call batch;
    xquant_kivi_residual residual;
} xquant_kivi_attention_call;

// Both return what their namesakes in api.h do.
XQUANT_EXPORT const char* xquant_cpu_kivi_store(const xquant_kivi_plan* plan, const xquant_kivi_store_call* call);
XQUANT_EXPORT const char* xquant_cpu_kivi_attention(const xquant_kivi_plan* plan,
                                                    const xquant_kivi_attention_call* call);

#ifdef __cplusplus
}
#endif

#endif
