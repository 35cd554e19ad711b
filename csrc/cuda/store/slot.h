// Where a token's bytes go.
#ifndef XQUANT_CUDA_STORE_SLOT_H
#define XQUANT_CUDA_STORE_SLOT_H

#include "common/numbers.h"
#include "store/store.h"

namespace xquant::store {

struct Slot {
    uint8_t* page;
    int offset;  // within the page, in tokens
    int block_size;
};

XQUANT_DEVICE Slot find_slot(const xquant_cuda_store_call& call, int64_t slot) {
    return {call.pages + slot / call.block_size * call.page_stride, static_cast<int>(slot % call.block_size),
            call.block_size};
}

// Row `row` of a section [rows][block_size] of FP16 numbers.
XQUANT_DEVICE void write_fp16(const Slot& slot, int section, int row, uint16_t number) {
    reinterpret_cast<uint16_t*>(slot.page + section)[row * slot.block_size + slot.offset] = number;
}

// Large numbers become the largest one, not infinity; NaN stays NaN.
XQUANT_DEVICE uint16_t to_fp16_saturated(float x) {
    constexpr float kLargest = 65504.0f;
    if (x > kLargest) x = kLargest;
    if (x < -kLargest) x = -kLargest;
    return to_fp16(x);
}

// Bytes of a row from codes, one of which is a byte in shared memory. All lanes of a warp.
XQUANT_DEVICE void pack_codes(uint8_t* row, const uint8_t* codes, const xquant_cuda_byte* bytes, int count, int lane) {
    for (int i = lane; i < count; i += kWarp) {
        const xquant_cuda_byte of_byte = bytes[i];
        const unsigned mask = (1u << of_byte.bits) - 1;
        unsigned packed = 0;
        int channel = of_byte.first;
        for (int bit = 0; bit < 8; bit += of_byte.bits, channel += of_byte.distance) {
            packed |= (codes[channel] >> of_byte.shift & mask) << bit;
        }
        row[i] = static_cast<uint8_t>(packed);
    }
}

}  // namespace xquant::store

#endif
