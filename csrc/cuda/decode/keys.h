// Rematerialized keys of a tile and their products with the queries. Keys stay in registers.
#ifndef XQUANT_CUDA_DECODE_KEYS_H
#define XQUANT_CUDA_DECODE_KEYS_H

#include "decode/product.h"
#include "decode/shape.h"

namespace xquant::decode {

// What a thread keeps in registers from the first tile to the last: its warp's columns of the up-projection and of the
// queries, as second operands of products. Columns come in four tiles of 8: two of the first half, then their partners.
template <int HeadSize, int K>
struct KeyOperands {
    static constexpr int kSteps = HeadSize / Unpacked<K>::kStepChannels;  // of a product over all channels
    uint32_t up[kSteps][4][2];
    uint32_t query[2][2][2];  // tile of 8 query rows, half
};

// The query rows' columns of the halves, zeros in rows that are not there.
template <int HeadSize, int K>
XQUANT_DEVICE void load_queries(KeyOperands<HeadSize, K>& operands, const Params& params, const Share& share, int warp,
                                int lane) {
    const int group = params.plan.num_heads / params.plan.num_kv_heads;
    const int first_column = warp % Shape<HeadSize>::kColumnWarps * 16 + 2 * (lane % 4);
    const auto* query = static_cast<const uint16_t*>(params.call.query);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
        const int row = tile * 8 + lane / 4;
        const uint16_t* of_row = query + (share.first_query + row / group) * params.call.query_token_stride +
                                 (share.head * group + row % group) * params.call.query_head_stride;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const int32_t* columns = params.plan.columns + half * Shape<HeadSize>::kHalf + first_column + 8 * part;
                operands.query[tile][half][part] =
                    row < share.rows ? of_row[columns[0]] | static_cast<uint32_t>(of_row[columns[1]]) << 16 : 0;
            }
        }
    }
}

template <int HeadSize, int K>
XQUANT_DEVICE void load_key_operands(KeyOperands<HeadSize, K>& operands, const Params& params, const Share& share,
                                     int steps, int warp, int lane) {
    using S = Shape<HeadSize>;
    constexpr int kSteps = KeyOperands<HeadSize, K>::kSteps;
    const int column_warp = warp % S::kColumnWarps;
    // [num_kv_heads, kSteps, kColumnWarps, 4, 32, 2]
    const auto* up = reinterpret_cast<const uint2*>(params.plan.up_key) +
                     ((share.head * kSteps * S::kColumnWarps + column_warp) * 4) * kWarp + lane;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        if (step < steps) {
#pragma unroll
            for (int tile = 0; tile < 4; ++tile) {
                const uint2 pair = up[(step * S::kColumnWarps * 4 + tile) * kWarp];
                operands.up[step][tile][0] = pair.x;
                operands.up[step][tile][1] = pair.y;
            }
        }
    }
    load_queries<HeadSize>(operands, params, share, warp, lane);
}

// Keys from products of codes: scales, zero points, outliers, bias. `column` is the first of a tile of 8.
template <int HeadSize, int K>
XQUANT_DEVICE void finish_products(float (&key)[4], const typename Product<K>::Sum (&sum)[4],
                                   const Shared<HeadSize>& shared, int outliers, int token, int column) {
    const float scale[2] = {shared.key_scale[token], shared.key_scale[token + 8]};
    const float zero[2] = {shared.key_zero[token], shared.key_zero[token + 8]};
    const float2 unit = *reinterpret_cast<const float2*>(&shared.key_rows[kUnitRow][column]);
    const float2 of_zero = *reinterpret_cast<const float2*>(&shared.key_rows[kZeroRow][column]);
    const float2 bias = *reinterpret_cast<const float2*>(&shared.key_rows[kBiasRow][column]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        key[2 * i] = Product<K>::value(sum[2 * i]) * (scale[i] * unit.x) + (zero[i] * of_zero.x + bias.x);
        key[2 * i + 1] = Product<K>::value(sum[2 * i + 1]) * (scale[i] * unit.y) + (zero[i] * of_zero.y + bias.y);
    }
    for (int channel = 0; channel < outliers; ++channel) {
        const float2 up = *reinterpret_cast<const float2*>(&shared.key_rows[kOutlierRow + channel][column]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float exact = shared.outliers[channel][token + 8 * i];
            key[2 * i] += exact * up.x;
            key[2 * i + 1] += exact * up.y;
        }
    }
}

// RoPE of a tile of 8 columns and its partners. The angle is that of the tile's first position and that of the token's
// distance from it, whose cosines and sines are the same in every tile. `base` is [HeadSize / 2, 2].
template <int HeadSize>
XQUANT_DEVICE void rotate(float (&low)[4], float (&high)[4], const Shared<HeadSize>& shared, const float* base,
                          int token, int column) {
    const float4 two = *reinterpret_cast<const float4*>(base + 2 * column);
    const float base_cosine[2] = {two.x, two.z}, base_sine[2] = {two.y, two.w};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint2 offsets = *reinterpret_cast<const uint2*>(
            &shared.rope[(token + 8 * i) * Shape<HeadSize>::kRopePitch + column]);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float2 offset = unpack_fp16(j == 0 ? offsets.x : offsets.y);
            const float cosine = base_cosine[j] * offset.x - base_sine[j] * offset.y;
            const float sine = base_sine[j] * offset.x + base_cosine[j] * offset.y;
            const float first = low[2 * i + j], second = high[2 * i + j];
            low[2 * i + j] = first * cosine - second * sine;
            high[2 * i + j] = second * cosine + first * sine;
        }
    }
}

// Products of the tile's keys with the queries, over the warp's columns.
template <int HeadSize, int T, int K>
XQUANT_DEVICE void score_keys(const Scores<HeadSize>& all_scores, const Shared<HeadSize>& shared,
                              const KeyOperands<HeadSize, K>& operands, const float* base, int row_tiles, int warp,
                              int lane) {
    using S = Shape<HeadSize>;
    using P = Product<K>;
    const int column_warp = warp % S::kColumnWarps, token_warp = warp / S::kColumnWarps;
    const int column = column_warp * 16 + 2 * (lane % 4);
    const int steps = shared.key.vectors / 2, outliers = shared.key.num_outliers;
    float* scores = all_scores.data + column_warp * all_scores.of_warp;
    // Unrolled, the tiles' operands would not fit the registers.
#pragma unroll 1
    for (int tile = 0; tile < S::kTokenTiles; ++tile) {
        const int first = (token_warp * S::kTokenTiles + tile) * 16;
        const unsigned char* codes =
            shared.codes + (first + lane % 16) * S::template kCodePitch<K> + lane / 16 * 16;
        typename P::Sum sum[4][4];
#pragma unroll
        for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] = P::kZero;
#pragma unroll
        for (int step = 0; step < KeyOperands<HeadSize, K>::kSteps; ++step) {
            if (step < steps) {
                uint32_t of_step[4];
                load_matrices(of_step, codes + step * 32);
#pragma unroll
                for (int part = 0; part < 4; ++part) P::add(sum[part], of_step, operands.up[step][part]);
            }
        }
        const int token = first + lane / 4;
        float key[4][4];
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            const int of_part = column + part % 2 * 8 + part / 2 * S::kHalf;
            finish_products<HeadSize, K>(key[part], sum[part], shared, outliers, token, of_part);
        }
        rotate<HeadSize>(key[0], key[2], shared, base, token, column);
        rotate<HeadSize>(key[1], key[3], shared, base, token, column + 8);
        // The result of a product is laid out as a first operand: tokens times queries, no lane needs another's.
        uint32_t halves[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const float(&of_part)[4] = key[2 * half + part];
                halves[half][2 * part] = pack<T>(of_part[0], of_part[1]);
                halves[half][2 * part + 1] = pack<T>(of_part[2], of_part[3]);
            }
        }
#pragma unroll
        for (int rows = 0; rows < 2; ++rows) {
            if (rows < row_tiles) {
                float product[4] = {};
                mma_16816<T>(product, halves[0], operands.query[rows][0]);
                mma_16816<T>(product, halves[1], operands.query[rows][1]);
                const int row = rows * 8 + 2 * (lane % 4);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    scores[(row + i % 2) * S::kScorePitch + token + i / 2 * 8] = product[i];
                }
            }
        }
    }
}

}  // namespace xquant::decode

#endif
