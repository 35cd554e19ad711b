// Attention to latents that all kv heads read: X, sums of X, one basis for all heads. A task has several kv heads, and a
// tile is unpacked once for them:
//
//     latents [tokens][width]    <- sum of the terms' codes                              load_latents
//     keys^T  [head][tokens]     <- of bytes of these latents (byte_keys.h), or in FP32
//     weights [rows][tokens]     <- of every kv head, as in attention.h
//     accumulator [rows][width]  += weights * latents, the rows of all kv heads at once
//
// A row goes through the same operations whether its task has one kv head or all, so its bits are the same.
#pragma once

#include <stdint.h>
#include <string.h>

#include "api.h"
#include "attention/byte_keys.h"
#include "attention/exact_tokens.h"
#include "attention/integer_values.h"
#include "attention/load_keys.h"
#include "attention/load_values.h"
#include "attention/rows.h"
#include "attention/tile.h"
#include "common/gemm.h"
#include "common/layout.h"
#include "kernels.h"
#include "tiles/keys.h"
#include "tiles/registers.h"

namespace xquant {
namespace {

inline bool keys_in_bytes(const xquant_plan& plan) { return plan.key_bytes || plan.key_byte_tiles; }

struct SharedScratch {
    Scratch all;          // its rows are those of all kv heads
    float* latents;       // [kTile][stride], token-major
    float* channels;      // [key width][kTile], where keys are made in FP32
    uint8_t* bytes;       // [kStrip][key width rounded up to 16]
    int32_t* quads;       // [key width rounded up to 16, / 4][kTile]
    float* scales;        // [kTile]
    int64_t stride;
    int64_t floats;  // size of all of it

    // Without memory only the size is right.
    SharedScratch(const xquant_plan& plan, int64_t rows, float* memory) : all(plan, rows, memory), floats(all.floats) {
        const auto take = [this, memory](int64_t count) {
            const int64_t at = floats;
            floats += round_up(count, kPad);
            return memory ? memory + at : nullptr;
        };
        const int64_t key_width = round_up(plan.key.width, kPad), value_width = round_up(plan.value.width, kPad);
        // unpack_rows writes past its last run.
        stride = (key_width > value_width ? key_width : value_width) + kPad;
        latents = take(kTile * stride);
        const bool in_bytes = keys_in_bytes(plan);
        channels = take(in_bytes ? 0 : key_width * kTile);
        bytes = (uint8_t*)take(in_bytes ? kStrip * key_width / 4 : 0);
        // A tile is loaded of 16 rows, whatever channels there are.
        quads = (int32_t*)take(in_bytes ? (key_width / 4 + (kTiles ? 16 : 0)) * kTile : 0);
        scales = take(kTile);
    }

    // That of the kv head `index` of the task, which has `rows` rows.
    Scratch of_head(int64_t index, int64_t rows) const {
        Scratch scratch = all;
        scratch.query += index * rows * all.query_width;
        scratch.weights += index * rows * kTile;
        return scratch;
    }
};

// A part of a task, and of its state.
inline Task task_of_head(const Task& task, int64_t index) {
    Task one = task;
    one.kv_head += index;
    one.kv_heads = 1;
    return one;
}

inline State state_of_head(const xquant_plan& plan, const State& state, int64_t index, int64_t rows) {
    const int64_t row = index * rows;
    return {state.max + row, state.sum + row, state.accumulator + row * round_up(plan.value.width, kPad)};
}

// Whether keys and values are made of the same latents.
inline bool same_latents(const xquant_latent& a, const xquant_latent& b) {
    if (a.num_terms != b.num_terms) return false;
    for (int64_t i = 0; i < a.num_terms; ++i) {
        const xquant_term &x = a.terms[i], &y = b.terms[i];
        if (x.page != y.page || x.adds != y.adds || x.stream.heads[0].codes != y.stream.heads[0].codes) return false;
    }
    return true;
}

// Tokens start + [first, last) of a strip, whose latents are in `rows` [16][stride], to scratch.quads and scales.
inline void load_shared_quads(const xquant_plan& plan, int64_t strip, int64_t first, int64_t last, float* rows,
                              const SharedScratch& scratch) {
    const int64_t width = plan.key.width, padded = round_up(width, kPad);
    for (int64_t token = first; token < last; ++token) {
        float* latents = rows + (token - strip) * scratch.stride;
        for (int64_t i = width; i < padded; ++i) latents[i] = 0.0f;
        scratch.scales[token] = latent_bytes(latents, padded, scratch.bytes + (token - strip) * padded);
    }
    latent_quads(scratch.bytes, padded, scratch.quads + strip);
}

// What keys of all kv heads are made of, for tokens start + [first, last). With `keep`, latents of which bytes are made
// stay in scratch.latents; else those of a strip take the place of the strip's before, which is in cache.
inline void load_for_keys(const xquant_plan& plan, const Pages& pages, int64_t start, int64_t first, int64_t last,
                          bool keep, const SharedScratch& scratch) {
    if (!keys_in_bytes(plan)) {
        for_bands(plan.key, 0, [&](const Band& band) {
            Scratch of_band = scratch.all;
            of_band.latents = scratch.channels + band.row * kTile;
            load_key_latents(plan, pages, 0, start, first / kStrip * kStrip, round_up(last, kStrip), band, of_band);
        });
        return;
    }
    for (int64_t strip = first / kStrip * kStrip; strip < last; strip += kStrip) {
        const int64_t from = first > strip ? first : strip, to = last < strip + kStrip ? last : strip + kStrip;
        float* rows = scratch.latents + (keep ? strip * scratch.stride : 0);
        for_bands(plan.key, 0, [&](const Band& band) {
            load_latents(plan, pages, plan.key, 0, start, from, to, band, scratch.all.strip,
                         rows + band.row - strip * scratch.stride, scratch.stride);
        });
        load_shared_quads(plan, strip, from, to, rows, scratch);
    }
}

// Keys of tokens start + [first, last) of a kv head, from what load_for_keys left; both bounds are multiples of 16.
inline void make_keys(const xquant_plan& plan, int64_t kv_head, int64_t start, int64_t first, int64_t last,
                      const SharedScratch& scratch) {
    float* keys = scratch.all.keys + first;
    if (keys_in_bytes(plan)) {
#if defined(XQUANT_TILES)
        tile_byte_keys(plan, kv_head, scratch.quads, scratch.scales, first, last, scratch.all.keys,
                       (int32_t*)scratch.all.products);
#else
        byte_keys(plan, kv_head, scratch.quads, scratch.scales, first, last, scratch.all.keys);
#endif
    } else {
        for_bands(plan.key, 0, [&](const Band& band) {
            Product product;
            product.depth = band.channels;
            product.a = plan.up_key + (kv_head * plan.key.width + band.row) * plan.head_size;
            product.lda = plan.head_size;
            product.b = scratch.channels + band.row * kTile + first;
            product.ldb = kTile;
            product.c = keys;
            product.ldc = kTile;
            product.accumulate = band.row > 0;
            gemm<Order::kTransposed>(plan.head_size, last - first, product);
        });
    }
    finish_keys(plan, kv_head, start, first, last, scratch.all);
}

// Scores of tokens start + [first, last) for the rows of one kv head.
inline void score_head(const xquant_plan& plan, const ExactTokens& exact, int64_t kv_head, int64_t rows, int64_t start,
                       int64_t first, int64_t last, const SharedScratch& shared, const Scratch& scratch) {
    Product product;
    product.lda = scratch.query_width;
    product.ldb = kTile;
    product.c = scratch.weights + first;
    product.ldc = kTile;
    if (plan.key_absorbed) {
        for_bands(plan.key, 0, [&](const Band& band) {
            product.depth = band.channels;
            product.a = scratch.query + band.row;
            product.b = shared.channels + band.row * kTile + first;
            product.accumulate = band.row > 0;
            gemm<Order::kPlain>(rows, last - first, product);
        });
        return;
    }
    const int64_t from = exact.first_of(start, first, last);
    if (from > first) make_keys(plan, kv_head, start, first, round_up(from, kStrip), shared);
    if (from < last) exact.load_keys(kv_head, start, from, last, scratch.keys);
    product.depth = plan.head_size;
    product.a = scratch.query;
    product.b = scratch.keys + first;
    product.accumulate = false;
    gemm<Order::kPlain>(rows, last - first, product);
}

// Add the value latents of tokens start + [first, last), times their weights, for all rows; `loaded` says that
// scratch.latents has them.
inline void accumulate_shared(const xquant_plan& plan, const Pages& pages, int64_t rows, int64_t start, int64_t first,
                              int64_t last, bool loaded, const State& state, const SharedScratch& scratch) {
    Product product;
    product.depth = last - first;
    product.a = scratch.all.weights + first;
    product.lda = kTile;
    product.ldb = scratch.stride;
    product.ldc = round_up(plan.value.width, kPad);
    product.accumulate = true;
    for_bands(plan.value, 0, [&](const Band& band) {
        if (kIntegers && values_in_integers(plan, 0, band)) {
            accumulate_integer_values(plan, pages, 0, rows, start, first, last, band, state, scratch.all);
            return;
        }
        if (!loaded) {
            load_latents(plan, pages, plan.value, 0, start, first, last, band, scratch.all.strip,
                         scratch.latents + band.row, scratch.stride);
        }
        product.b = scratch.latents + first * scratch.stride + band.row;
        product.c = state.accumulator + band.row;
        gemm_tall(rows, round_up(band.channels, kPad), product);
    });
}

inline bool attend_shared_stretch(const xquant_plan& plan, const xquant_attention_call& call, const Task& task,
                                  int64_t stretch, const State& state, float* memory) {
    const int64_t rows = task.query_count * group_of(plan), heads = task.kv_heads;
    const SharedScratch scratch(plan, rows * heads, memory);
    const Pages pages{plan, call, call.block_table + task.sequence * call.block_table_stride};
    const Context context(task, stretch);
    const ExactTokens exact(plan, call, task);
    // Only sums are weighed in FP32, see accumulate_shared; what has one term is not kept for this.
    const bool keep = keys_in_bytes(plan) && plan.key.num_terms > 1 && same_latents(plan.key, plan.value);
    for (int64_t i = 0; i < heads; ++i) {
        load_queries(plan, call, task_of_head(task, i), rows, scratch.of_head(i, rows));
    }
    clear(plan, rows * heads, state);
    if (!pages.have(context.begin, context.end)) return false;
    configure_tiles_for(rows * heads);  // whose values they weigh
    context.for_tiles([&](int64_t start, int64_t first, int64_t last) {
        const int64_t next = start + kTile, after = next + kTile;
        pages.prefetch_tile(task.kv_head, next, after < task.end ? after : task.end);
        const int64_t first_column = first / kStrip * kStrip, last_column = round_up(last, kStrip);
        const int64_t from = exact.first_of(start, first, last);
        if (from > first) load_for_keys(plan, pages, start, first, from, keep, scratch);
        for (int64_t i = 0; i < heads; ++i) {
            const Scratch one = scratch.of_head(i, rows);
            score_head(plan, exact, task.kv_head + i, rows, start, first_column, last_column, scratch, one);
            weigh(plan, task, rows, start, first_column, last_column, state_of_head(plan, state, i, rows), one);
        }
        if (from > first) {
            accumulate_shared(plan, pages, rows * heads, start, first, from, keep, state, scratch);
        }
        for (int64_t i = 0; from < last && i < heads; ++i) {
            exact.accumulate_values(task.kv_head + i, rows, start, from, last, state_of_head(plan, state, i, rows),
                                    scratch.of_head(i, rows));
        }
    });
    release_tiles();
    return true;
}

}  // namespace
}  // namespace xquant
