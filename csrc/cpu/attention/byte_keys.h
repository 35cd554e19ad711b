// Keys of latents in 8 bits: a token's latents, summed up, are rounded to integers of 8 bits of their largest, and
// multiplied by an up-projection in 8 bits, exactly in INT32, for all channels at once:
//
//     up^T z = scale * unit * (integers^T bytes),   where z = scale * bytes and up = unit * integers
//
// Bytes are stored with 128 added, because the instruction wants them without a sign; `offsets` take it off again. See
// xquant_vllm/attention/cpu/byte_keys.py.
#pragma once

#include <stdint.h>

#include "api.h"
#include "attention/integer.h"
#include "common/layout.h"
#include "common/simd.h"
#include "common/transpose.h"
#include "kernels.h"

namespace xquant {
namespace {

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
constexpr int64_t kByteRows = 8;

// What a token's largest latent becomes before it is rounded: not 127, for half of it would be halfway between two
// integers, and last bits would decide.
constexpr float kLargestLatent = 126.9375f;

// Latents [channels] of a token, a multiple of 16, to bytes; returns what a byte counts. NaN and infinity make it NaN.
inline float latent_bytes(const float* latents, int64_t channels, uint8_t* bytes) {
    vf top = {}, wrong = {};
    for (int64_t i = 0; i < channels; i += kLanes) {
        const vf x = load(latents + i);
        top = maximum((vf)((vi)x & 0x7fffffff), top);
        wrong += x * 0.0f;
    }
    const float largest = reduce_max(top) + reduce_add(wrong);
    const vf inverse = broadcast(largest > 0.0f ? kLargestLatent / largest : 0.0f);
    for (int64_t i = 0; i < channels; i += kLanes) {
        const vi x = (vi)_mm512_maskz_cvtps_epi32(0xffff, (__m512)(load(latents + i) * inverse)) + 128;
        _mm_storeu_si128((__m128i*)(bytes + i), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)x));
    }
    return largest * (1.0f / kLargestLatent);
}

// Bytes of a strip, [16][channels], to [channels / 4][kTile] 32-bit numbers of four channels.
inline void latent_quads(const uint8_t* bytes, int64_t channels, int32_t* to) {
    for (int64_t channel = 0; channel < channels; channel += 16) {
        vi quads[4];
        transpose_words(bytes + channel, channels, quads);
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i) _mm512_storeu_si512(to + (channel / 4 + i) * kTile, (__m512i)quads[i]);
    }
}

// kByteRows rows of keys, kVectors vectors of tokens.
template <int kVectors>
__attribute__((noinline)) void byte_block(const int32_t* up, const int32_t* quads, int64_t depth, const int32_t* offsets,
                                          const float* units, const float* scales, float* keys) {
    __m512i sums[kByteRows][kVectors];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kByteRows; ++i) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < kVectors; ++j) sums[i][j] = _mm512_set1_epi32(offsets[i]);
    }
    for (int64_t k = 0; k < depth; ++k, up += kByteRows, quads += kTile) {
        __m512i columns[kVectors];
#pragma GCC unroll 4
        for (int64_t j = 0; j < kVectors; ++j) columns[j] = _mm512_loadu_si512(quads + j * kLanes);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kByteRows; ++i) {
            const __m512i factor = _mm512_set1_epi32(up[i]);
#pragma GCC unroll 4
            for (int64_t j = 0; j < kVectors; ++j) multiply_add<true>(sums[i][j], columns[j], factor);
        }
    }
#pragma GCC unroll 4
    for (int64_t j = 0; j < kVectors; ++j) {
        const vf scale = load(scales + j * kLanes);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kByteRows; ++i) {
            store(keys + i * kTile + j * kLanes, to_float((vi)sums[i][j]) * (scale * units[i]));
        }
    }
}

// Keys [head_size][kTile] of a kv head before bias, norm and RoPE: columns [first, last), which are multiples of 16.
inline void byte_keys(const xquant_plan& plan, int64_t kv_head, const int32_t* quads, const float* scales, int64_t first,
                      int64_t last, float* keys) {
    const int64_t depth = round_up(plan.key.width, kPad) / 4, head_size = plan.head_size;
    const int32_t* up = plan.key_bytes + kv_head * head_size * depth;
    const int32_t* offsets = plan.key_byte_offsets + kv_head * head_size;
    const float* units = plan.key_byte_units + kv_head * head_size;
    for (int64_t column = first; column < last;) {
        const bool wide = column + 2 * kLanes <= last;
        const auto block = wide ? byte_block<2> : byte_block<1>;
        for (int64_t row = 0; row < head_size; row += kByteRows) {
            block(up + row * depth, quads + column, depth, offsets + row, units + row, scales + column,
                  keys + row * kTile + column);
        }
        column += wide ? 2 * kLanes : kLanes;
    }
}
#else
inline float latent_bytes(const float*, int64_t, uint8_t*) { return 0.0f; }
inline void latent_quads(const uint8_t*, int64_t, int32_t*) {}
inline void byte_keys(const xquant_plan&, int64_t, const int32_t*, const float*, int64_t, int64_t, float*) {}
#endif

}  // namespace
}  // namespace xquant
