// From pages to shared memory: the bytes of a tile, copied while the tile before is worked on.
#ifndef XQUANT_CUDA_DECODE_STAGE_H
#define XQUANT_CUDA_DECODE_STAGE_H

#include "common/copy.h"
#include "decode/shape.h"

namespace xquant::decode {

// Whether a warp's strip of the tile holds a token that is seen. Of others nothing may be read: their blocks may be
// freed, or not there.
XQUANT_DEVICE bool strip_is_seen(const Share& share, int start) {
    return start + kStrip > share.oldest && start < share.end;
}

// The block that a warp's strip of the tile lies in.
XQUANT_DEVICE int find_block(const Params& params, const Share& share, int tile_start, int warp) {
    const int start = tile_start + warp * kStrip;
    if (!strip_is_seen(share, start)) return 0;
    return params.call.block_table[share.sequence * params.call.table_stride + start / params.plan.block_size];
}

// Copy cosines and sines of the tile's first position, a warp's part of them.
template <int HeadSize>
XQUANT_DEVICE void copy_rope_base(const Params& params, unsigned char* stage, const StageLayout& layout, int tile_start,
                                  int warp, int lane) {
    constexpr int kCopies = HeadSize * static_cast<int>(sizeof(float)) / 16 / kWarps;
    const auto* of_tile = reinterpret_cast<const unsigned char*>(
        params.plan.rope_base + static_cast<int64_t>(tile_start / kTokens) * HeadSize);
    const int at = (warp * kCopies + lane) * 16;
    if (lane < kCopies) copy_16(stage + layout.rope + at, of_tile + at);
}

// Copy a warp's strip of the tile. Section i of the small ones is, in this order, the keys' scales and zero points,
// the values', the keys' outlier channels.
XQUANT_DEVICE void copy_strip(const Params& params, const Share& share, const xquant_cuda_latent& key,
                              const xquant_cuda_latent& value, unsigned char* stage, const StageLayout& layout,
                              int tile_start, int block, int warp, int lane) {
    const int start = tile_start + warp * kStrip;
    if (!strip_is_seen(share, start)) return;
    const int block_size = params.plan.block_size;
    const int slot = start % block_size;
    const uint8_t* page = params.call.pages + block * params.call.page_stride;
    // 16 tokens of r bytes are r copies of 16 bytes.
    const uint8_t* key_codes = page + key.codes + slot * key.row_bytes;
    for (int i = lane; i < key.row_bytes; i += kWarp) {
        copy_16(stage + (warp * key.row_bytes + i) * 16, key_codes + i * 16);
    }
    const uint8_t* value_codes = page + value.codes + slot * value.row_bytes;
    for (int i = lane; i < value.row_bytes; i += kWarp) {
        copy_16(stage + layout.values + (warp * value.row_bytes + i) * 16, value_codes + i * 16);
    }
    const int section = lane / 2, part = lane % 2;
    const bool of_key = section < 2 || section >= 4;
    const bool bytes = of_key ? params.plan.key_allocated : params.plan.value_allocated;
    if (section >= 4 + key.num_outliers || (bytes && (section % 2 != 0 || part != 0))) return;
    int offset = section == 0 ? key.scales : section == 1 ? key.zeros : section == 2 ? value.scales : value.zeros;
    if (section >= 4) offset = key.outliers + (section - 4) * block_size * 2;
    const int width = bytes ? 1 : 2;
    copy_16(stage + layout.small + section * kSmallBytes + warp * kStrip * width + part * 16,
            page + offset + slot * width + part * 16);
}

}  // namespace xquant::decode

#endif
