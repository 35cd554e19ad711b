// From a tile's bytes to operands of tensor cores, and to scales.
#ifndef XQUANT_CUDA_DECODE_UNPACK_H
#define XQUANT_CUDA_DECODE_UNPACK_H

#include "decode/quads.h"
#include "decode/shape.h"

namespace xquant::decode {

// All codes of a tile as numbers of type K, [kTokens][kCodePitch<K>].
template <int HeadSize, int K>
XQUANT_DEVICE void unpack_codes(unsigned char* codes, const unsigned char* rows, const xquant_cuda_latent& latent,
                                const uint4* quads, const uint32_t* masks, int thread) {
    constexpr int kQuads = Unpacked<K>::kVectorQuads;
    // Threads that take neighbouring vectors of a token read neighbouring bytes; where vectors are unpacked in
    // different ways, threads of a warp had better take one vector of different tokens.
    int vector = thread / kTokens, vector_step = kThreads / kTokens, first = thread % kTokens, step = kTokens;
    if (latent.lanes >= 0) {
        vector_step = 1 << latent.lanes;
        vector = thread & (vector_step - 1);
        first = thread >> latent.lanes;
        step = kThreads >> latent.lanes;
    }
    for (; vector < latent.vectors; vector += vector_step) {
        uint4 of_vector[kQuads];
        uint32_t masks_of_vector[kQuads];
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            of_vector[i] = quads[kQuads * vector + i];
            masks_of_vector[i] = masks[kQuads * vector + i];
        }
        for (int token = first; token < kTokens; token += step) {
            *reinterpret_cast<uint4*>(codes + token * Shape<HeadSize>::template kCodePitch<K> + vector * 16) =
                unpack_vector<K>(rows + token * latent.row_bytes, of_vector, masks_of_vector);
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
