// KIVI's attention of one task to one stretch of its context. Of a tile's tokens a query sees the older keys quantized and
// the newer ones exactly, and so the values, from another token on; the boundaries move with the query. So a tile is
// scored both ways as far as any row needs it, and every row takes its own of both.
#pragma once

#include <stdint.h>
#include <string.h>

#include "attention/attention.h"
#include "attention/tile.h"
#include "common/gemm.h"
#include "common/layout.h"
#include "kernels.h"
#include "kivi/exact.h"
#include "kivi/keys.h"
#include "kivi/kivi_api.h"
#include "kivi/pages.h"
#include "kivi/scratch.h"
#include "tiles/registers.h"

namespace xquant {
namespace {

struct KiviTile {
    const xquant_kivi_plan& plan;
    const Task& task;
    const Pages& pages;
    const ResidualView& residual;
    const Scratch& base;
    const KiviScratch& scratch;
    int64_t rows;
    int64_t step_start;  // position of the sequence's first query token

    FirstExact first_exact(int64_t row) const {
        return {plan, task.first_position + row / group_of(plan.layer), step_start};
    }
};

inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Ask for what a tile's tokens from position `start` on, before `end`, are read from, as Pages::prefetch_tile does.
inline void prefetch_tile(const KiviTile& tile, int64_t start, int64_t end) {
    const xquant_kivi_plan& plan = tile.plan;
    const KeyView keys{plan, tile.task.kv_head};
    const HeadView values = head_view(plan.layer, plan.layer.value.terms[0], tile.task.kv_head);
    const FirstExact newest = tile.first_exact(tile.rows - 1), oldest = tile.first_exact(0);
    for (int64_t strip = start; strip < end && strip < start + kTile; strip += kStrip) {
        const uint8_t* page = tile.pages.page(0, strip);
        const int64_t slot = tile.pages.slot(strip);
        if (strip < newest.key) {
            prefetch(page + keys.codes(slot), kStrip * keys.row_bytes());
            if (strip % plan.key_group_size == 0 || strip == start) {
                prefetch(page + keys.scale(slot), plan.layer.head_size * 2);
                prefetch(page + keys.zero(slot), plan.layer.head_size * 2);
            }
        }
        if (strip < newest.value) prefetch_strip(values, page, slot);
        if (strip + kStrip > oldest.key) prefetch(tile.residual.key(strip), kStrip * tile.residual.row_bytes());
        if (strip + kStrip > oldest.value) prefetch(tile.residual.value(strip), kStrip * tile.residual.row_bytes());
    }
}

// Scores of tokens start + [first, last), multiples of 16, for all rows.
inline void kivi_score(const KiviTile& tile, int64_t start, int64_t first, int64_t last) {
    // Boundaries grow with the row.
    const int64_t quantized_end = clamp(round_up(tile.first_exact(tile.rows - 1).key - start, kStrip), first, last);
    const int64_t exact_begin = clamp((tile.first_exact(0).key - start) & -kStrip, first, last);
    const int64_t head_size = tile.plan.layer.head_size;
    if (first < quantized_end) {
        score_quantized(tile.plan, tile.pages, tile.task.kv_head, tile.rows, start, first, quantized_end, tile.base,
                        tile.scratch);
    }
    if (exact_begin == last) return;
    const bool mixed = exact_begin < quantized_end;
    float* scores = mixed ? tile.scratch.exact : tile.base.weights;
    load_exact_keys(tile.residual, start, exact_begin, last, tile.base.keys, tile.scratch.bytes);
    score_keys(tile.base, tile.rows, head_size, exact_begin, last, scores);
    if (!mixed) return;
    for (int64_t row = 0; row < tile.rows; ++row) {
        const int64_t from = clamp(tile.first_exact(row).key - start, exact_begin, last), at = row * kTile + from;
        memcpy(tile.base.weights + at, scores + at, (last - from) * sizeof(float));
    }
}

// Add the exact values of tokens start + [first, last), times `weights`.
inline void accumulate_exact(const KiviTile& tile, int64_t start, int64_t first, int64_t last, const float* weights,
                             const State& state) {
    const int64_t stride = tile.base.value_stride, width = round_up(tile.plan.layer.head_size, kPad);
    load_exact_values(tile.residual, start, first, last, tile.base.values, stride);
    Product product;
    product.depth = last - first;
    product.a = weights + first;
    product.lda = kTile;
    product.b = tile.base.values + first * stride;
    product.ldb = stride;
    product.c = state.accumulator;
    product.ldc = width;
    product.accumulate = true;
    gemm<Order::kPlain>(tile.rows, width, product);
}

// Add the values of tokens start + [first, last), times their weights.
inline void kivi_accumulate(const KiviTile& tile, int64_t start, int64_t first, int64_t last, const State& state) {
    const int64_t quantized_end = clamp(tile.first_exact(tile.rows - 1).value - start, first, last);
    const int64_t exact_begin = clamp(tile.first_exact(0).value - start, first, last);
    float* weights = tile.base.weights;
    float* exact = weights;
    if (exact_begin < quantized_end) {
        exact = tile.scratch.exact;
        for (int64_t row = 0; row < tile.rows; ++row) {
            const int64_t boundary = clamp(tile.first_exact(row).value - start, exact_begin, last), at = row * kTile;
            memset(exact + at + exact_begin, 0, (boundary - exact_begin) * sizeof(float));
            memcpy(exact + at + boundary, weights + at + boundary, (last - boundary) * sizeof(float));
            memset(weights + at + boundary, 0, (last - boundary) * sizeof(float));
        }
    }
    if (first < quantized_end) {
        accumulate_values(tile.plan.layer, tile.pages, tile.task.kv_head, tile.rows, start, first, quantized_end, state,
                          tile.base);
    }
    if (exact_begin < last) accumulate_exact(tile, start, exact_begin, last, exact, state);
}

inline int64_t kivi_attention_scratch(const xquant_kivi_plan& plan, int64_t rows) {
    const KiviScratch scratch(plan, Scratch(plan.layer, rows, nullptr), rows, nullptr);
    const int64_t floats = attention_scratch(plan.layer, rows);
    return scratch.floats > floats ? scratch.floats : floats;
}

inline bool kivi_attend_stretch(const xquant_kivi_plan& plan, const xquant_kivi_attention_call& call, const Task& task,
                                int64_t stretch, const State& state, float* memory) {
    const xquant_attention_call& batch = call.batch;
    const int64_t rows = task.query_count * group_of(plan.layer), sequence = task.sequence;
    const Scratch base(plan.layer, rows, memory);
    const KiviScratch scratch(plan, base, rows, memory);
    const Pages pages{plan.layer, batch, batch.block_table + sequence * batch.block_table_stride};
    const ResidualView residual(plan, call.residual, sequence, task.kv_head);
    const int64_t queries = batch.query_start_loc[sequence + 1] - batch.query_start_loc[sequence];
    const KiviTile tile{plan, task, pages, residual, base, scratch, rows, batch.seq_lens[sequence] - queries};
    const Context context(task, stretch);
    load_queries(plan.layer, batch, task, rows, base);
    for (int64_t row = 0; row < rows; ++row) {  // fold() goes over whole vectors
        float* query = base.query + row * base.query_width;
        for (int64_t i = plan.layer.head_size; i < base.query_width; ++i) query[i] = 0.0f;
    }
    clear(plan.layer, rows, state);
    const int64_t exact = clamp(tile.first_exact(0).value, context.begin, context.end);
    if (!pages.have(context.begin, context.end) || !residual.have(exact, context.end)) return false;
    configure_tiles_for(rows);
    context.for_tiles([&](int64_t start, int64_t first, int64_t last) {
        const int64_t first_column = first / kStrip * kStrip, last_column = round_up(last, kStrip);
        prefetch_tile(tile, start + kTile, task.end);
        kivi_score(tile, start, first_column, last_column);
        weigh(plan.layer, task, rows, start, first_column, last_column, state, base);
        kivi_accumulate(tile, start, first, last, state);
    });
    release_tiles();
    return true;
}

}  // namespace
}  // namespace xquant
