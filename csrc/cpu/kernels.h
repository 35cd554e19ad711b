// What dispatch.cpp knows of the kernels: one table of functions per instruction set, and plain data between them.
//
// This header holds no functions on purpose: code in a header that files with different -m flags share could be merged
// by the linker, and the portable build would execute AVX-512 instructions.
#ifndef XQUANT_CPU_KERNELS_H
#define XQUANT_CPU_KERNELS_H

#include "api.h"
#include "kivi/kivi_api.h"

namespace xquant {

// Tokens whose latents, keys and scores are in flight at once.
constexpr int64_t kTile = 64;

// Tokens of context reduced by one online softmax. Stretches start at multiples of this position and are merged in
// ascending order, whoever computed them: so the split of work over threads does not change a bit of the result.
constexpr int64_t kStretch = 256;

// Query rows (query tokens times query heads of a kv head) that share rematerialized keys.
constexpr int64_t kQueryRows = 192;

// Floats that kv heads may accumulate together, at most, to share the latents that they read: more would leave the
// processor's cache between two tiles. One query token of a sequence always shares.
constexpr int64_t kSharedFloats = 1 << 19;

// Neighbouring tokens that one thread stores: they share cache lines of a page and the weights of a prediction.
constexpr int64_t kStoreTokens = 8;

// Floats in the widest vector; row lengths are rounded up to it so that no kernel has a scalar tail.
constexpr int64_t kPad = 16;

// Attention of some consecutive query tokens of one sequence to one kv head or several.
struct Task {
    int64_t sequence;
    int64_t kv_head;
    int64_t query_begin;     // first query token, in the batch
    int64_t query_count;
    int64_t first_position;  // position of the first query token
    int64_t oldest;          // first position that any of them sees
    int64_t end;             // one past the last
    int64_t kv_heads = 1;    // from kv_head on; more than one where they read the same latents
};

// Unnormalized softmax of a task's rows over a part of the context.
struct State {
    float* max;          // [rows] largest score
    float* sum;          // [rows] sum of exp(score - max)
    float* accumulator;  // [rows, padded value width] sum of exp(score - max) * value latent
};

struct Kernels {
    const char* name;
    // Floats of scratch that one thread needs.
    int64_t (*store_scratch)(const xquant_plan& plan);
    int64_t (*attention_scratch)(const xquant_plan& plan, int64_t rows);
    // Quantize `count` tokens, at most kStoreTokens.
    void (*store)(const xquant_plan& plan, const xquant_store_call& call, int64_t first, int64_t count, float* scratch);
    // Fill `state` with one stretch of a task's context, counted from position 0. False when the block table names a
    // block that is not there.
    bool (*attend_stretch)(const xquant_plan& plan, const xquant_attention_call& call, const Task& task,
                           int64_t stretch, const State& state, float* scratch);
    // Add a later stretch's state to `into`.
    void (*merge)(const xquant_plan& plan, int64_t rows, const State& into, const State& from);
    // Normalize, up-project and write the output.
    void (*finish)(const xquant_plan& plan, const xquant_attention_call& call, const Task& task, const State& state,
                   float* scratch);

    // The pool of hot blocks: floats of scratch, and some neighbouring tokens of a call.
    int64_t (*hot_scratch)(const xquant_plan& plan);
    void (*read_tokens)(const xquant_plan& plan, const xquant_read_call& call, int64_t first, int64_t count,
                        float* scratch);
    void (*finish_tokens)(const xquant_plan& plan, const xquant_finish_call& call, int64_t first, int64_t count,
                          float* scratch);
    // Of all in one: floats of a stage, where tokens are between reading and multiplying, and of a thread that multiplies.
    int64_t (*hot_stage)(const xquant_plan& plan, const xquant_hot_layer& layer, int64_t tokens);
    int64_t (*hot_heads_scratch)(const xquant_plan& plan, int64_t tokens);
    void (*hot_read)(const xquant_plan& plan, const xquant_hot_layer& layer, const xquant_hot_call& call, int64_t first,
                     int64_t count, float* stage, int64_t room, int64_t at, float* scratch);
    void (*hot_write)(const xquant_plan& plan, const xquant_hot_layer& layer, const xquant_hot_call& call, bool values,
                      int64_t kv_head, int64_t first, int64_t count, float* stage, int64_t room, float* scratch);

    // KIVI; merge and finish are the same.
    int64_t (*kivi_store_scratch)(const xquant_kivi_plan& plan);
    int64_t (*kivi_attention_scratch)(const xquant_kivi_plan& plan, int64_t rows);
    // Store `count` tokens, at most kStoreTokens.
    void (*kivi_store)(const xquant_kivi_plan& plan, const xquant_kivi_store_call& call, int64_t first, int64_t count,
                       float* scratch);
    // Quantize a group of a sequence's keys from residual pages. False when a block table names a block that is not there.
    bool (*kivi_store_group)(const xquant_kivi_plan& plan, const xquant_kivi_store_call& call, int64_t sequence,
                             int64_t group, float* scratch);
    bool (*kivi_attend_stretch)(const xquant_kivi_plan& plan, const xquant_kivi_attention_call& call, const Task& task,
                                int64_t stretch, const State& state, float* scratch);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kVnniKernels;
extern const Kernels kAmxKernels;          // only where XQUANT_WITH_AMX is defined
extern const Kernels kEmulatedAmxKernels;  // only where XQUANT_WITH_EMULATED_AMX is
#endif

}  // namespace xquant

#endif
