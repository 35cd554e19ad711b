// Codes to FP32 latents, 16 tokens (a strip) at a time, in the two arrangements that the matrix products want. All of
// uniform streams; of allocated ones single tokens only, whose strips are for unpack_allocated.h.
//
// Loads may reach up to 15 bytes past a row of codes: they stay inside the page, where scales follow the codes, and what
// they read is never used.
#pragma once

#include <stdint.h>
#include <string.h>

#include "api.h"
#include "common/convert.h"
#include "common/layout.h"
#include "common/simd.h"
#include "common/transpose.h"

namespace xquant {
namespace {

// A number of bits as a type.
template <int kBits>
struct Bits {
    static constexpr int value = kBits;
};

// --- Channel-major: [channels][tokens], for keys -------------------------------------------------------------------

// The codes of field `field` of a transposed byte row, kLanes tokens of it.
template <int kBits>
inline vi field_codes(const uint8_t* row, int64_t field) {
    return load_bytes(row) >> (int32_t)(field * kBits) & ((1 << kBits) - 1);
}

// Write a vector, or add it to what is there.
template <bool kAdd>
inline void put(float* to, vf x) {
    if constexpr (kAdd) x = load(to) + x;
    store(to, x);
}

// 3 and 6 bits are two planes: a high one, and a low one of twice as many bits and bytes. So field f of the high plane
// meets byte i of it with byte i, or i + size, of the low plane.
template <int kBits>
constexpr int kHighBits = kBits / 3;
template <int kBits>
constexpr bool kTwoPlanes = kBits % 3 == 0;

// One run: transposed bytes [bytes][16] to latents [channels][stride], a strip of 16 tokens wide.
template <int kBits, bool kAdd>
inline void unpack_run_channels(const uint8_t* bytes, int64_t channels, const float* scales, const float* zeros,
                                float* to, int64_t stride) {
    for (int64_t lane = 0; lane < kStrip; lane += kLanes) {
        const vf scale = load(scales + lane), zero = load(zeros + lane);
        const uint8_t* at = bytes + lane;
        if constexpr (kTwoPlanes<kBits>) {
            constexpr int kHigh = kHighBits<kBits>;
            const int64_t size = channels * kHigh / 8;
            for (int64_t i = 0; i < size; ++i) {
                for (int64_t field = 0; field < 8 / kHigh; ++field) {
                    const vi low = field_codes<2 * kHigh>(at + ((field & 1) * size + i) * 16, field >> 1);
                    const vi high = field_codes<kHigh>(at + (2 * size + i) * 16, field);
                    const vi codes = low | high << (2 * kHigh);
                    put<kAdd>(to + (field * size + i) * stride + lane, to_float(codes) * scale + zero);
                }
            }
        } else {
            const int64_t size = channels * kBits / 8;
            for (int64_t i = 0; i < size; ++i) {
#pragma GCC unroll 4
                for (int64_t field = 0; field < 8 / kBits; ++field) {
                    const vi codes = field_codes<kBits>(at + i * 16, field);
                    put<kAdd>(to + (field * size + i) * stride + lane, to_float(codes) * scale + zero);
                }
            }
        }
    }
}

// The FP16 numbers of one run, likewise; `codes` is the first slot's.
template <bool kAdd>
inline void copy_run_channels(const uint8_t* codes, int64_t row_bytes, int64_t channels, float* to, int64_t stride) {
    for (int64_t channel = 0; channel < channels; ++channel) {
        float numbers[kStrip];
        for (int64_t token = 0; token < kStrip; ++token) {
            uint16_t half;
            memcpy(&half, codes + token * row_bytes + channel * 2, 2);
            numbers[token] = half_to_float(half);
        }
        float* at = to + channel * stride;
        for (int64_t lane = 0; lane < kStrip; lane += kLanes) put<kAdd>(at + lane, load(numbers + lane));
    }
}

// 2 ** (i / 8)
constexpr float kEighths[8] = {1.0f,        1.09050775f, 1.18920708f, 1.29683959f,
                               1.41421354f, 1.54221082f, 1.68179286f, 1.8340081f};

// The 8-bit scale of an allocated stream's token: 2 ** ((code - 128) / 8), rounded once.
inline float token_scale(uint8_t code) {
    return bits_float(float_bits(kEighths[code % 8]) + ((uint32_t)(code / 8) << 23) - (16u << 23));
}

// Those of 16 slots.
inline void token_scales(const HeadView& view, const uint8_t* page, int64_t slot, float* scales) {
    for (int64_t i = 0; i < kStrip; ++i) scales[i] = token_scale(page[view.token_scale(slot) + i]);
}

// Scales and zeros of a run, for 16 slots: numbers are code * scale + zero, in both kinds of streams.
struct RunScales {
    float scales[kStrip], zeros[kStrip];
    float tokens[kStrip];  // of an allocated stream

    RunScales(const HeadView& view, const uint8_t* page, int64_t slot) {
        if (view.stream.allocated) token_scales(view, page, slot, tokens);
    }

    void set(const HeadView& view, const uint8_t* page, int64_t slot, int64_t run) {
        const int64_t channel = view.head.runs[run].channel;
        for (int64_t lane = 0; lane < kStrip; lane += kLanes) {
            if (view.stream.allocated) {
                store(scales + lane, load(tokens + lane) * view.head.step[channel]);
                store(zeros + lane, load(tokens + lane) * view.head.zero[channel]);
            } else {
                store(scales + lane, load_half(page + view.scale(run, slot) + lane * 2));
                store(zeros + lane, load_half(page + view.zero(run, slot) + lane * 2));
            }
        }
    }
};

// Call unpack with the bits, which are none of FP16 numbers, as a constant.
template <typename Unpack>
inline void with_bits(int64_t bits, const Unpack& unpack) {
    switch (bits) {
        case 8: unpack(Bits<8>{}); break;
        case 6: unpack(Bits<6>{}); break;
        case 4: unpack(Bits<4>{}); break;
        case 3: unpack(Bits<3>{}); break;
        default: unpack(Bits<2>{}); break;
    }
}

// A band of 16 slots to [channels][stride]; `bytes` is scratch for the codes. Terms that add have no outlier channels.
template <bool kAdd>
inline void unpack_channels(const HeadView& view, const uint8_t* page, int64_t slot, int64_t index, float* to,
                            int64_t stride, uint8_t* bytes) {
    const xquant_band& band = view.head.bands[index];
    const int64_t first_byte = view.head.runs[band.begin].byte;
    const uint8_t* codes = page + view.codes(slot);
    if (view.head.runs[band.begin].bits != 16) {
        transpose_codes(codes + first_byte, view.head.row_bytes, band_bytes(view.head, band), bytes);
    }
    RunScales scales(view, page, slot);
    for (int64_t i = band.begin; i < band.end; ++i) {
        const xquant_run& run = view.head.runs[i];
        float* at = to + (run.channel - band.channel) * stride;
        if (run.bits == 16) {
            copy_run_channels<kAdd>(codes + run.byte, view.head.row_bytes, run.channels, at, stride);
            continue;
        }
        scales.set(view, page, slot, i);
        with_bits(run.bits, [&](auto bits) {
            unpack_run_channels<bits.value, kAdd>(bytes + (run.byte - first_byte) * 16, run.channels,
                                                  scales.scales, scales.zeros, at, stride);
        });
    }
    if (index > 0) return;
    for (int64_t channel = 0; channel < view.stream.outlier_channels; ++channel) {
        for (int64_t lane = 0; lane < kStrip; lane += kLanes) {
            store(to + channel * stride + lane, load_half(page + view.outlier(channel, slot) + lane * 2));
        }
    }
}

// --- Token-major: [tokens][channels], for values -------------------------------------------------------------------

// One run of one token. Writes up to kLanes - 1 floats past it: fields are written in ascending order, so the excess
// of one is overwritten by the next.
template <int kBits>
inline void unpack_run_row(const uint8_t* bytes, int64_t channels, float scale, float zero, float* to) {
    const vf scales = broadcast(scale), zeros = broadcast(zero);
    if constexpr (kTwoPlanes<kBits>) {
        constexpr int kHigh = kHighBits<kBits>;
        const int64_t size = channels * kHigh / 8;
        for (int64_t field = 0; field < 8 / kHigh; ++field, to += size) {
            const uint8_t* low = bytes + (field & 1) * size;
            const uint8_t* high = bytes + 2 * size;
            for (int64_t i = 0; i < size; i += kLanes) {
                const vi low_codes = field_codes<2 * kHigh>(low + i, field >> 1);
                const vi codes = low_codes | field_codes<kHigh>(high + i, field) << (2 * kHigh);
                store(to + i, to_float(codes) * scales + zeros);
            }
        }
    } else {
        const int64_t size = channels * kBits / 8;
#pragma GCC unroll 4
        for (int64_t field = 0; field < 8 / kBits; ++field, to += size) {
            for (int64_t i = 0; i < size; i += kLanes) {
                store(to + i, to_float(field_codes<kBits>(bytes + i, field)) * scales + zeros);
            }
        }
    }
}

// A band of tokens [first, last) of a strip to [16][stride]; rows have room for kLanes more floats.
inline void unpack_rows(const HeadView& view, const uint8_t* page, int64_t slot, int64_t index, int64_t first,
                        int64_t last, float* to, int64_t stride) {
    const xquant_band& band = view.head.bands[index];
    const int64_t row_bytes = view.head.row_bytes;
    RunScales scales(view, page, slot);
    for (int64_t i = band.begin; i < band.end; ++i) {
        const xquant_run& run = view.head.runs[i];
        const uint8_t* codes = page + view.codes(slot) + run.byte;
        float* at = to + (run.channel - band.channel);
        if (run.bits == 16) {
            for (int64_t token = first; token < last; ++token) {
                load_row(XQUANT_FP16, codes + token * row_bytes, 0, run.channels, at + token * stride);
            }
            continue;
        }
        scales.set(view, page, slot, i);
        with_bits(run.bits, [&](auto bits) {
            for (int64_t token = first; token < last; ++token) {
                unpack_run_row<bits.value>(codes + token * row_bytes, run.channels, scales.scales[token],
                                           scales.zeros[token], at + token * stride);
            }
        });
    }
    if (index > 0) return;
    for (int64_t channel = 0; channel < view.stream.outlier_channels; ++channel) {
        float outliers[kStrip];
        for (int64_t lane = 0; lane < kStrip; lane += kLanes) {
            store(outliers + lane, load_half(page + view.outlier(channel, slot) + lane * 2));
        }
        for (int64_t token = first; token < last; ++token) to[token * stride + channel] = outliers[token];
    }
}

}  // namespace
}  // namespace xquant
