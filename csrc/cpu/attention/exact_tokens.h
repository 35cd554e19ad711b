// Tokens of a prompt's own step as the model computed them, where a call brings them: in place of what their pages hold.
#pragma once

#include <stdint.h>
#include <string.h>

#include "api.h"
#include "attention/tile.h"
#include "common/gemm.h"
#include "common/layout.h"
#include "kernels.h"

namespace xquant {
namespace {

struct ExactTokens {
    const xquant_plan& plan;
    const xquant_attention_call& call;
    int64_t begin;  // the first position that is exact; behind all if none is
    int64_t end;    // one past the last that the task sees
    int64_t shift;  // from a position to its query token

    ExactTokens(const xquant_plan& plan, const xquant_attention_call& call, const Task& task)
        : plan(plan), call(call), begin(INT64_MAX), end(task.end), shift(task.query_begin - task.first_position) {
        const int64_t sequence = task.sequence;
        const int64_t queries = call.query_start_loc[sequence + 1] - call.query_start_loc[sequence];
        if (call.exact_keys && queries >= call.exact_from) begin = call.seq_lens[sequence] - queries;
    }

    // The first of tokens start + [first, last) that is exact; last if none is.
    int64_t first_of(int64_t start, int64_t first, int64_t last) const {
        const int64_t from = begin - start;
        return from < first ? first : from < last ? from : last;
    }

    // Keys of tokens start + [first, last), as far as there are such, to [head_size][kTile].
    void load_keys(int64_t kv_head, int64_t start, int64_t first, int64_t last, float* keys) const {
        if (end - start < last) last = end - start;
        const float* from = call.exact_keys + kv_head * plan.head_size * call.num_tokens + start + shift;
        for (int64_t channel = 0; channel < plan.head_size; ++channel) {
            memcpy(keys + channel * kTile + first, from + channel * call.num_tokens + first,
                   (last - first) * sizeof(float));
        }
    }

    // Add the value latents of tokens start + [first, last), times their weights.
    void accumulate_values(int64_t kv_head, int64_t rows, int64_t start, int64_t first, int64_t last, const State& state,
                           const Scratch& scratch) const {
        const int64_t width = round_up(plan.value.width, kPad), heads = plan.value.num_heads;
        Product product;
        product.depth = last - first;
        product.a = scratch.weights + first;
        product.lda = kTile;
        product.b = call.exact_values + ((start + first + shift) * heads + (heads == 1 ? 0 : kv_head)) * width;
        product.ldb = heads * width;
        product.c = state.accumulator;
        product.ldc = width;
        product.accumulate = true;
        gemm<Order::kPlain>(rows, width, product);
    }
};

}  // namespace
}  // namespace xquant
