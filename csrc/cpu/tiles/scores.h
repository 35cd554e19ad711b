// Scores by tiles, for BF16 models: queries are BF16, keys are rounded to it as in a 16-bit cache, sums are FP32. Queries
// are the left tile, [rows][32 channels], keys the right one, [16 pairs of channels][16 tokens]; the scale follows.
#pragma once

#include <stdint.h>
#include <string.h>

#include "api.h"
#include "attention/tile.h"
#include "common/bfloat.h"
#include "common/convert.h"
#include "common/layout.h"
#include "common/simd.h"
#include "kernels.h"
#include "tiles/registers.h"

namespace xquant {
namespace {

// Whether scores are made here. FP32 and FP16 have bits that BF16 would lose.
inline bool scores_in_tiles(const xquant_plan& plan, const xquant_attention_call& call) {
    return kTiles && !plan.key_absorbed && call.dtype == XQUANT_BF16;
}

#if defined(XQUANT_TILES)
// The queries of a task. Also clears what no key is written to, so that nothing in it is NaN.
inline void load_tile_queries(const xquant_plan& plan, const xquant_attention_call& call, const Task& task, int64_t rows,
                              const Scratch& scratch) {
    const int64_t depth = scratch.tile_depth;
    memset(scratch.tile_query, 0, rows * depth * sizeof(uint16_t));
    for (int64_t row = 0; row < rows; ++row) {
        load_row(call.dtype, call.query,
                 row_element(plan, task, row, call.query_token_stride, call.query_head_stride), plan.head_size,
                 scratch.head);
        for (int64_t i = plan.head_size; i % kLanes; ++i) scratch.head[i] = 0.0f;
        for (int64_t i = 0; i < plan.head_size; i += kLanes) {
            store_bfloats(scratch.tile_query + row * depth + i, load(scratch.head + i));
        }
    }
    const int64_t written = plan.head_size / 2 * kTile;
    memset(scratch.tile_keys + written, 0, (depth / 2 * kTile - written) * sizeof(uint32_t));
}

// Keys [head_size][kTile], columns [first, last), to pairs of BF16.
inline void round_keys(const Scratch& scratch, int64_t head_size, int64_t first, int64_t last) {
    for (int64_t pair = 0; pair < head_size / 2; ++pair) {
        const float* keys = scratch.keys + 2 * pair * kTile;
        uint32_t* to = scratch.tile_keys + pair * kTile;
        for (int64_t j = first; j < last; j += kLanes) {
            const vi two = bfloat_pairs(load(keys + j), load(keys + kTile + j));
            memcpy(to + j, &two, sizeof two);
        }
    }
}

// kStrips strips from `column` on, for the rows of one tile.
template <int kStrips, int kScores, int kOtherScores, int kQuery>
inline void tile_scores_block(const Scratch& scratch, int64_t row, int64_t column) {
    zero_tile<kScores>();
    if (kStrips > 1) zero_tile<kOtherScores>();
    for (int64_t k = 0; k < scratch.tile_depth; k += 2 * kTileRows) {
        load_tile<kQuery>(scratch.tile_query + row * scratch.tile_depth + k, scratch.tile_depth * 2);
        const uint32_t* keys = scratch.tile_keys + k / 2 * kTile + column;
        load_tile<kRightTile>(keys, kTile * 4);
        multiply_bfloats<kScores, kQuery, kRightTile>();
        if (kStrips > 1) {
            load_tile<kOtherRightTile>(keys + kLanes, kTile * 4);
            multiply_bfloats<kOtherScores, kQuery, kOtherRightTile>();
        }
    }
    float* scores = scratch.weights + row * kTile + column;
    store_tile<kScores>(scores, kTile * 4);
    if (kStrips > 1) store_tile<kOtherScores>(scores + kLanes, kTile * 4);
}

template <int kStrips>
inline void tile_scores_columns(const Scratch& scratch, int64_t rows, int64_t column) {
    int64_t row = 0;
    for (; row + kTileRows <= rows; row += kTileRows) {
        tile_scores_block<kStrips, kSumTile, kOtherSumTile, kLeftTile>(scratch, row, column);
    }
    if (row < rows) tile_scores_block<kStrips, kLastSumTile, kLastOtherSumTile, kLastLeftTile>(scratch, row, column);
}

// Scores of columns [first, last), multiples of 16, of rounded keys for all rows.
inline void tile_scores(const xquant_plan& plan, int64_t rows, int64_t first, int64_t last, const Scratch& scratch) {
    int64_t column = first;
    for (; column + 2 * kLanes <= last; column += 2 * kLanes) tile_scores_columns<2>(scratch, rows, column);
    if (column < last) tile_scores_columns<1>(scratch, rows, column);
    for (int64_t row = 0; row < rows; ++row) {
        float* scores = scratch.weights + row * kTile;
        for (int64_t j = first; j < last; j += kLanes) store(scores + j, load(scores + j) * plan.scale);
    }
}
#else
inline void load_tile_queries(const xquant_plan&, const xquant_attention_call&, const Task&, int64_t, const Scratch&) {}
inline void round_keys(const Scratch&, int64_t, int64_t, int64_t) {}
inline void tile_scores(const xquant_plan&, int64_t, int64_t, int64_t, const Scratch&) {}
#endif

}  // namespace
}  // namespace xquant
