// Quantizing what new tokens bring into their slots of a layer's pages; the bytes are those of
// xquant_vllm/codec/pages.py.
//
// Plain C. xquant_vllm/attention/gpu/cuda/library.py mirrors the structs field by field. All pointers are to device
// memory unless said otherwise; strides count elements, those of pages bytes.
#ifndef XQUANT_CUDA_STORE_H
#define XQUANT_CUDA_STORE_H

#include "common/export.h"

// Which codes a byte of a row holds: of the channels first, first + distance, ... `bits` bits of each, from bit `shift`
// of the code on, the first channel's lowest.
typedef struct {
    uint16_t first, distance;
    uint8_t bits, shift;
    uint16_t reserved;
} xquant_cuda_byte;

// A latent head of an allocated stream.
typedef struct {
    int32_t codes;      // offset in bytes from the start of a page
    int32_t row_bytes;  // of a token
    int32_t channels;   // that are stored
    int32_t first;      // in the tables of channels
    int32_t bytes;      // in the table of bytes
} xquant_cuda_store_head;

typedef struct {
    const void* input;    // [tokens, num_heads * width], a token's numbers contiguous
    int64_t input_stride;
    const xquant_cuda_store_head* heads;  // [num_heads] of an allocated stream, else NULL
    const xquant_cuda_byte* bytes;        // uniform: of a group
    // Of the channels of an allocated stream; see channel_tables() in xquant_vllm/codec/allocated.py.
    const float* step;
    const float* half_levels;   // half the largest code
    const float* worth;
    const float* total_worth;   // [num_heads]: sums of the worths
    const float* scale_values;  // [256]: what scales stand for
    int32_t type;               // of the input: 0 FP32, 1 FP16, 2 BF16
    int32_t num_heads;
    int32_t width;              // channels of a head
    int32_t bits;               // 8, 4, 3, 2, or 16: FP16 numbers; 0: allocated
    int32_t group_size;
    int32_t outlier_channels;
    int32_t codes;              // sections, in bytes from the start of a page
    int32_t scales;
    int32_t zeros;
    int32_t outliers;
} xquant_cuda_store_stream;

typedef struct {
    xquant_cuda_store_stream streams[2];
    uint8_t* pages;
    int64_t page_stride;
    const int64_t* slot_mapping;  // [tokens]: block * block_size + offset; negative: not stored
    const float* signs;           // [width]: the only stream is rotated first; see xquant_vllm/codec/rotation.py
    const float* mix;             // [width / block, width / block]
    int32_t num_streams;
    int32_t num_tokens;
    int32_t block_size;
    int32_t block;  // channels of a Hadamard transform, a power of two of at least 8
} xquant_cuda_store_call;

// The struct is read during the call, in host memory. Both return a cudaError_t.

// Latents, as they are.
XQUANT_CUDA_EXPORT int xquant_cuda_store_latents(const xquant_cuda_store_call* call, void* stream);
// X, of one head and one uniform stream, after its rotation.
XQUANT_CUDA_EXPORT int xquant_cuda_store_rotated(const xquant_cuda_store_call* call, void* stream);

#endif
