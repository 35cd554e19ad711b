// Attention of one task to one stretch of its context. Per tile of 64 tokens:
//
//     latents^T [width][tokens]  <- codes of the keys                      unpack_channels
//     keys^T    [head][tokens]   <- up_key^T * latents^T; bias, norm, RoPE gemm, rematerialize.h
//     weights   [rows][tokens]   <- softmax(query * keys^T)                gemm, softmax_row
//     values    [tokens][width]  <- codes of the values                    unpack_rows
//     accumulator [rows][width]  += weights * values                       gemm
//
// V is absorbed: the value up-projection happens once per query row, in finish(). K is absorbed where the model neither
// norms nor turns it: then queries are multiplied by up_key instead, and score against the latents themselves. Tokens
// that a call brings as they are (exact_tokens.h) skip what makes keys or latents of codes.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "api.h"
#include "attention/exact_tokens.h"
#include "attention/integer_values.h"
#include "attention/load_keys.h"
#include "attention/load_values.h"
#include "attention/rows.h"
#include "attention/shared_latents.h"
#include "attention/softmax.h"
#include "attention/tile.h"
#include "common/convert.h"
#include "common/gemm.h"
#include "common/layout.h"
#include "common/simd.h"
#include "kernels.h"
#include "tiles/registers.h"
#include "tiles/scores.h"

namespace xquant {
namespace {

// Scores of tokens start + [first, last) for all rows, by their keys or, absorbed, by their latents; `in_tiles` as
// scores_in_tiles says.
inline void score(const xquant_plan& plan, const Pages& pages, const ExactTokens& exact, int64_t kv_head, int64_t rows,
                  int64_t start, int64_t first, int64_t last, bool in_tiles, const Scratch& scratch) {
    Product product;
    product.lda = scratch.query_width;
    product.ldb = kTile;
    product.c = scratch.weights + first;
    product.ldc = kTile;
    if (plan.key_absorbed) {
        for_bands(plan.key, kv_head, [&](const Band& band) {
            load_key_latents(plan, pages, kv_head, start, first, last, band, scratch);
            product.depth = band.channels;
            product.a = scratch.query + band.row;
            product.b = scratch.latents + first;
            product.accumulate = band.row > 0;
            gemm<Order::kPlain>(rows, last - first, product);
        });
        return;
    }
    const int64_t from = exact.first_of(start, first, last);
    uint32_t* bfloats = in_tiles && from == last ? scratch.tile_keys : nullptr;
    const bool rounded =
        from > first && load_keys(plan, pages, kv_head, start, first, round_up(from, kStrip), scratch, bfloats);
    if (from < last) exact.load_keys(kv_head, start, from, last, scratch.keys);
    if (in_tiles) {
        if (!rounded) round_keys(scratch, plan.head_size, first, last);
        tile_scores(plan, rows, first, last, scratch);
        return;
    }
    product.depth = plan.head_size;
    product.a = scratch.query;
    product.b = scratch.keys + first;
    product.accumulate = false;
    gemm<Order::kPlain>(rows, last - first, product);
}

// Add the value latents of tokens start + [first, last), times their weights.
inline void accumulate_values(const xquant_plan& plan, const Pages& pages, int64_t kv_head, int64_t rows,
                              int64_t start, int64_t first, int64_t last, const State& state,
                              const Scratch& scratch) {
    for_bands(plan.value, kv_head, [&](const Band& band) {
        if (kIntegers && values_in_integers(plan, kv_head, band)) {
            accumulate_integer_values(plan, pages, kv_head, rows, start, first, last, band, state, scratch);
            return;
        }
        load_latents(plan, pages, plan.value, kv_head, start, first, last, band, scratch.strip, scratch.values,
                     scratch.value_stride);
        Product product;
        product.depth = last - first;
        product.a = scratch.weights + first;
        product.lda = kTile;
        product.b = scratch.values + first * scratch.value_stride;
        product.ldb = scratch.value_stride;
        product.c = state.accumulator + band.row;
        product.ldc = round_up(plan.value.width, kPad);
        product.accumulate = true;
        gemm<Order::kPlain>(rows, round_up(band.channels, kPad), product);
    });
}

inline int64_t attention_scratch(const xquant_plan& plan, int64_t rows) {
    const int64_t floats = plan.shares_latents ? SharedScratch(plan, rows, nullptr).floats
                                               : Scratch(plan, rows, nullptr).floats;
    // finish() keeps the up-projected heads there.
    const int64_t heads = rows * round_up(plan.head_size, kPad);
    return floats > heads ? floats : heads;
}

inline bool attend_stretch(const xquant_plan& plan, const xquant_attention_call& call, const Task& task,
                           int64_t stretch, const State& state, float* memory) {
    if (plan.shares_latents) return attend_shared_stretch(plan, call, task, stretch, state, memory);
    const int64_t rows = task.query_count * group_of(plan);
    const Scratch scratch(plan, rows, memory);
    const Pages pages{plan, call, call.block_table + task.sequence * call.block_table_stride};
    const Context context(task, stretch);
    const ExactTokens exact(plan, call, task);
    const bool in_tiles = scores_in_tiles(plan, call);
    (in_tiles ? load_tile_queries : load_queries)(plan, call, task, rows, scratch);
    clear(plan, rows, state);
    if (!pages.have(context.begin, context.end)) return false;
    configure_tiles_for(rows);
    context.for_tiles([&](int64_t start, int64_t first, int64_t last) {
        const int64_t next = start + kTile, after = next + kTile;
        pages.prefetch_tile(task.kv_head, next, after < task.end ? after : task.end);
        const int64_t first_column = first / kStrip * kStrip, last_column = round_up(last, kStrip);
        score(plan, pages, exact, task.kv_head, rows, start, first_column, last_column, in_tiles, scratch);
        weigh(plan, task, rows, start, first_column, last_column, state, scratch);
        const int64_t from = exact.first_of(start, first, last);
        if (from > first) accumulate_values(plan, pages, task.kv_head, rows, start, first, from, state, scratch);
        if (from < last) exact.accumulate_values(task.kv_head, rows, start, from, last, state, scratch);
    });
    release_tiles();
    return true;
}

inline void merge(const xquant_plan& plan, int64_t rows, const State& into, const State& from) {
    const int64_t width = round_up(plan.value.width, kPad);
    for (int64_t row = 0; row < rows; ++row) {
        // A stretch in which a row sees nothing changes nothing, so it does not matter whether it was visited.
        if (from.sum[row] == 0.0f) continue;
        const bool grew = from.max[row] > into.max[row];
        const float max = grew ? from.max[row] : into.max[row];
        const float keep = grew ? exp_nonpositive(into.max[row] - max) : 1.0f;
        const float add = grew ? 1.0f : exp_nonpositive(from.max[row] - max);
        into.max[row] = max;
        into.sum[row] = into.sum[row] * keep + from.sum[row] * add;
        float* to = into.accumulator + row * width;
        const float* x = from.accumulator + row * width;
        for (int64_t j = 0; j < width; j += kLanes) store(to + j, load(to + j) * keep + load(x + j) * add);
    }
}

// By what a row's sums are multiplied so that its weights, with that of its sink, add up to 1.
inline float weight_factor(const xquant_plan& plan, const Task& task, int64_t row, const State& state) {
    const float max = state.max[row], sum = state.sum[row];
    if (!plan.sinks) return 1.0f / sum;
    const int64_t group = group_of(plan);
    const float sink = plan.sinks[task.kv_head * group + row % group];
    if (sink <= max) return 1.0f / (sum + exp_nonpositive(sink - max));
    const float keep = exp_nonpositive(max - sink);
    return keep / (sum * keep + 1.0f);
}

// Heads [rows][head_size rounded up to 16] from weighed sums of value latents; `all` says that these may have channels
// that pages do not store.
inline void up_project(const xquant_plan& plan, const Task& task, int64_t rows, bool all, const State& state,
                       float* heads) {
    const int64_t width = round_up(plan.value.width, kPad), padded_head = round_up(plan.head_size, kPad);
    if (!plan.up_value) {
        memset(heads, 0, rows * padded_head * sizeof(float));
        const auto copy = [&](int64_t at, int64_t channels) {
            for (int64_t row = 0; row < rows; ++row) {
                memcpy(heads + row * padded_head + at, state.accumulator + row * width + at, channels * sizeof(float));
            }
        };
        if (all) return copy(0, plan.value.width);
        for_bands(plan.value, task.kv_head, [&](const Band& band) { copy(band.row, band.channels); });
        return;
    }
    const float* up = plan.up_value + task.kv_head * plan.value.width * padded_head;
    Product product;
    product.lda = width;
    product.ldb = padded_head;
    product.c = heads;
    product.ldc = padded_head;
    const auto add = [&](int64_t row, int64_t channels) {
        product.depth = channels;
        product.a = state.accumulator + row;
        product.b = up + row * padded_head;
        product.accumulate = row > 0;
        gemm<Order::kPlain>(rows, padded_head, product);
    };
    if (all) return add(0, plan.value.width);
    for_bands(plan.value, task.kv_head, [&](const Band& band) { add(band.row, band.channels); });
}

inline void finish_head(const xquant_plan& plan, const xquant_attention_call& call, const Task& task, const State& state,
                   float* memory) {
    const int64_t rows = task.query_count * group_of(plan), head_size = plan.head_size;
    const int64_t padded_head = round_up(head_size, kPad);
    up_project(plan, task, rows, call.exact_values != nullptr, state, memory);
    for (int64_t row = 0; row < rows; ++row) {
        float* head = memory + row * padded_head;
        const float factor = weight_factor(plan, task, row, state);
        for (int64_t i = 0; i < head_size; ++i) head[i] *= factor;
        if (plan.value_bias) {
            // What a sink takes of the weight has no value, nor a bias.
            const float share = plan.sinks ? state.sum[row] * factor : 1.0f;
            const float* bias = plan.value_bias + task.kv_head * head_size;
            for (int64_t i = 0; i < head_size; ++i) head[i] += share * bias[i];
        }
        store_row(call.dtype, head, head_size, call.output,
                  row_element(plan, task, row, call.output_token_stride, call.output_head_stride));
    }
}

inline void finish(const xquant_plan& plan, const xquant_attention_call& call, const Task& task, const State& state,
                   float* memory) {
    const int64_t rows = task.query_count * group_of(plan);
    for (int64_t i = 0; i < task.kv_heads; ++i) {
        finish_head(plan, call, task_of_head(task, i), state_of_head(plan, state, i, rows), memory);
    }
}

}  // namespace
}  // namespace xquant
