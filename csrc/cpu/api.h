// The C interface of the CPU kernels: plain structs, no torch, no C++ types. xquant_vllm/attention/cpu/abi.py mirrors
// them field by field, and refuses a library whose structs have other sizes (xquant_cpu_struct_sizes).
//
// All strides count elements of the pointed-to type, except the stride of pages (bytes). Every pointer is borrowed for the
// duration of a call. FP32 tensors are contiguous.
#ifndef XQUANT_CPU_API_H
#define XQUANT_CPU_API_H

#include <stdint.h>

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

// A run: neighbouring channels with the same bits, packed by themselves. Of a uniform stream every group is one.
typedef struct {
    int64_t bits;      // 16 (FP16 numbers), 8, 6, 4, 3 or 2
    int64_t channels;  // a multiple of 8 at 3 bits, else of 4
    int64_t channel;   // the first
    int64_t byte;      // where its codes start in a token's row
} xquant_run;

// A band: runs that are unpacked and multiplied at once. One that is not the last has a multiple of 16 channels.
typedef struct {
    int64_t begin, end;  // runs
    int64_t channel;     // the first
    int64_t channels;
} xquant_band;

// One latent head of a stream.
typedef struct {
    int64_t codes;      // offset in bytes from the start of a page: [block_size][row_bytes]
    int64_t row_bytes;  // a token's codes
    int64_t channels;   // those that are stored; the rest of the width reads as 0
    int64_t num_runs;
    int64_t num_bands;
    const xquant_run* runs;
    const xquant_band* bands;
    // Of an allocated stream, for every stored channel, then zeros up to a multiple of 16; NULL of a uniform one.
    const float* step;          // of its codes, before the token's scale
    const float* zero;          // what code 0 stands for, before the token's scale
    const float* inverse_step;  // 1 / step
    const float* middle;        // half the largest code
    const float* worth;         // of a squared error, counted in steps
    float channels_worth;       // sum of the worths of squared errors, not counted in steps
} xquant_head;

// One stream of latents; see xquant_vllm/codec/layout.py for the shapes of its sections.
typedef struct {
    int64_t num_heads;         // latent heads: the kv heads, or 1, which all kv heads read
    int64_t width;             // channels per latent head
    int64_t allocated;         // 0: a run has an FP16 scale and zero (16 bits: none); 1: a head has an 8-bit scale
    int64_t outlier_channels;  // leading channels kept in FP16; fewer than those of a run; allocated: none
    const xquant_head* heads;  // [num_heads]
    int64_t scales;            // section offsets in bytes from the start of a page
    int64_t zeros;
    int64_t outliers;
} xquant_stream;

// A stream that a latent is read from, in the layer's own pages (page 0) or in those of an earlier layer.
typedef struct {
    xquant_stream stream;
    int64_t page;  // index into the pages of a call
    int64_t adds;  // 1: added to the channels of the term before; 0: follows them
} xquant_term;

// A latent and the terms that it is put together from; see xquant_vllm/attention/latents.py.
typedef struct {
    const xquant_term* terms;
    int64_t num_terms;
    int64_t num_heads;  // latent heads: the kv heads, or 1, which all kv heads read
    int64_t width;      // channels of all terms per latent head
} xquant_latent;

// One layer: everything that does not change from call to call.
typedef struct {
    const xquant_stream* streams;  // of the layer's own pages
    int64_t num_streams;
    xquant_latent key;
    xquant_latent value;
    xquant_latent prediction;        // of the first stream, whose pages hold the difference from it; no terms: none
    const float* prediction_matrix;  // [heads of the stream, prediction.width, width of the stream rounded up to 16], the
                                     // rest of a row zero; NULL: the terms are the prediction
    const float* rotation_signs;     // [width of the first stream], which is rotated before it is stored; NULL: it is not
    const float* rotation_mix;       // [m, m], m blocks of rotation_block channels
    int64_t rotation_block;          // channels of a Hadamard transform, a power of two
    int64_t block_size;          // slots per page; a multiple of 16
    int64_t num_heads;           // query heads; a multiple of num_kv_heads
    int64_t num_kv_heads;
    int64_t head_size;           // a multiple of 8
    int64_t key_absorbed;        // 1: keys have neither norm nor RoPE, so queries are multiplied by up_key instead
    const float* up_key;         // [num_kv_heads, key.width, head_size]; absorbed: [num_kv_heads, head_size, key.width
                                 // rounded up to 16], the rest of a row zero
    // up_key in integers, for integer.h; NULL: keys are rematerialized in FP32. A scale group is what shares a scale and
    // a zero: a run of a uniform stream, a band of an allocated one. See xquant_vllm/attention/cpu/integers.py.
    const int32_t* key_integers; // [num_kv_heads, key.width / 2, head_size]: of a scale group first INT16 of two channels,
                                 // then INT8 of four, from row (first channel / 2) on
    const int64_t* key_words;    // [num_kv_heads, key_scale_groups]: channels of a scale group in INT16
    const float* key_units;      // [num_kv_heads, key_scale_groups, head_size]
    const float* key_sums;       // [num_kv_heads, key_scale_groups, head_size]
    int64_t key_scale_groups;
    // The same for tiles (tiles/registers.h), of scale groups whose channels all have INT8: their integers, transposed.
    // NULL without tiles.
    const int8_t* key_tiles;        // [chunks of 64 channels of a scale group][head_size rounded up to 16][64], the rest zero
    const int64_t* key_first_tiles; // [num_kv_heads, key_scale_groups]: the first chunk; -1: there are no tiles
    // All kv heads read the same latents, which are unpacked once for them: shared_latents.h.
    int64_t shares_latents;
    // With shares_latents: up_key in INT8, for byte_keys.h, in one of two orders; both NULL: not. See
    // xquant_vllm/attention/cpu/byte_keys.py.
    const int32_t* key_bytes;         // [num_kv_heads, head_size / 8, key.width rounded up to 16, / 4, 8] of four channels
    const int8_t* key_byte_tiles;     // [num_kv_heads, chunks of 64 channels][head_size rounded up to 16][64], the rest zero
    const int32_t* key_byte_offsets;  // [num_kv_heads, head_size]
    const float* key_byte_units;      // [num_kv_heads, head_size]
    const float* up_value;       // [num_kv_heads, value.width, head_size rounded up to 16], the rest of a row zero; NULL:
                                 // the value latents are the values, and value.width is head_size
    const float* key_bias;       // [num_kv_heads, head_size] or NULL
    const float* value_bias;     // [num_kv_heads, head_size] or NULL
    const float* key_norm;       // [num_kv_heads][head_size] weights of the RMS norm of a key head, or NULL
    const float* sinks;          // [num_heads]: scores of keys without values, or NULL
    const float* rope;           // [positions / 16, rotary_size / 2, 2, 16]: cosines, then sines, of 16 positions; NULL
    int64_t rotary_size;         // leading channels that rotate; 0 without RoPE
    int64_t rotary_positions;    // positions in the table, before it was rounded up to 16; 0 without RoPE
    int64_t rotary_interleaved;  // 1: pairs (2i, 2i + 1); 0: pairs (i, i + rotary_size / 2)
    int64_t sliding_window;      // keys a query sees, itself included; 0 for all
    float key_norm_eps;
    float scale;                 // factor on the scores
    float soft_cap;              // scores become cap * tanh(score / cap); 0 for none
} xquant_plan;

// The pages of one layer.
typedef struct {
    uint8_t* data;   // [num_blocks, bytes of a page]
    int64_t stride;  // bytes between pages
} xquant_pages;

// What new tokens bring for one stream.
typedef struct {
    const void* data;  // [num_tokens, num_heads * width], rows `stride` elements apart
    int64_t stride;
    int64_t dtype;
} xquant_input;

// Quantize what new tokens bring into their slots.
typedef struct {
    const xquant_pages* pages;    // the layer's own, which are written, then those that it reads too
    int64_t num_blocks;           // that all of these pages have
    const int64_t* slot_mapping;  // [num_tokens]: block * block_size + offset; negative: not stored
    int64_t num_tokens;
    const xquant_input* inputs;   // one for every stream
} xquant_store_call;

// Causal attention of query tokens over their sequences' pages.
typedef struct {
    const xquant_pages* pages;       // the layer's own, then those that it reads too
    int64_t num_blocks;              // that all of these pages have
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
    // The query tokens as they were computed, for sequences with at least exact_from of them; not with key_absorbed, and
    // both NULL if all tokens are read from pages. KIVI has pages for them.
    const float* exact_keys;         // [num_kv_heads, head_size, num_tokens], after RoPE
    const float* exact_values;       // [num_tokens, value.num_heads, value.width rounded up to 16], the rest of a row zero
    int64_t exact_from;
} xquant_attention_call;

// Read a latent of single tokens.
typedef struct {
    const xquant_pages* pages;  // the layer's own, then those that it reads too
    int64_t num_blocks;         // that all of these pages have
    const int64_t* slots;       // [num_tokens]: block * block_size + offset
    int64_t num_tokens;
    float* latents;             // [num_tokens, heads of the latent, its width], written
    void* output;               // the same in `dtype`, written too; NULL: not
    int64_t dtype;
    int64_t values;             // 1: the value latent; 0: the key latent
    int64_t first_term;         // terms before this one are in `latents` already
} xquant_read_call;

// Keys and values of single tokens, up-projected: add what follows, in place.
typedef struct {
    const int64_t* positions;  // [num_tokens]
    int64_t num_tokens;
    void* keys;                // [num_tokens, num_kv_heads, head_size]; head_size is contiguous
    int64_t key_token_stride;
    int64_t key_head_stride;
    void* values;              // likewise
    int64_t value_token_stride;
    int64_t value_head_stride;
    int64_t dtype;             // of both
} xquant_finish_call;

// Where the keys, or the values, of a pool of hot blocks are: number i of token t of a block at tokens[t] + channels[i].
typedef struct {
    void* data;               // of the first hot block's first kv head
    const int64_t* tokens;    // [block_size]
    const int64_t* channels;  // [head_size]
    int64_t contiguous;       // 1: channels are 0, 1, 2, ...
} xquant_hot_places;

// The pool of one layer, and what is multiplied for it.
typedef struct {
    int64_t dtype;          // of the pool
    int64_t shared;         // 1: keys and values are made of the same latent
    // Of an FP32 or FP16 pool [num_kv_heads, width, columns] FP32, columns being head_size rounded up to 16 by zeros; else
    // BF16 [num_kv_heads][columns / 32][width / 2][32][2], the last 32 columns being 16 if that is what is left.
    const void* up_key;
    const void* up_value;   // likewise; NULL: the value latents are the values
    xquant_hot_places keys;
    xquant_hot_places values;
    int64_t block_stride;   // from hot block to hot block
    int64_t head_stride;    // from kv head to kv head
    int64_t num_hot_blocks;
} xquant_hot_layer;

// Write tokens of the pages to the pool.
typedef struct {
    const xquant_pages* pages;  // the layer's own, then those that it reads too
    int64_t num_blocks;         // that all of these pages have
    const int64_t* slots;       // [num_tokens]: block * block_size + offset
    const int64_t* positions;   // [num_tokens]
    const int64_t* hot_slots;   // [num_tokens]: hot block * block_size + offset
    int64_t num_tokens;
    float* latents;             // [num_tokens, heads of the latent, its width] of the latent that keys and values share,
                                // written; NULL: nobody wants it
    int64_t first_term;         // terms before this one are in `latents` already
} xquant_hot_call;

// These return NULL, or a static text that says what is wrong with the input; then nothing or only a part was written,
// but never out of bounds.
XQUANT_EXPORT const char* xquant_cpu_store(const xquant_plan* plan, const xquant_store_call* call);
XQUANT_EXPORT const char* xquant_cpu_attention(const xquant_plan* plan, const xquant_attention_call* call);
XQUANT_EXPORT const char* xquant_cpu_read_tokens(const xquant_plan* plan, const xquant_read_call* call);
XQUANT_EXPORT const char* xquant_cpu_finish_tokens(const xquant_plan* plan, const xquant_finish_call* call);
XQUANT_EXPORT const char* xquant_cpu_write_hot(const xquant_plan* plan, const xquant_hot_layer* layer,
                                               const xquant_hot_call* call);

// The instruction set in use: "amx", "vnni" (AVX-512 with it), "avx512", "avx2" or "portable"; for tests "amx-emulated".
// Those of a source tree also have "amx-trapped", which is "amx" where the processor lacks it: see tools/amx_trap.py.
XQUANT_EXPORT const char* xquant_cpu_isa(void);
// Use another one, or NULL for the best; 0 where this machine or this build lacks it. Not for use during a call.
XQUANT_EXPORT int xquant_cpu_set_isa(const char* name);
// Why "amx" is not there, as a static text; NULL: it is.
XQUANT_EXPORT const char* xquant_cpu_tiles_refused(void);
// The same of any processor, by what CPUID and XGETBV say of it and whether the kernel permits tiles.
XQUANT_EXPORT const char* xquant_cpu_why_no_tiles(uint64_t leaf7_edx, uint64_t leaf7_1_eax, uint64_t xcr0, int permitted);
// Threads that the next call of this thread would use, as the OpenMP runtime says.
XQUANT_EXPORT int xquant_cpu_threads(void);

// The size of a struct in bytes at the time of the build.
typedef struct {
    const char* name;
    int64_t size;
} xquant_struct_size;

// Every struct of this file and of kivi_api.h, then one without a name.
XQUANT_EXPORT const xquant_struct_size* xquant_cpu_struct_sizes(void);

#ifdef __cplusplus
}
#endif

#endif
