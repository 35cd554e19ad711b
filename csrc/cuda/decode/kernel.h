// The decode kernel: a block of 4 warps has one sequence, one kv head and one split.
//
// Per tile of 64 cached tokens, with a barrier between the steps:
//
//     wait for the tile's bytes, start to copy the next tile's
//     unpack key codes; scales
//     keys = codes x up-projection, RoPE, products with the queries    (registers; a warp has 32 columns of the keys)
//     softmax of the products; unpack value codes
//     sums = sums + weights x codes                                    (registers; a warp has its channels)
#ifndef XQUANT_CUDA_DECODE_KERNEL_H
#define XQUANT_CUDA_DECODE_KERNEL_H

#include "decode/keys.h"
#include "decode/softmax.h"
#include "decode/stage.h"
#include "decode/unpack.h"
#include "decode/values.h"

namespace xquant::decode {

// Say that this split has nothing.
XQUANT_DEVICE void write_nothing(const Params& params, const Share& share, int thread) {
    const int group = params.plan.num_heads / params.plan.num_kv_heads;
    if (thread < share.rows) {
        const int64_t token = share.first_query + thread / group;
        const int64_t at =
            (token * params.plan.num_heads + share.head * group + thread % group) * params.call.splits + share.split;
        params.call.stats[at * 3] = -INFINITY;
    }
}

// Tables that all tiles read.
template <int HeadSize>
XQUANT_DEVICE void load_tables(Shared<HeadSize>& shared, const Params& params, int head, int thread) {
    using S = Shape<HeadSize>;
    const auto& plan = params.plan;
    for (int i = thread; i < S::kQuads; i += kThreads) {
        const int at = head * S::kQuads + i;
        shared.key_quads[i] = reinterpret_cast<const uint4*>(plan.key_quads)[at];
        shared.value_quads[i] = reinterpret_cast<const uint4*>(plan.value_quads)[at];
        shared.key_masks[i] = plan.key_masks[at];
        shared.value_masks[i] = plan.value_masks[at];
    }
    constexpr int kOfHead = kKeyRows * HeadSize;
    for (int i = thread; i < kOfHead; i += kThreads) (&shared.key_rows[0][0])[i] = plan.key_rows[head * kOfHead + i];
    for (int i = thread; i < kTokens * S::kHalf; i += kThreads) {
        shared.rope[i / S::kHalf * S::kRopePitch + i % S::kHalf] = plan.rope_offset[i];
    }
    // Rows that are never written count nothing.
    for (int i = thread; i < kRows * S::kWeightPitch; i += kThreads) shared.weights[i] = 0;
    if (thread < kRows) shared.decay[thread] = 0;
    if (thread == 0) {
        shared.key = plan.key[head];
        shared.value = plan.value[head];
    }
}

// T is the type of queries and of keys when these meet, K that of the product that rematerializes keys.
template <int HeadSize, int T, int K>
__global__ void __launch_bounds__(kThreads, 3) decode_kernel(const Params params) {
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
    const Share share = find_share(params);
    if (share.rows <= 0) return;
    if (share.begin >= share.stop) {
        write_nothing(params, share, thread);
        return;
    }
    auto& shared = *reinterpret_cast<Shared<HeadSize>*>(shared_memory());
    unsigned char* stages = shared_memory() + sizeof(Shared<HeadSize>);
    const StageLayout layout = stage_layout(params.plan.key_row_bytes, params.plan.value_row_bytes, HeadSize);
    const int row_tiles = params.call.row_tiles;
    const Scores<HeadSize> scores = find_scores<HeadSize>(stages, layout.bytes, row_tiles);
    load_tables<HeadSize>(shared, params, share.head, thread);
    __syncthreads();

    // A block id is read one tile ahead of the copy that needs it.
    copy_rope_base<HeadSize>(params, stages, layout, share.begin, warp, lane);
    copy_strip(params, share, shared.key, shared.value, stages, layout, share.begin,
               find_block(params, share, share.begin, warp), warp, lane);
    end_copy_group();
    int block = find_block(params, share, share.begin + kTokens, warp);
    KeyOperands<HeadSize, K> operands;
    load_key_operands<HeadSize, K>(operands, params, share, shared.key.vectors / 2, warp, lane);
    RowState state;
    ValueSums<HeadSize> sums;

    int parity = 0;
    for (int start = share.begin; start < share.stop; start += kTokens, parity ^= 1) {
        const unsigned char* stage = stages + parity * layout.bytes;
        wait_for_copies<0>();
        __syncthreads();
        const int next = start + kTokens;
        if (next < share.stop) {
            unsigned char* other = stages + (parity ^ 1) * layout.bytes;
            copy_rope_base<HeadSize>(params, other, layout, next, warp, lane);
            copy_strip(params, share, shared.key, shared.value, other, layout, next, block, warp, lane);
            block = find_block(params, share, next + kTokens, warp);
        }
        end_copy_group();
        unpack_scales<HeadSize>(shared, params, share, stage + layout.small, start, thread);
        unpack_codes<HeadSize, K>(shared.codes, stage, shared.key, shared.key_quads, shared.key_masks, thread);
        __syncthreads();
        score_keys<HeadSize, T, K>(scores, shared, operands, reinterpret_cast<const float*>(stage + layout.rope),
                                   row_tiles, warp, lane);
        __syncthreads();
        unpack_codes<HeadSize, kFp16>(shared.codes, stage + layout.values, shared.value, shared.value_quads,
                                      shared.value_masks, thread);
        if (thread < row_tiles * 8 * kRowLanes) weigh<HeadSize>(state, shared, scores, params, share, start, thread);
        __syncthreads();
        add_values<HeadSize>(sums, shared, warp, lane);
    }
    write_partial<HeadSize>(sums, state, shared, params, share, thread);
}

}  // namespace xquant::decode

#endif
