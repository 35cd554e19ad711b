// What every task does with its rows, however their keys and values are made.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "api.h"
#include "attention/softmax.h"
#include "attention/tile.h"
#include "common/convert.h"
#include "common/gemm.h"
#include "common/layout.h"
#include "common/simd.h"
#include "kernels.h"

namespace xquant {
namespace {

// Weights of tokens start + [first, last) for all rows from their scores; shrinks the accumulator where a maximum grew.
inline void weigh(const xquant_plan& plan, const Task& task, int64_t rows, int64_t start, int64_t first, int64_t last,
                  const State& state, const Scratch& scratch) {
    const int64_t columns = last - first, width = round_up(plan.value.width, kPad), group = group_of(plan);
    const auto clamp = [](int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; };
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t position = task.first_position + row / group;
        const int64_t oldest = plan.sliding_window ? position - plan.sliding_window + 1 : 0;
        const int64_t from = clamp(oldest - (start + first), 0, columns);
        const int64_t to = clamp(position + 1 - (start + first), from, columns);
        const float factor = softmax_row(scratch.weights + row * kTile + first, columns, from, to, plan.soft_cap,
                                         state.max[row], state.sum[row]);
        if (factor != 1.0f) {
            float* accumulator = state.accumulator + row * width;
            for (int64_t j = 0; j < width; j += kLanes) store(accumulator + j, load(accumulator + j) * factor);
        }
    }
}

// The rows of a task's queries, times the scale, and times up_key if that is absorbed.
inline void load_queries(const xquant_plan& plan, const xquant_attention_call& call, const Task& task, int64_t rows,
                         const Scratch& scratch) {
    for (int64_t row = 0; row < rows; ++row) {
        float* query = scratch.query + row * scratch.query_width;
        float* head = plan.key_absorbed ? scratch.head : query;
        load_row(call.dtype, call.query,
                 row_element(plan, task, row, call.query_token_stride, call.query_head_stride), plan.head_size, head);
        for (int64_t i = 0; i < plan.head_size; ++i) head[i] *= plan.scale;
        if (!plan.key_absorbed) continue;
        Product product;
        product.depth = plan.head_size;
        product.a = head;
        product.lda = plan.head_size;
        product.b = plan.up_key + task.kv_head * plan.head_size * scratch.query_width;
        product.ldb = scratch.query_width;
        product.c = query;
        product.ldc = scratch.query_width;
        product.accumulate = false;
        gemm<Order::kPlain>(1, scratch.query_width, product);
    }
}

// The tokens of a stretch that a task sees.
struct Context {
    int64_t begin, end;

    Context(const Task& task, int64_t stretch) : begin(stretch * kStretch), end(begin + kStretch) {
        if (task.oldest > begin) begin = task.oldest;
        if (task.end < end) end = task.end;
    }

    // Call visit(start, first, last) for its tiles: tokens start + [first, last).
    template <typename Visit>
    void for_tiles(const Visit& visit) const {
        for (int64_t start = begin / kTile * kTile; start < end; start += kTile) {
            visit(start, begin > start ? begin - start : 0, end < start + kTile ? end - start : kTile);
        }
    }
};

// The state of rows that have seen nothing.
inline void clear(const xquant_plan& plan, int64_t rows, const State& state) {
    for (int64_t row = 0; row < rows; ++row) {
        state.max[row] = -INFINITY;
        state.sum[row] = 0.0f;
    }
    memset(state.accumulator, 0, rows * round_up(plan.value.width, kPad) * sizeof(float));
}

}  // namespace
}  // namespace xquant
