// The C interface of the CPU kernels: plain structs, no torch, no C++ types. xquant_vllm/attention/cpu.py mirrors them
// field by field; xquant_cpu_abi() changes whenever a struct does, and cpu.py refuses a library with another number.
//
// All strides count elements of the pointed-to type, except pages_stride (bytes). Every pointer is borrowed for the
// duration of a call. FP32 tensors are contiguous.
#ifndef XQUANT_CPU_API_H
#define XQUANT_CPU_API_H

#include <stdint.h>

#define XQUANT_CPU_ABI 1

#if defined(__GNUC__)
#define XQUANT_EXPORT __attribute__((visibility("default")))
#else
#define XQUANT_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Element types of query, key, value and output.
enum { XQUANT_FP32 = 0, XQUANT_FP16 = 1, XQUANT_BF16 = 2 };

// One stream of latents and where its sections start in a page; see xquant_vllm/codec/layout.py for their shapes.
typedef struct {
    int64_t num_heads;         // latent heads: the kv heads, or 1, which all kv heads read
    int64_t width;             // channels per latent head; a multiple of group_size
    int64_t bits;              // 8, 4, 3 or 2
    int64_t group_size;        // channels per scale; a multiple of 8
    int64_t outlier_channels;  // leading channels kept in FP16; fewer than group_size
    int64_t codes;             // section offsets in bytes from the start of a page
    int64_t scales;
    int64_t zeros;
    int64_t outliers;
} xquant_stream;

// One layer: everything that does not change from call to call.
typedef struct {
    xquant_stream key;
    xquant_stream value;
    int64_t block_size;          // slots per page; a multiple of 16
    int64_t page_bytes;          // bytes of a page
    int64_t num_heads;           // query heads; a multiple of num_kv_heads
    int64_t num_kv_heads;
    int64_t head_size;           // a multiple of 8
    const float* up_key;         // [num_kv_heads, key.width, head_size]
    const float* up_value;       // [num_kv_heads, value.width, head_size rounded up to 16], the rest of a row zero
    const float* key_bias;       // [num_kv_heads, head_size] or NULL
    const float* value_bias;     // [num_kv_heads, head_size] or NULL
    const float* key_norm;       // [head_size] weight of the RMS norm of every key head, or NULL
    const float* rope;           // [positions / 16, rotary_size / 2, 2, 16]: cosines, then sines, of 16 positions; NULL
    int64_t rotary_size;         // leading channels that rotate; 0 without RoPE
    int64_t rotary_positions;    // positions in the table, before it was rounded up to 16; 0 without RoPE
    int64_t rotary_interleaved;  // 1: pairs (2i, 2i + 1); 0: pairs (i, i + rotary_size / 2)
    int64_t sliding_window;      // keys a query sees, itself included; 0 for all
    float key_norm_eps;
    float scale;                 // factor on the scores
    float soft_cap;              // scores become cap * tanh(score / cap); 0 for none
} xquant_plan;

// Quantize the latents of new tokens into their slots.
typedef struct {
    uint8_t* pages;               // [num_blocks, page_bytes], rows pages_stride bytes apart
    int64_t pages_stride;
    int64_t num_blocks;
    const int64_t* slot_mapping;  // [num_tokens]: block * block_size + offset; negative: not stored
    int64_t num_tokens;
    const void* key;              // [num_tokens, key.num_heads * key.width], rows key_stride elements apart
    int64_t key_stride;
    int64_t key_dtype;
    const void* value;            // likewise
    int64_t value_stride;
    int64_t value_dtype;
} xquant_store_call;

// Causal attention of query tokens over their sequences' pages.
typedef struct {
    const uint8_t* pages;            // [num_blocks, page_bytes], rows pages_stride bytes apart
    int64_t pages_stride;
    int64_t num_blocks;
    const void* query;               // [num_tokens, num_heads, head_size], after RoPE; head_size is contiguous
    int64_t query_token_stride;
    int64_t query_head_stride;
    void* output;                    // like query, same element type
    int64_t output_token_stride;
    int64_t output_head_stride;
    int64_t dtype;
    int64_t num_tokens;              // rows of query and output
    const int32_t* query_start_loc;  // [num_seqs + 1]
    const int32_t* seq_lens;         // [num_seqs], cached tokens including the query tokens
    const int32_t* block_table;      // [num_seqs, max_blocks], rows block_table_stride apart
    int64_t block_table_stride;
    int64_t max_blocks;
    int64_t num_seqs;
} xquant_attention_call;

// Both return NULL, or a static text that says what is wrong with the input; then nothing or only a part was written,
// but never out of bounds.
XQUANT_EXPORT const char* xquant_cpu_store(const xquant_plan* plan, const xquant_store_call* call);
XQUANT_EXPORT const char* xquant_cpu_attention(const xquant_plan* plan, const xquant_attention_call* call);

// The instruction set in use: "avx512", "avx2" or "portable".
XQUANT_EXPORT const char* xquant_cpu_isa(void);
// Use another one, or NULL for the best; 0 where this machine or this build lacks it. Not for use during a call.
XQUANT_EXPORT int xquant_cpu_set_isa(const char* name);
// Threads that the next call of this thread would use, as the OpenMP runtime says.
XQUANT_EXPORT int xquant_cpu_threads(void);
// XQUANT_CPU_ABI at the time of the build.
XQUANT_EXPORT int xquant_cpu_abi(void);

#ifdef __cplusplus
}
#endif

#endif
