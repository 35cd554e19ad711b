// Sizes of the decode kernel, and where things lie in its shared memory.
#ifndef XQUANT_CUDA_DECODE_SHAPE_H
#define XQUANT_CUDA_DECODE_SHAPE_H

#include "common/numbers.h"
#include "decode/decode.h"

namespace xquant::decode {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
// Cached tokens of a tile. A warp copies 16 of them, a *strip*: block sizes are multiples of 16, so these lie in one page, and
// their codes and scales start and end at multiples of 16 bytes.
constexpr int kTokens = 64;
constexpr int kStrip = kTokens / kWarps;
constexpr int kRows = 16;
constexpr int kMostOutliers = 4;
// Rows of a column: what products count, what zero points, 1 and outliers are multiplied by.
constexpr int kUnitRow = 0, kZeroRow = 1, kBiasRow = 2, kOutlierRow = 3;
constexpr int kKeyRows = kOutlierRow + kMostOutliers;
// Scales and zero points of keys and values, and the keys' outliers.
constexpr int kSmallSections = 4 + kMostOutliers;
constexpr int kSmallBytes = kTokens * 2;
constexpr int kStages = 2;

struct Params {
    xquant_cuda_decode_plan plan;
    xquant_cuda_decode_call call;
};

// What codes are unpacked to, FP16 numbers or bytes. A vector is 16 bytes of them; a step of a product takes two.
template <int K>
struct Unpacked {
    static constexpr int kBytes = K == kInt8 ? 1 : 2;
    static constexpr int kVectorQuads = 4 / kBytes;
    static constexpr int kStepChannels = 32 / kBytes;
};

template <int HeadSize>
struct Shape {
    static constexpr int kHalf = HeadSize / 2;
    // Warps share the columns of a key: each has 16 of the first half and the 16 that they pair with under RoPE, so
    // that a rotation needs no other lane. Warps that are left share the tokens.
    static constexpr int kColumnWarps = kHalf / 16;
    static constexpr int kTokenWarps = kWarps / kColumnWarps;
    static constexpr int kTokenTiles = kTokens / 16 / kTokenWarps;
    static constexpr int kQuads = HeadSize / 4;
    // 16 channels each; of a warp.
    static constexpr int kValuePairs = HeadSize / 16 / kWarps;
    // Rows that are read by ldmatrix lie 16 bytes further in the banks than the row before.
    template <int K>
    static constexpr int kCodePitch = HeadSize * Unpacked<K>::kBytes + 16;  // in bytes
    static constexpr int kWeightPitch = kTokens + 8;
    static constexpr int kRopePitch = kHalf + 8;
    static constexpr int kScorePitch = kTokens + 4;
    static constexpr int kOutputPitch = HeadSize + 4;
};

// What is copied for a tile: codes of keys, codes of values (16 bytes behind them are read, not used), small sections,
// cosines and sines of its first position.
struct StageLayout {
    int values;
    int small;
    int rope;
    int bytes;
};

inline
#ifndef XQUANT_EMULATION
    __host__ __device__
#endif
    StageLayout
    stage_layout(int key_row_bytes, int value_row_bytes, int head_size) {
    StageLayout layout;
    layout.values = kTokens * key_row_bytes + 16;
    layout.small = layout.values + kTokens * value_row_bytes + 16;
    layout.rope = layout.small + kSmallSections * kSmallBytes;
    layout.bytes = layout.rope + head_size * static_cast<int>(sizeof(float));
    return layout;
}

// Everything else in shared memory, in front of the stages; behind them are the scores.
template <int HeadSize>
struct Shared {
    using S = Shape<HeadSize>;
    // Of keys, then of values; at last the output.
    alignas(16) unsigned char codes[kTokens * S::template kCodePitch<kFp16>];
    uint16_t weights[kRows * S::kWeightPitch];
    uint32_t rope[kTokens * S::kRopePitch];
    uint4 key_quads[S::kQuads];
    uint4 value_quads[S::kQuads];
    uint32_t key_masks[S::kQuads];
    uint32_t value_masks[S::kQuads];
    float key_rows[kKeyRows][HeadSize];
    float key_scale[kTokens], key_zero[kTokens];
    float value_scale[kTokens], value_zero[kTokens];
    float outliers[kMostOutliers][kTokens];
    float decay[kRows];
    float weighed[kRows];  // sums of weights times scales
    xquant_cuda_latent key, value;
    float largest_scale;  // of the values of the tile; weights times scales are relative to it
    float padding[3];
};

// Products of queries with the columns that a warp has, [kColumnWarps][row_tiles * 8][kScorePitch]. Calls with few rows
// take less, so that more blocks fit a multiprocessor.
template <int HeadSize>
struct Scores {
    float* data;
    int of_warp;
};

template <int HeadSize>
XQUANT_DEVICE Scores<HeadSize> find_scores(unsigned char* stages, int stage_bytes, int row_tiles) {
    return {reinterpret_cast<float*>(stages + kStages * stage_bytes), row_tiles * 8 * Shape<HeadSize>::kScorePitch};
}

template <int HeadSize>
size_t shared_bytes(const xquant_cuda_decode_plan& plan, int row_tiles) {
    using S = Shape<HeadSize>;
    const auto stage = static_cast<size_t>(stage_layout(plan.key_row_bytes, plan.value_row_bytes, HeadSize).bytes);
    const auto scores = static_cast<size_t>(S::kColumnWarps * row_tiles * 8 * S::kScorePitch) * sizeof(float);
    return sizeof(Shared<HeadSize>) + kStages * stage + scores;
}

// The share of a block, which is one sequence, one kv head and one split.
struct Share {
    int sequence, head, split;
    int first_query;    // row of the query tensor
    int rows;           // query tokens times query heads of the kv head
    int past;           // cached tokens before the first query token
    int oldest;         // the first token that any query sees
    int end;            // behind the last
    int begin, stop;    // of the split: multiples of kTokens; stop may be behind the end
};

XQUANT_DEVICE Share find_share(const Params& params) {
    const auto& call = params.call;
    Share share;
    share.sequence = static_cast<int>(blockIdx.x);
    share.head = static_cast<int>(blockIdx.y);
    share.split = static_cast<int>(blockIdx.z);
    share.first_query = call.query_start_loc[share.sequence];
    const int query_len = call.query_start_loc[share.sequence + 1] - share.first_query;
    // The caller sees to it that there are no more; that no memory is spoilt is seen to here.
    share.rows = min(query_len * (params.plan.num_heads / params.plan.num_kv_heads), kRows);
    share.end = call.seq_lens[share.sequence];
    share.past = share.end - query_len;
    share.oldest = 0;
    if (params.plan.window > 0 && share.past - params.plan.window + 1 > 0) {
        share.oldest = share.past - params.plan.window + 1;
    }
    const int first_tile = share.oldest / kTokens;
    const int tiles = (share.end + kTokens - 1) / kTokens - first_tile;
    const int of_split = (tiles + call.splits - 1) / call.splits;
    const int last_tile = min(first_tile + tiles, first_tile + (share.split + 1) * of_split);
    share.begin = (first_tile + share.split * of_split) * kTokens;
    share.stop = last_tile * kTokens;
    return share;
}

}  // namespace xquant::decode

#endif
