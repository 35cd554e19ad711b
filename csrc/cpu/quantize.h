// FP32 latents to codes, scales, zero points: bit for bit what xquant_vllm/codec/quantizer.py and packing.py make.
//
// Rounding is decided by a subtraction followed by a division, neither of which a compiler fuses, so this holds under
// -ffp-contract=fast; it would not under -ffast-math or with a reciprocal.
#pragma once

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
        // Adding 2^23 rounds half to even and leaves the integer in the low bits.
        int32_t integers[kLanes];
        const vi shifted = (vi)(scaled + 8388608.0f);
        memcpy(integers, &shifted, sizeof integers);
        for (int64_t lane = 0; lane < kLanes; ++lane) codes[i + lane] = (uint8_t)integers[lane];
    }
    return result;
}

// One plane of codes; returns the byte after it.
template <int kPlaneBits>
inline uint8_t* pack_plane(const uint8_t* __restrict codes, int64_t group_size, int shift, uint8_t* __restrict to) {
    constexpr int kMask = (1 << kPlaneBits) - 1;
    const int64_t size = group_size * kPlaneBits / 8;
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

inline void pack_group(const uint8_t* codes, int64_t group_size, int64_t bits, uint8_t* to) {
    switch (bits) {
        case 8: pack_plane<8>(codes, group_size, 0, to); break;
        case 4: pack_plane<4>(codes, group_size, 0, to); break;
        case 3: pack_plane<1>(codes, group_size, 2, pack_plane<2>(codes, group_size, 0, to)); break;
        default: pack_plane<2>(codes, group_size, 0, to); break;
    }
}
