// Decode attention over per-head latents: one key band and one value band per kv head, few query rows. The first of
// two steps: it leaves what xquant_vllm/attention/gpu/decode/attend.py calls Partial, which merge.py puts together.
//
// Plain C. xquant_vllm/attention/gpu/cuda/library.py mirrors the structs field by field. All pointers are to device
// memory unless said otherwise; strides count elements, those of pages bytes.
#ifndef XQUANT_CUDA_DECODE_H
#define XQUANT_CUDA_DECODE_H

#include "common/export.h"

// Channels of the codes are in *quads*, four that are unpacked together, in an order of the caller's: the k-order. The
// up-projection's rows go by it, so it need not be any model's.
typedef struct {
    uint32_t address[4];  // fast: [0] is the first channel's; slow: of every channel. Low 16 bits: the bit of the row
                          // at which the code's low part starts, high 16 bits: at which its high part does
} xquant_cuda_quad;

// A kv head's latent, as int32: offsets in bytes from the start of a page.
typedef struct {
    int32_t codes;         // [block_size][row_bytes]
    int32_t row_bytes;     // of a token
    int32_t scales;        // [block_size], FP16; allocated: bytes
    int32_t zeros;         // [block_size], FP16; allocated: unused
    int32_t outliers;      // [num_outliers][block_size], FP16
    int32_t num_outliers;  // at most 4; values have none
    int32_t vectors;       // of 16 bytes that the codes are when unpacked, rounded up to a multiple of 2: two quads
                           // each as FP16, four as bytes; quads that are not there have masks of 0
    int32_t lanes;         // how unpacking is shared out: log2 of the vectors that neighbouring threads take, or -1:
                           // neighbouring threads take tokens
} xquant_cuda_latent;

// One layer.
typedef struct {
    const xquant_cuda_latent* key;       // [num_kv_heads]
    const xquant_cuda_latent* value;     // [num_kv_heads]
    const xquant_cuda_quad* key_quads;   // [num_kv_heads, head_size / 4]
    const xquant_cuda_quad* value_quads;
    const uint32_t* key_masks;           // [num_kv_heads, head_size / 4]: of a quad, low mask | high mask << 8 |
    const uint32_t* value_masks;         // shift of the high part << 16 | slow << 24
    const uint32_t* up_key;              // fragments of key_type, see up_fragments() in cuda/keys.py
    const float* key_rows;               // [num_kv_heads, 7, head_size], columns in halves: what a product of codes and
                                         // up_key counts, what a token's zero point is multiplied by, the bias, and
                                         // what its outliers are multiplied by
    const float* value_levels;           // [num_kv_heads, head_size]: half the largest code, in k-order
    const int32_t* value_channels;       // [num_kv_heads, head_size]: the channel, in k-order; -1: none
    const int32_t* columns;              // [head_size]: which channel of a query head stands where in the halves
    const float* rope_base;              // [positions / 64, head_size / 2, 2]: cosine and sine of every 64th position
    const uint32_t* rope_offset;         // [64, head_size / 2]: FP16 cosine and sine of 0 to 63 positions further
    int32_t key_allocated;               // 1: allocated streams, 0: uniform ones
    int32_t value_allocated;
    int32_t key_type;                    // of what key codes are unpacked to, and of up_key: 1 FP16, 3 INT8
    int32_t key_row_bytes;               // of all kv heads, at most
    int32_t value_row_bytes;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_size;                   // 64 or 128
    int32_t block_size;                  // a multiple of 16
    int32_t window;                      // keys that a query sees; 0: all
    float scale;
    float soft_cap;                      // 0: none
} xquant_cuda_decode_plan;

// One call.
typedef struct {
    const uint8_t* pages;  // starts at a multiple of 16 bytes
    int64_t page_stride;   // a multiple of 16
    const void* query;     // [tokens, num_heads, head_size], FP16 or BF16
    int64_t query_token_stride;
    int64_t query_head_stride;
    const int32_t* query_start_loc;  // [num_sequences + 1]; times the query heads of a kv head at most 16 rows each
    const int32_t* seq_lens;
    const int32_t* block_table;
    int64_t table_stride;
    float* sums;   // [tokens, num_heads, splits, sum_columns], written
    float* stats;  // [tokens, num_heads, splits, 3], written
    int32_t sum_columns;  // at most head_size
    int32_t num_sequences;
    int32_t splits;
    int32_t row_tiles;  // 1: at most 8 rows, 2: at most 16
    int32_t type;       // of the query: 1 FP16, 2 BF16
    int32_t reserved;
} xquant_cuda_decode_call;

// Both structs are read during the call, in host memory. Returns a cudaError_t.
XQUANT_CUDA_EXPORT int xquant_cuda_decode(const xquant_cuda_decode_plan* plan, const xquant_cuda_decode_call* call,
                                          void* stream);
// Bytes of shared memory that a block takes.
XQUANT_CUDA_EXPORT int64_t xquant_cuda_decode_shared_bytes(const xquant_cuda_decode_plan* plan, int row_tiles);

#endif
