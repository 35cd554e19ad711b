// From a tile's bytes to operands of tensor cores, and to scales.
//
// A code of b bits is put where FP16 numbers are read: as bits, which are then a subnormal number, code * 2**-24, and
// exact. Tensor cores take subnormal numbers at full speed, so that no code is ever converted; the products count
// 2**24 times less.
#ifndef XQUANT_CUDA_DECODE_UNPACK_H
#define XQUANT_CUDA_DECODE_UNPACK_H

#include "common/numbers.h"
#include "decode/shape.h"

namespace xquant::decode {

constexpr float kCodeUnit = 16777216.0f;

// 32 bits from a bit address in shared memory on, of which the last 8 may be wrong if `bit` % 8 is not 0: masks drop
// them. Reads up to 3 bytes behind, which are there.
XQUANT_DEVICE uint32_t load_bits(const unsigned char* row, int bit) {
    const unsigned char* byte = row + (bit >> 3);
    const int ahead = static_cast<int>(reinterpret_cast<uintptr_t>(byte) & 3);
    const uint32_t* word = reinterpret_cast<const uint32_t*>(byte - ahead);
    const uint32_t next = ahead == 0 ? 0 : word[1];
    return __funnelshift_r(word[0], next, static_cast<uint32_t>(8 * ahead + (bit & 7)));
}

// Codes of a quad as two registers of two numbers each, in k-order.
XQUANT_DEVICE uint2 unpack_quad(const unsigned char* row, const uint4& quad, uint32_t masks) {
    const uint32_t low_mask = masks & 0xff, high_mask = masks >> 8 & 0xff, shift = masks >> 16 & 0xff;
    if (masks >> 24 == 0) {
        // Four neighbouring bytes, the first and the third in one register.
        const uint32_t low = load_bits(row, static_cast<int>(quad.x & 0xffff));
        const uint32_t pair = low_mask * 0x10001u;
        uint2 result = make_uint2(low & pair, low >> 8 & pair);
        if (high_mask != 0) {
            const uint32_t high = load_bits(row, static_cast<int>(quad.x >> 16));
            const uint32_t high_pair = high_mask * 0x10001u;
            result.x |= (high & high_pair) << shift;
            result.y |= (high >> 8 & high_pair) << shift;
        }
        return result;
    }
    const uint32_t address[4] = {quad.x, quad.y, quad.z, quad.w};
    uint32_t code[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t low = address[i] & 0xffff, high = address[i] >> 16;
        code[i] = (row[low >> 3] >> (low & 7) & low_mask) | (row[high >> 3] >> (high & 7) & high_mask) << shift;
    }
    return make_uint2(code[0] | code[1] << 16, code[2] | code[3] << 16);
}

// All codes of a tile, [kTokens][pitch].
XQUANT_DEVICE void unpack_codes(uint16_t* codes, int pitch, const unsigned char* rows, const xquant_cuda_latent& latent,
                                const uint4* quads, const uint32_t* masks, int thread) {
    // Threads that take neighbouring octets of a token read neighbouring bytes; where octets are unpacked in different
    // ways, threads of a warp had better take one octet of different tokens.
    int octet = thread / kTokens, octet_step = kThreads / kTokens, first = thread % kTokens, step = kTokens;
    if (latent.lanes >= 0) {
        octet_step = 1 << latent.lanes;
        octet = thread & (octet_step - 1);
        first = thread >> latent.lanes;
        step = kThreads >> latent.lanes;
    }
    for (; octet < latent.octets; octet += octet_step) {
        const uint4 first_quad = quads[2 * octet], second_quad = quads[2 * octet + 1];
        const uint32_t first_masks = masks[2 * octet], second_masks = masks[2 * octet + 1];
        for (int token = first; token < kTokens; token += step) {
            const unsigned char* row = rows + token * latent.row_bytes;
            const uint2 low = unpack_quad(row, first_quad, first_masks);
            const uint2 high = unpack_quad(row, second_quad, second_masks);
            *reinterpret_cast<uint4*>(codes + token * pitch + octet * 8) = make_uint4(low.x, low.y, high.x, high.y);
        }
    }
}

// A token's scale and zero point. Of an allocated stream the zero point is the scale: what it is multiplied by is then
// what codes of 0 come to.
XQUANT_DEVICE void load_scale(const unsigned char* scales, const unsigned char* zeros, int token, bool allocated,
                              float& scale, float& zero) {
    if (allocated) {
        scale = zero = exp2f((static_cast<float>(scales[token]) - 128.0f) * 0.125f);
    } else {
        scale = from_fp16(reinterpret_cast<const uint16_t*>(scales)[token]);
        zero = from_fp16(reinterpret_cast<const uint16_t*>(zeros)[token]);
    }
}

// Scales, zero points and outliers of a tile; 0 of tokens that nobody sees, whose bytes may be anything.
template <int HeadSize>
XQUANT_DEVICE void unpack_scales(Shared<HeadSize>& shared, const Params& params, const Share& share,
                                 const unsigned char* small, int tile_start, int thread) {
    const int token = thread % kTokens;
    const bool seen = tile_start + token >= share.oldest && tile_start + token < share.end;
    float scale = 0, zero = 0;
    if (thread < kTokens) {
        if (seen) load_scale(small, small + kSmallBytes, token, params.plan.key_allocated, scale, zero);
        shared.key_scale[token] = scale;
        shared.key_zero[token] = zero;
    } else {
        if (seen) {
            const unsigned char* of_values = small + 2 * kSmallBytes;
            load_scale(of_values, of_values + kSmallBytes, token, params.plan.value_allocated, scale, zero);
        }
        shared.value_scale[token] = scale;
        shared.value_zero[token] = zero;
        for (int channel = 0; channel < shared.key.num_outliers; ++channel) {
            const auto* of_channel = reinterpret_cast<const uint16_t*>(small + (4 + channel) * kSmallBytes);
            shared.outliers[channel][token] = seen ? from_fp16(of_channel[token]) : 0.0f;
        }
    }
}

}  // namespace xquant::decode

#endif
