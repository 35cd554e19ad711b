// Keys by tiles: the sums of integer.h and byte_keys.h, to the bit, for processors with AMX. The up-projection is the left tile, [16 channels
// of a key][64 of a latent], codes the right one, [16 quads of channels][16 tokens].
#pragma once

#include <stdint.h>
#include <string.h>

#include "api.h"
#include "attention/integer.h"
#include "common/layout.h"
#include "common/simd.h"
#include "kernels.h"
#include "tiles/registers.h"

namespace xquant {
namespace {

#if defined(XQUANT_TILES)
// kStrips strips of 16 tokens, from `column` on. `up` are `chunks` of 64 channels, [head_size rounded up to 16][64] each.
// Rows of codes behind the last channel belong to others and are multiplied by 0.
template <int kStrips>
inline void tile_products(const int8_t* up, int64_t chunks, const int32_t* codes, int64_t head_size, int64_t column,
                          int32_t* products) {
    constexpr int64_t kStride = kTile * 4;
    const int64_t rows = round_up(head_size, kTileRows);
    for (int64_t row = 0; row < rows; row += kTileRows) {
        zero_tile<kSumTile>();
        if (kStrips > 1) zero_tile<kOtherSumTile>();
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            load_tile<kLeftTile>(up + (chunk * rows + row) * kTileBytes, kTileBytes);
            if (row == 0 || chunks > 1) {  // else they are there
                const int32_t* right = codes + chunk * kTileRows * kTile + column;
                load_tile<kRightTile>(right, kStride);
                if (kStrips > 1) load_tile<kOtherRightTile>(right + kLanes, kStride);
            }
            multiply_bytes<kSumTile, kLeftTile, kRightTile>();
            if (kStrips > 1) multiply_bytes<kOtherSumTile, kLeftTile, kOtherRightTile>();
        }
        store_tile<kSumTile>(products + row * kTile + column, kStride);
        if (kStrips > 1) store_tile<kOtherSumTile>(products + row * kTile + column + kLanes, kStride);
    }
}

template <int kVectors>
inline void tile_columns(const ScaleGroup& scale_group, const Finish& finish, int64_t head_size, int64_t column,
                         float* keys, int32_t* products) {
    const int64_t chunks = (scale_group.quads + kTileRows - 1) / kTileRows;
    tile_products<kVectors>(scale_group.tiles, chunks, scale_group.codes, head_size, column, products);
    for_rows(finish, head_size, [&](const Rows& rows, int64_t pair, auto turned) {
        const auto sum = [&](int i, int j) {
            const int64_t row = turned.value && i >= 4 ? rows.first + rows.apart + i - 4 : rows.first + i;
            vi x;
            memcpy(&x, products + row * kTile + column + j * kLanes, sizeof x);
            return x;
        };
        finish_block<8, kVectors, turned.value>(scale_group, finish, head_size, rows, pair, column, sum, keys);
    });
}

// As integer_keys, of a scale group with tiles.
inline void tile_keys(const ScaleGroup& scale_group, const Finish& finish, int64_t head_size, int64_t first, int64_t last,
                      float* keys, int32_t* products) {
    int64_t column = first;
    for (; column + 2 * kLanes <= last; column += 2 * kLanes) {
        tile_columns<2>(scale_group, finish, head_size, column, keys, products);
    }
    for (; column < last; column += kLanes) tile_columns<1>(scale_group, finish, head_size, column, keys, products);
}

// As byte_keys, of columns [first, last), which are multiples of 16.
inline void tile_byte_keys(const xquant_plan& plan, int64_t kv_head, const int32_t* quads, const float* scales,
                           int64_t first, int64_t last, float* keys, int32_t* products) {
    const int64_t head_size = plan.head_size, chunks = (plan.key.width + kTileBytes - 1) / kTileBytes;
    const int8_t* up = plan.key_byte_tiles + kv_head * chunks * round_up(head_size, kTileRows) * kTileBytes;
    int64_t column = first;
    for (; column + 2 * kLanes <= last; column += 2 * kLanes) {
        tile_products<2>(up, chunks, quads, head_size, column, products);
    }
    if (column < last) tile_products<1>(up, chunks, quads, head_size, column, products);
    for (int64_t row = 0; row < head_size; ++row) {
        const int64_t index = kv_head * head_size + row;
        const int32_t offset = plan.key_byte_offsets[index];
        const float unit = plan.key_byte_units[index];
        for (int64_t j = first; j < last; j += kLanes) {
            vi sum;
            memcpy(&sum, products + row * kTile + j, sizeof sum);
            store(keys + row * kTile + j, to_float(sum + offset) * (load(scales + j) * unit));
        }
    }
}
#endif

}  // namespace
}  // namespace xquant
