// Codes of allocated streams to FP32 latents, 16 tokens (a strip) at a time.
//
// Their runs are short: unpacked one by one, they would leave most lanes of a vector idle. So codes become bytes
// first, [channels][tokens], where a field of a run is contiguous; what is done with them then knows no runs.
#pragma once

#include <stdint.h>
#include <string.h>

#include "api.h"
#include "common/layout.h"
#include "common/simd.h"
#include "common/transpose.h"
#include "unpack/unpack.h"

namespace xquant {
namespace {

// Bytes, two in a lane: there are no vectors of bytes that shift.
typedef uint16_t byte_pairs __attribute__((vector_size(kLanes * 4)));

// Field `field` of kBits bits, moved to bit kTo.
template <int kBits, int kTo>
inline byte_pairs field_bytes(const uint8_t* from, int field) {
    byte_pairs x;
    memcpy(&x, from, sizeof x);
    const int right = field * kBits - kTo;
    const byte_pairs moved = right > 0 ? x >> (uint16_t)right : x << (uint16_t)-right;
    return moved & (uint16_t)(0x101 * ((1 << kBits) - 1) << kTo);
}

// One run: transposed bytes [bytes][16] to codes [channels][16]. Reads and writes up to a vector too much; fields are
// written in ascending order, so the excess of one is overwritten by the next.
template <int kBits>
inline void unpack_run_codes(const uint8_t* bytes, int64_t channels, uint8_t* to) {
    if constexpr (kTwoPlanes<kBits>) {
        constexpr int kHigh = kHighBits<kBits>;
        const int64_t size = channels * kHigh / 8 * 16;
#pragma GCC unroll 8
        for (int field = 0; field < 8 / kHigh; ++field, to += size) {
            for (int64_t i = 0; i < size; i += sizeof(byte_pairs)) {
                const byte_pairs low = field_bytes<2 * kHigh, 0>(bytes + (field & 1) * size + i, field >> 1);
                const byte_pairs codes = low | field_bytes<kHigh, 2 * kHigh>(bytes + 2 * size + i, field);
                memcpy(to + i, &codes, sizeof codes);
            }
        }
    } else {
        const int64_t size = channels * kBits / 8 * 16;
#pragma GCC unroll 4
        for (int field = 0; field < 8 / kBits; ++field, to += size) {
            for (int64_t i = 0; i < size; i += sizeof(byte_pairs)) {
                const byte_pairs codes = field_bytes<kBits, 0>(bytes + i, field);
                memcpy(to + i, &codes, sizeof codes);
            }
        }
    }
}

struct StripScratch {
    uint8_t* bytes;  // [bytes of a band, rounded up to 16][16], and a vector more
    uint8_t* codes;  // [channels of a band, rounded up to 16][16], and a vector more
};

// A band of 16 slots: codes [channels][16 tokens] in scratch.codes.
inline void unpack_codes(const HeadView& view, const uint8_t* page, int64_t slot, const xquant_band& band,
                         const StripScratch& scratch) {
    const int64_t first_byte = view.head.runs[band.begin].byte;
    transpose_codes(page + view.codes(slot) + first_byte, view.head.row_bytes, band_bytes(view.head, band),
                    scratch.bytes);
    for (int64_t i = band.begin; i < band.end; ++i) {
        const xquant_run& run = view.head.runs[i];
        with_bits(run.bits, [&](auto bits) {
            unpack_run_codes<bits.value>(scratch.bytes + (run.byte - first_byte) * 16, run.channels,
                                         scratch.codes + (run.channel - band.channel) * 16);
        });
    }
}

// A band of 16 slots to [channels][stride].
inline void unpack_allocated_channels(const HeadView& view, const uint8_t* page, int64_t slot, int64_t index, float* to,
                                      int64_t stride, const StripScratch& scratch) {
    const xquant_band& band = view.head.bands[index];
    const float* step = view.head.step + band.channel;
    const float* zero = view.head.zero + band.channel;
    float tokens[kStrip];
    token_scales(view, page, slot, tokens);
    unpack_codes(view, page, slot, band, scratch);
    for (int64_t lane = 0; lane < kStrip; lane += kLanes) {
        const vf scale = load(tokens + lane);
#pragma GCC unroll 4
        for (int64_t channel = 0; channel < band.channels; ++channel) {
            const vf code = to_float(load_bytes(scratch.codes + channel * 16 + lane));
            store(to + channel * stride + lane, (code * step[channel] + zero[channel]) * scale);
        }
    }
}

// A band of 16 slots to [16][stride], rounded up to 16 channels. Out of line: inlined, it made attend_stretch() slower
// by 1% where no stream is allocated.
__attribute__((noinline)) inline void unpack_allocated_rows(const HeadView& view, const uint8_t* page, int64_t slot,
                                                            int64_t index, float* to, int64_t stride,
                                                            const StripScratch& scratch) {
    const xquant_band& band = view.head.bands[index];
    float tokens[kStrip];
    token_scales(view, page, slot, tokens);
    unpack_codes(view, page, slot, band, scratch);
    for (int64_t start = 0; start < band.channels; start += 16) {
        uint8_t rows[kStrip * 16];
        transpose_back(scratch.codes + start * 16, rows);
        for (int64_t lane = 0; lane < 16; lane += kLanes) {
            const vf step = load(view.head.step + band.channel + start + lane);
            const vf zero = load(view.head.zero + band.channel + start + lane);
#pragma GCC unroll 16
            for (int64_t token = 0; token < kStrip; ++token) {
                const vf code = to_float(load_bytes(rows + back_row(token) + lane));
                store(to + token * stride + start + lane, (code * step + zero) * tokens[token]);
            }
        }
    }
}

}  // namespace
}  // namespace xquant
