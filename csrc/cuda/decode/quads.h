// From the bits of a row to operands of tensor cores, a quad of channels at a time. No code is ever converted.
//
// As FP16 numbers: a code of b bits is put where such a number is read: as bits, which are then a subnormal number,
// code * 2**-24, and exact. Tensor cores take subnormal numbers at full speed; the products count 2**24 times less.
//
// As bytes: a fast quad, which is four neighbouring bytes, is a mask of its word.
#ifndef XQUANT_CUDA_DECODE_QUADS_H
#define XQUANT_CUDA_DECODE_QUADS_H

#include "decode/shape.h"

namespace xquant::decode {

// 2**24: what products of such numbers are multiplied by.
constexpr float kCodeFactor = 16777216.0f;

// 32 bits from a bit address in shared memory on, of which the last 8 may be wrong if `bit` % 8 is not 0: masks drop
// them. Reads up to 3 bytes behind, which are there.
XQUANT_DEVICE uint32_t load_bits(const unsigned char* row, int bit) {
    const unsigned char* byte = row + (bit >> 3);
    const int ahead = static_cast<int>(reinterpret_cast<uintptr_t>(byte) & 3);
    const uint32_t* word = reinterpret_cast<const uint32_t*>(byte - ahead);
    const uint32_t next = ahead == 0 ? 0 : word[1];
    return __funnelshift_r(word[0], next, static_cast<uint32_t>(8 * ahead + (bit & 7)));
}

// A quad's entry in the table of masks.
struct Masks {
    uint32_t low, high, shift;
    bool slow;
};

XQUANT_DEVICE Masks split_masks(uint32_t masks) {
    return {masks & 0xff, masks >> 8 & 0xff, masks >> 16 & 0xff, masks >> 24 != 0};
}

// One code of a slow quad.
XQUANT_DEVICE uint32_t load_code(const unsigned char* row, uint32_t address, const Masks& masks) {
    const uint32_t low = address & 0xffff, high = address >> 16;
    return (row[low >> 3] >> (low & 7) & masks.low) | (row[high >> 3] >> (high & 7) & masks.high) << masks.shift;
}

// A quad as two registers of two FP16 numbers.
XQUANT_DEVICE uint2 unpack_halves(const unsigned char* row, const uint4& quad, const Masks& masks) {
    if (masks.slow) {
        return make_uint2(load_code(row, quad.x, masks) | load_code(row, quad.y, masks) << 16,
                          load_code(row, quad.z, masks) | load_code(row, quad.w, masks) << 16);
    }
    // The first and the third of the bytes in one register.
    const uint32_t low = load_bits(row, static_cast<int>(quad.x & 0xffff));
    const uint32_t pair = masks.low * 0x10001u;
    uint2 result = make_uint2(low & pair, low >> 8 & pair);
    if (masks.high != 0) {
        const uint32_t high = load_bits(row, static_cast<int>(quad.x >> 16));
        const uint32_t high_pair = masks.high * 0x10001u;
        result.x |= (high & high_pair) << masks.shift;
        result.y |= (high >> 8 & high_pair) << masks.shift;
    }
    return result;
}

// Four quads as a register of bytes each. Quads that lie in the same bytes of the row, at different bits, follow each
// other (two of 4 bits, four of 2 or 3), so that these are read once; slow quads follow fast ones.
XQUANT_DEVICE uint4 unpack_bytes(const unsigned char* row, const uint4 (&quads)[4], const uint32_t (&of_quads)[4]) {
    uint32_t codes[4], low = 0, high = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const Masks masks = split_masks(of_quads[i]);
        if (masks.slow) {
            codes[i] = load_code(row, quads[i].x, masks) | load_code(row, quads[i].y, masks) << 8 |
                       load_code(row, quads[i].z, masks) << 16 | load_code(row, quads[i].w, masks) << 24;
            continue;
        }
        const uint32_t address = quads[i].x, other = i == 0 ? ~address : address ^ quads[i - 1].x;
        if ((other & 0xfff8u) != 0) low = load_bits(row, static_cast<int>(address & 0xfff8u));
        codes[i] = (low >> (address & 7)) & (masks.low * 0x1010101u);
        if (masks.high != 0) {
            if ((other >> 16 & 0xfff8u) != 0) high = load_bits(row, static_cast<int>(address >> 16 & 0xfff8u));
            codes[i] |= ((high >> (address >> 16 & 7)) & (masks.high * 0x1010101u)) << masks.shift;
        }
    }
    return make_uint4(codes[0], codes[1], codes[2], codes[3]);
}

// A vector of type K.
template <int K>
XQUANT_DEVICE uint4 unpack_vector(const unsigned char* row, const uint4 (&quads)[Unpacked<K>::kVectorQuads],
                                  const uint32_t (&masks)[Unpacked<K>::kVectorQuads]) {
    if constexpr (K == kInt8) {
        return unpack_bytes(row, quads, masks);
    } else {
        const uint2 low = unpack_halves(row, quads[0], split_masks(masks[0]));
        const uint2 high = unpack_halves(row, quads[1], split_masks(masks[1]));
        return make_uint4(low.x, low.y, high.x, high.y);
    }
}

}  // namespace xquant::decode

#endif
