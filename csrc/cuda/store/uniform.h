// A group of a uniform stream, by one warp; see xquant_vllm/codec/quantizer.py, whose codes these are to the bit.
#ifndef XQUANT_CUDA_STORE_UNIFORM_H
#define XQUANT_CUDA_STORE_UNIFORM_H

#include "common/warp.h"
#include "store/slot.h"

namespace xquant::store {

// `value(i)` is the group's channel i; `codes` is [group_size] in shared memory, for this group alone.
template <typename Value>
XQUANT_DEVICE void store_group(const xquant_cuda_store_stream& stream, const Slot& slot, const Value& value,
                               uint8_t* codes, int head, int group, int lane) {
    const int size = stream.group_size, groups = stream.width / size, at = head * groups + group;
    const int group_bytes = size * stream.bits / 8;
    uint8_t* row = slot.page + stream.codes +
                   (static_cast<int64_t>(head * slot.block_size + slot.offset) * groups + group) * group_bytes;
    if (stream.bits == 16) {
        for (int i = lane; i < size; i += kWarp) reinterpret_cast<uint16_t*>(row)[i] = to_fp16_saturated(value(i));
        return;
    }
    const int outliers = group == 0 ? stream.outlier_channels : 0;
    float low = INFINITY, high = -INFINITY;
    bool any_nan = false;
    for (int i = lane; i < size; i += kWarp) {
        const float x = value(i);
        if (i < outliers) {
            write_fp16(slot, stream.outliers, head * stream.outlier_channels + i, to_fp16_saturated(x));
        } else {
            any_nan |= x != x;
            low = fminf(low, x);
            high = fmaxf(high, x);
        }
    }
    low = min_over_lanes<kWarp>(low);
    high = max_over_lanes<kWarp>(high);
    if (__ballot_sync(kEveryLane, any_nan)) low = high = NAN;
    const float levels = static_cast<float>((1 << stream.bits) - 1);
    const uint16_t zero_bits = to_fp16_saturated(low);
    // Codes are computed against what is stored, and by division: a product with an inverse rounds differently.
    const float zero = from_fp16(zero_bits);
    const uint16_t scale_bits = to_fp16_saturated((high - zero) / levels);
    const float step = from_fp16(scale_bits);
    if (lane == 0) {
        write_fp16(slot, stream.zeros, at, zero_bits);
        write_fp16(slot, stream.scales, at, scale_bits);
    }
    for (int i = lane; i < size; i += kWarp) {
        const float code = rintf((value(i) - zero) / step);
        // Comparisons with NaN are false.
        const bool there = i >= outliers && step > 0 && code > 0;
        codes[i] = static_cast<uint8_t>(there ? fminf(code, levels) : 0.0f);
    }
    __syncwarp();
    pack_codes(row, codes, stream.bytes, group_bytes, lane);
}

}  // namespace xquant::store

#endif
