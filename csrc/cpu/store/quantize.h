// FP32 latents to codes, scales, zero points.
//
// Of uniform streams bit for bit what xquant_vllm/codec/quantizer.py and packing.py make: rounding is decided by a
// subtraction followed by a division, neither of which a compiler fuses, so this holds under -ffp-contract=fast; it
// would not under -ffast-math or with a reciprocal. Of allocated streams (allocated.py) a code may be another by one
// where a number lies halfway between two, and a scale another where both leave the same error.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "api.h"
#include "common/convert.h"
#include "common/simd.h"
#include "unpack/unpack.h"

namespace xquant {
namespace {

// Adding it rounds a number in [0, 2^22] half to even and leaves the integer in the low bits.
constexpr float kRounder = 8388608.0f;

// Integers that were rounded by adding kRounder, as bytes.
inline void store_codes(uint8_t* codes, vf rounded) {
    int32_t integers[kLanes];
    memcpy(integers, &rounded, sizeof integers);
    for (int64_t lane = 0; lane < kLanes; ++lane) codes[lane] = (uint8_t)integers[lane];
}

inline uint16_t saturating_half(float x) {
    return float_to_half(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x);
}

// FP16.
struct GroupParameters {
    uint16_t scale;
    uint16_t zero;
};

// Of a group between `low` and `high`; NaN if there is one in it.
inline GroupParameters group_parameters(float low, float high, bool unordered, int64_t bits) {
    if (unordered) return {0x7e00, 0x7e00};
    const uint16_t zero = saturating_half(low);
    const float levels = (float)((1 << bits) - 1);
    return {saturating_half((high - half_to_float(zero)) / levels), zero};
}

// Codes of numbers, rounded by kRounder; of a constant group, or one with a NaN, 0.
inline vf group_codes(vf x, vf scale, vf zero, int64_t bits) {
    const vf codes = minimum(maximum((x - zero) / scale, vf{}), broadcast((float)((1 << bits) - 1)));
    return select(scale > 0.0f, codes, vf{}) + kRounder;
}

// Quantize `count` numbers, a multiple of kLanes; writes as many codes.
inline GroupParameters quantize_group(const float* x, int64_t count, int64_t bits, uint8_t* codes) {
    vf low = load(x), high = low;
    vi unordered = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        const vf values = load(x + i);
        low = minimum(values, low);
        high = maximum(values, high);
        unordered |= values != values;
    }
    int32_t any = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) any |= unordered[lane];

    const GroupParameters result = group_parameters(reduce_min(low), reduce_max(high), any, bits);
    const vf scale = broadcast(half_to_float(result.scale)), zero = broadcast(half_to_float(result.zero));
    for (int64_t i = 0; i < count; i += kLanes) store_codes(codes + i, group_codes(load(x + i), scale, zero, bits));
    return result;
}

// Scales of an allocated stream that are tried: eighths of an octave around the one that matches the mean square.
constexpr int kCandidates = 9;
constexpr int kFirstCandidate = -6, kCandidateStep = 2;

// `count` latents, a multiple of kLanes, counted in steps; what is no number becomes one as by torch.nan_to_num(x, 0,
// 3e38, -3e38).
inline void count_in_steps(const xquant_head& head, float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const vf values = load(x + i);
        const vf number = select(values == values, values, vf{});
        const vf high = select(number == INFINITY, broadcast(3e38f), number);
        const vf finite = select(high == -INFINITY, broadcast(-3e38f), high);
        store(x + i, finite * load(head.inverse_step + i));
    }
}

// The scale that matches the root mean square of latents counted in steps, weighted by what errors in them are worth.
// It may lie outside of what 8 bits hold.
inline int64_t matching_scale(const xquant_head& head, const float* x, int64_t count) {
    vf squares = {};
    for (int64_t i = 0; i < count; i += kLanes) squares += load(x + i) * load(x + i) * load(head.worth + i);
    const float mean = reduce_add(squares) / head.channels_worth;
    const uint32_t bits = float_bits(mean < 1e-30f ? 1e-30f : mean > 1e30f ? 1e30f : mean);
    // Eighths of an octave of the root are quarters of the mean: 4 * log2(mean), rounded.
    const float mantissa = bits_float((bits & 0x7fffffu) | 0x3f800000u);
    int64_t quarters = 4 * ((int64_t)(bits >> 23) - 127);
    for (int i = 1; i < 8; i += 2) quarters += mantissa > kEighths[i];
    return quarters + 128;
}

// Codes of latents counted in steps, which kRounder rounds.
inline vf scale_codes(vf x, float reciprocal, vf middle) {
    return minimum(maximum(x * reciprocal + middle, vf{}), middle * 2.0f) + kRounder;
}

struct AllocatedScale {
    uint8_t code;
    bool any;  // whether any candidate leaves a finite error
};

// Of the candidates the scale of the smallest weighted error, the first of several.
inline AllocatedScale choose_scale(const xquant_head& head, const float* x, int64_t count) {
    const int64_t matching = matching_scale(head, x, count);
    uint8_t codes[kCandidates];
    float reciprocals[kCandidates];
    vf errors[kCandidates] = {};
    for (int i = 0; i < kCandidates; ++i) {
        const int64_t code = matching + kFirstCandidate + i * kCandidateStep;
        codes[i] = (uint8_t)(code < 1 ? 1 : code > 255 ? 255 : code);
        reciprocals[i] = 1.0f / token_scale(codes[i]);
    }
    for (int64_t at = 0; at < count; at += kLanes) {
        const vf number = load(x + at), middle = load(head.middle + at), worth = load(head.worth + at);
#pragma GCC unroll 9
        for (int i = 0; i < kCandidates; ++i) {
            const vf code = scale_codes(number, reciprocals[i], middle) - kRounder;
            const vf error = number * reciprocals[i] - (code - middle);
            errors[i] += error * error * worth;
        }
    }
    AllocatedScale best = {1, false};
    float smallest = INFINITY;
#pragma GCC unroll 9
    for (int i = 0; i < kCandidates; ++i) {
        const float scale = token_scale(codes[i]), error = reduce_add(errors[i]) * scale * scale;
        if (error < smallest) {
            smallest = error;
            best = {codes[i], true};
        }
    }
    return best;
}

// Quantize `count` latents of an allocated stream's head, a multiple of 16, which are overwritten; returns the scale.
inline uint8_t quantize_allocated(const xquant_head& head, float* x, int64_t count, uint8_t* codes) {
    count_in_steps(head, x, count);
    const AllocatedScale scale = choose_scale(head, x, count);
    if (!scale.any) {
        memset(codes, 0, count);
        return scale.code;
    }
    const float reciprocal = 1.0f / token_scale(scale.code);
    for (int64_t i = 0; i < count; i += kLanes) {
        store_codes(codes + i, scale_codes(load(x + i), reciprocal, load(head.middle + i)));
    }
    return scale.code;
}

// One plane of codes; returns the byte after it.
template <int kPlaneBits>
inline uint8_t* pack_plane(const uint8_t* __restrict codes, int64_t channels, int shift, uint8_t* __restrict to) {
    constexpr int kMask = (1 << kPlaneBits) - 1;
    const int64_t size = channels * kPlaneBits / 8;
    for (int64_t i = 0; i < size; ++i) {
        int byte = 0;
#pragma GCC unroll 8
        for (int field = 0; field < 8 / kPlaneBits; ++field) {
            byte |= (codes[field * size + i] >> shift & kMask) << (field * kPlaneBits);
        }
        to[i] = (uint8_t)byte;
    }
    return to + size;
}

inline void pack_run(const uint8_t* codes, int64_t channels, int64_t bits, uint8_t* to) {
    switch (bits) {
        case 8: pack_plane<8>(codes, channels, 0, to); break;
        case 6: pack_plane<2>(codes, channels, 4, pack_plane<4>(codes, channels, 0, to)); break;
        case 4: pack_plane<4>(codes, channels, 0, to); break;
        case 3: pack_plane<1>(codes, channels, 2, pack_plane<2>(codes, channels, 0, to)); break;
        default: pack_plane<2>(codes, channels, 0, to); break;
    }
}

}  // namespace
}  // namespace xquant
