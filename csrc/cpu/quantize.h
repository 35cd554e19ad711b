// FP32 latents to codes, scales, zero points.
//
// Of uniform streams bit for bit what xquant_vllm/codec/quantizer.py and packing.py make: rounding is decided by a
// subtraction followed by a division, neither of which a compiler fuses, so this holds under -ffp-contract=fast; it would
// not under -ffast-math or with a reciprocal. Of allocated streams (allocated.py) a code is another by one where a number
// lies halfway between two, and a scale another where both leave the same error.
#pragma once

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

struct GroupParameters {
    uint16_t scale;
    uint16_t zero;
};

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

    const float levels = (float)((1 << bits) - 1);
    GroupParameters result;
    result.zero = any ? 0x7e00 : saturating_half(reduce_min(low));
    const float zero = half_to_float(result.zero);
    result.scale = any ? 0x7e00 : saturating_half((reduce_max(high) - zero) / levels);
    const float step = half_to_float(result.scale);
    if (!(step > 0.0f)) {  // a constant group, or one with a NaN
        memset(codes, 0, count);
        return result;
    }
    const vf top = broadcast(levels);
    for (int64_t i = 0; i < count; i += kLanes) {
        const vf scaled = minimum(maximum((load(x + i) - zero) / step, vf{}), top);
        store_codes(codes + i, scaled + kRounder);
    }
    return result;
}

// Scales of an allocated stream that are tried: eighths of an octave around the one that matches the mean square.
constexpr int kCandidates = 9;
constexpr int kFirstCandidate = -6, kCandidateStep = 2;

// torch.nan_to_num(x, 0, 3e38, -3e38) of `count` numbers, a multiple of kLanes.
inline void make_finite(float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const vf values = load(x + i);
        const vf number = select(values == values, values, vf{});
        const vf high = select(number == INFINITY, broadcast(3e38f), number);
        store(x + i, select(high == -INFINITY, broadcast(-3e38f), high));
    }
}

// The scale that matches the root mean square of `count` finite numbers, weighted by what errors in them are worth; it
// may lie outside of what 8 bits hold.
inline int64_t matching_scale(const xquant_head& head, const float* x, int64_t count) {
    vf squares = {}, worths = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        const vf values = load(x + i), worth = load(head.worth + i);
        squares += values * values * worth;
        worths += worth;
    }
    const double mean = (double)reduce_add(squares) / (double)reduce_add(worths);
    return (int64_t)rint(log2(mean < 1e-30 ? 1e-30 : mean > 1e30 ? 1e30 : mean) * 4) + 128;
}

struct AllocatedScale {
    uint8_t code;
    bool any;  // whether any candidate leaves a finite error
};

// Of the candidates the scale of the smallest weighted error, the first of several.
inline AllocatedScale choose_scale(const xquant_head& head, const float* x, int64_t count) {
    const int64_t matching = matching_scale(head, x, count);
    uint8_t codes[kCandidates];
    float values[kCandidates], reciprocals[kCandidates];
    vf errors[kCandidates] = {};
    for (int i = 0; i < kCandidates; ++i) {
        const int64_t code = matching + kFirstCandidate + i * kCandidateStep;
        codes[i] = (uint8_t)(code < 1 ? 1 : code > 255 ? 255 : code);
        values[i] = token_scale(codes[i]);
        reciprocals[i] = 1.0f / values[i];
    }
    for (int64_t at = 0; at < count; at += kLanes) {
        const vf number = load(x + at), step = load(head.step + at), middle = load(head.middle + at);
        const vf worth = load(head.worth + at), in_steps = number / step;
#pragma GCC unroll 9
        for (int i = 0; i < kCandidates; ++i) {
            const vf scaled = minimum(maximum(in_steps * reciprocals[i] + middle, vf{}), middle * 2.0f);
            const vf code = (scaled + kRounder) - kRounder;
            const vf error = number - (code - middle) * (step * values[i]);
            errors[i] += error * error * worth;
        }
    }
    AllocatedScale best = {1, false};
    float smallest = INFINITY;
    for (int i = 0; i < kCandidates; ++i) {
        const float error = reduce_add(errors[i]);
        if (error < smallest) {
            smallest = error;
            best = {codes[i], true};
        }
    }
    return best;
}

// Quantize `count` finite numbers of an allocated stream's head, a multiple of 16; returns the scale.
inline uint8_t quantize_allocated(const xquant_head& head, const float* x, int64_t count, uint8_t* codes) {
    const AllocatedScale scale = choose_scale(head, x, count);
    if (!scale.any) {
        memset(codes, 0, count);
        return scale.code;
    }
    const float reciprocal = 1.0f / token_scale(scale.code);
    for (int64_t i = 0; i < count; i += kLanes) {
        const vf middle = load(head.middle + i), in_steps = load(x + i) / load(head.step + i);
        const vf scaled = minimum(maximum(in_steps * reciprocal + middle, vf{}), middle * 2.0f);
        store_codes(codes + i, scaled + kRounder);
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

inline void pack_piece(const uint8_t* codes, int64_t channels, int64_t bits, uint8_t* to) {
    switch (bits) {
        case 8: pack_plane<8>(codes, channels, 0, to); break;
        case 6: pack_plane<2>(codes, channels, 4, pack_plane<4>(codes, channels, 0, to)); break;
        case 4: pack_plane<4>(codes, channels, 0, to); break;
        case 3: pack_plane<1>(codes, channels, 2, pack_plane<2>(codes, channels, 0, to)); break;
        default: pack_plane<2>(codes, channels, 0, to); break;
    }
}
