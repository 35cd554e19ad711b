// What one task has in flight, and where the pages of its sequence are.
#pragma once

#include <stdint.h>

#include "api.h"
#include "common/layout.h"
#include "kernels.h"
#include "tiles/registers.h"
#include "unpack/unpack_allocated.h"

namespace xquant {
namespace {

struct Scratch {
    float* query;        // [rows][query_width], times the scale
    float* latents;      // [channels of a band][kTile], or pairs of their codes
    float* scales;       // [kTile] of a scale group
    float* zeros;        // [kTile] of a scale group
    float* outliers;     // [outlier channels][kTile]
    float* keys;         // [head_size][kTile]
    float* weights;      // [rows][kTile]
    int8_t* integers;    // [rows][2][kTile], weights: high parts, low parts
    float* units;        // [rows], what 1 of these integers stands for
    float* sums;         // [rows]
    float* values;       // [kTile][value_stride]
    StripScratch strip;  // for a band of keys or of values
    float* head;         // [head_size], of a query to be absorbed or rounded
    // With tiles only.
    float* products = nullptr;        // [head_size rounded up to 16][kTile] INT32
    uint16_t* tile_query = nullptr;   // [rows][tile_depth] BF16, without the scale
    uint32_t* tile_keys = nullptr;    // [tile_depth / 2][kTile], two channels' BF16
    int64_t tile_depth;               // head_size rounded up to 32
    int64_t query_width;
    int64_t value_stride;
    int64_t floats;  // size of all of it

    // Without memory only the size is right.
    Scratch(const xquant_plan& plan, int64_t rows, float* memory) {
        floats = 0;
        const auto take = [this, memory](int64_t count) {
            const int64_t at = floats;
            floats += round_up(count, kPad);
            return memory ? memory + at : nullptr;
        };
        const BandSize keys_at_once(plan.key), values_at_once(plan.value);
        // A row of values has room for unpack_rows to write past its last run.
        value_stride = round_up(values_at_once.channels, kPad) + kPad;
        query_width = round_up(plan.key_absorbed ? plan.key.width : plan.head_size, kPad);
        query = take(rows * query_width);
        // A tile is loaded of 16 rows, whatever channels there are.
        latents = take((keys_at_once.channels + (kTiles ? 16 : 0)) * kTile);
        scales = take(kTile);
        zeros = take(kTile);
        outliers = take(most_outliers(plan.key) * kTile);
        keys = take(plan.head_size * kTile);
        weights = take(rows * kTile);
        integers = (int8_t*)take(rows * (2 * kTile / 4));
        units = take(rows);
        sums = take(rows);
        values = take(kTile * value_stride);
        const auto larger = [](int64_t a, int64_t b) { return a > b ? a : b; };
        strip.bytes = (uint8_t*)take(round_up(larger(keys_at_once.bytes, values_at_once.bytes), 16) * 4 + kPad);
        strip.codes = (uint8_t*)take(round_up(larger(keys_at_once.channels, values_at_once.channels), 16) * 4 + kPad);
        head = take(plan.head_size);
        tile_depth = round_up(plan.head_size, 32);
        if (!kTiles) return;
        products = take(round_up(plan.head_size, 16) * kTile);
        tile_query = (uint16_t*)take(rows * tile_depth / 2);
        tile_keys = (uint32_t*)take(tile_depth / 2 * kTile);
    }
};

inline int64_t group_of(const xquant_plan& plan) { return plan.num_heads / plan.num_kv_heads; }

// Rows are query tokens times the query heads of the kv head.
inline int64_t row_element(const xquant_plan& plan, const Task& task, int64_t row, int64_t token_stride,
                           int64_t head_stride) {
    const int64_t group = group_of(plan);
    return (task.query_begin + row / group) * token_stride + (task.kv_head * group + row % group) * head_stride;
}

// Whether the blocks of positions [begin, end) are some of `num_blocks`.
inline bool have_blocks(const int32_t* blocks, int64_t block_size, int64_t num_blocks, int64_t begin, int64_t end) {
    for (int64_t position = begin; position < end; position = (position / block_size + 1) * block_size) {
        const int64_t block = blocks[position / block_size];
        if (block < 0 || block >= num_blocks) return false;
    }
    return true;
}

// Ask for the cache lines of some bytes; of an address that is not mapped nothing happens.
inline void prefetch(const uint8_t* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at);
}

// Ask for what a strip of a latent head is unpacked from.
inline void prefetch_strip(const HeadView& view, const uint8_t* page, int64_t slot) {
    prefetch(page + view.codes(slot), kStrip * view.head.row_bytes);
    if (view.stream.allocated) {
        __builtin_prefetch(page + view.token_scale(slot));
        return;
    }
    for (int64_t run = 0; run < view.head.num_runs; ++run) {
        __builtin_prefetch(page + view.scale(run, slot));
        __builtin_prefetch(page + view.zero(run, slot));
    }
    for (int64_t channel = 0; channel < view.stream.outlier_channels; ++channel) {
        __builtin_prefetch(page + view.outlier(channel, slot));
    }
}

// Addresses of the strips of 16 slots of one sequence.
struct Pages {
    const xquant_plan& plan;
    const xquant_attention_call& call;
    const int32_t* blocks;

    // Whether there are blocks of tokens [begin, end); asked before any page is read.
    bool have(int64_t begin, int64_t end) const {
        return have_blocks(blocks, plan.block_size, call.num_blocks, begin, end);
    }
    // Of the layer's own pages, or of others that it reads.
    const uint8_t* page(int64_t index, int64_t position) const {
        const xquant_pages& pages = call.pages[index];
        return pages.data + blocks[position / plan.block_size] * pages.stride;
    }
    const uint8_t* page(const xquant_term& term, int64_t position) const { return page(term.page, position); }
    int64_t slot(int64_t position) const { return position % plan.block_size; }

    // Ask for the pages of tokens [begin, end): sections are short and far apart, so the processor does not foresee them.
    void prefetch_tile(int64_t kv_head, int64_t begin, int64_t end) const {
        const auto of = [&](const xquant_latent& latent, int64_t position) {
            for (int64_t i = 0; i < latent.num_terms; ++i) {
                const xquant_term& term = latent.terms[i];
                prefetch_strip(head_view(plan, term, kv_head), page(term, position), slot(position));
            }
        };
        for (int64_t position = begin; position < end; position += kStrip) {
            of(plan.key, position);
            of(plan.value, position);
        }
    }
};

}  // namespace
}  // namespace xquant
