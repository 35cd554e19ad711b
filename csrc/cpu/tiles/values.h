// Weighed sums of value latents by tiles: what integer_values.h computes, to the bit, for processors with AMX. Weights are
// the left tile, [rows][64 tokens], codes the right one, [16 quads of tokens][16 channels].
#pragma once

#include <stdint.h>

#include "attention/value_quads.h"
#include "common/simd.h"
#include "kernels.h"
#include "tiles/registers.h"

namespace xquant {
namespace {

#if defined(XQUANT_TILES)
static_assert(kTile == kTileBytes, "a row of weights fills a row of a tile");

// kRows rows or, those that are left, as many as the tiles of the task have; `products` has room for two tiles.
template <int kHigh, int kLow, int kWeights>
inline void tile_values_block(const IntegerWeights& p, int64_t row, int64_t rows, int64_t channels, int32_t* products) {
    const int8_t* weights = p.weights + row * kWeightBytes;
    int32_t* low_products = products + kTileRows * kLanes;
    for (int64_t at = 0; at < channels; at += kLanes) {
        load_tile<kRightTile>(p.codes + at, p.stride * 4);
        zero_tile<kHigh>();
        load_tile<kWeights>(weights, kWeightBytes);
        multiply_bytes<kHigh, kWeights, kRightTile>();
        zero_tile<kLow>();
        load_tile<kWeights>(weights + kTile, kWeightBytes);
        multiply_bytes<kLow, kWeights, kRightTile>();
        store_tile<kHigh>(products, kTileBytes);
        store_tile<kLow>(low_products, kTileBytes);
        const vf step = step_of(p, at), zero = zero_of(p, at);
        for (int64_t i = 0; i < rows; ++i) {
            vi high, low;
            memcpy(&high, products + i * kLanes, sizeof high);
            memcpy(&low, low_products + i * kLanes, sizeof low);
            add_integers(p, row + i, at, high, low, step, zero);
        }
    }
}

// As integer_values. Rows of codes that no token has filled are multiplied by weights of 0.
inline void tile_values(const IntegerWeights& p, int64_t rows, int64_t channels, int32_t* products) {
    int64_t row = 0;
    for (; row + kTileRows <= rows; row += kTileRows) {
        tile_values_block<kSumTile, kOtherSumTile, kLeftTile>(p, row, kTileRows, channels, products);
    }
    if (row < rows) {
        tile_values_block<kLastSumTile, kLastOtherSumTile, kLastLeftTile>(p, row, rows - row, channels, products);
    }
}
#endif

}  // namespace
}  // namespace xquant
