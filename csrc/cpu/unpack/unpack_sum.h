// Terms that are added to a latent, several at once: a vector of sums is loaded and stored once for all of them, and
// their zeros are added up before. Of uniform streams, token-major.
#pragma once

#include <stdint.h>
#include <string.h>

#include "api.h"
#include "common/convert.h"
#include "common/layout.h"
#include "common/simd.h"
#include "unpack/unpack.h"

namespace xquant {
namespace {

constexpr int64_t kSummedTerms = 32;

// A term's head and the page of a strip.
struct SumTerm {
    const xquant_head* head;
    int64_t scales;  // of its stream
    int64_t zeros;
    int64_t index;  // of the head
    const uint8_t* page;

    int64_t scale(int64_t block_size, int64_t slot, int64_t run) const {
        return ((index * head->num_runs + run) * block_size + slot) * 2;
    }
};

// Store the first `count` lanes.
inline void store_lanes(float* to, vf x, int64_t count) {
    if (count >= kLanes) return store(to, x);
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)x);
#else
    for (int64_t i = 0; i < count; ++i) to[i] = x[i];
#endif
}

// The fields of a run of kBits bits: channel field * size + i is field `field` of byte i.
template <int kBits>
struct Fields {
    static constexpr int kHigh = kTwoPlanes<kBits> ? kHighBits<kBits> : kBits;
    static constexpr int kCount = 8 / kHigh;

    static int64_t size(int64_t channels) { return channels * kHigh / 8; }
    static vi codes(const uint8_t* bytes, int64_t size, int64_t i, int field) {
        if constexpr (kTwoPlanes<kBits>) {
            const vi low = field_codes<2 * kHigh>(bytes + (field & 1) * size + i, field >> 1);
            return low | field_codes<kHigh>(bytes + 2 * size + i, field) << (2 * kHigh);
        } else {
            return field_codes<kBits>(bytes + i, field);
        }
    }
};

// A run of one token: its codes in every term, times the terms' scales.
template <int kBits>
inline void add_run_row(const uint8_t* const* codes, const float* scales, int64_t terms, int64_t channels, float zero,
                        float* to) {
    using F = Fields<kBits>;
    const int64_t size = F::size(channels);
    for (int64_t i = 0; i < size; i += kLanes) {
        vf sums[F::kCount];
#pragma GCC unroll 8
        for (int field = 0; field < F::kCount; ++field) sums[field] = load(to + field * size + i) + zero;
        for (int64_t term = 0; term < terms; ++term) {
            const vf scale = broadcast(scales[term]);
#pragma GCC unroll 8
            for (int field = 0; field < F::kCount; ++field) {
                sums[field] += to_float(F::codes(codes[term], size, i, field)) * scale;
            }
        }
        // Ascending: lanes past a field are those of the next, which are not stored.
#pragma GCC unroll 8
        for (int field = 0; field < F::kCount; ++field) store_lanes(to + field * size + i, sums[field], size - i);
    }
}

// A run of FP16 numbers of one token.
inline void add_numbers_row(const uint8_t* const* codes, int64_t terms, int64_t channels, float* to) {
    for (int64_t i = 0; i < channels; i += kStrip) {
        const int64_t count = channels - i < kStrip ? channels - i : kStrip;
        for (int64_t term = 0; term < terms; ++term) {
            float numbers[kStrip];
            load_row(XQUANT_FP16, codes[term], i, count, numbers);
            for (int64_t j = 0; j < count; ++j) to[i + j] += numbers[j];
        }
    }
}

// Add a band of some terms with the same bits and runs to tokens [first, last) of a strip, [16][stride]. At most
// kSummedTerms terms, without outlier channels.
inline void add_rows(const SumTerm* terms, int64_t count, int64_t block_size, int64_t slot, int64_t index, int64_t first,
                     int64_t last, float* to, int64_t stride) {
    const xquant_head& head = *terms[0].head;
    const xquant_band& band = head.bands[index];
    for (int64_t i = band.begin; i < band.end; ++i) {
        const xquant_run& run = head.runs[i];
        float scales[kStrip][kSummedTerms], zeros[kStrip];
        const uint8_t* codes[kSummedTerms];
        for (int64_t lane = 0; lane < kStrip; lane += kLanes) store(zeros + lane, vf{});
        for (int64_t term = 0; term < count; ++term) {
            const SumTerm& t = terms[term];
            codes[term] = t.page + t.head->codes + slot * t.head->row_bytes + run.byte;
            if (run.bits == 16) continue;
            const uint8_t* factors = t.page + t.scale(block_size, slot, i);
            for (int64_t lane = 0; lane < kStrip; lane += kLanes) {
                float scale[kLanes];
                store(scale, load_half(factors + t.scales + lane * 2));
                for (int64_t j = 0; j < kLanes; ++j) scales[lane + j][term] = scale[j];
                store(zeros + lane, load(zeros + lane) + load_half(factors + t.zeros + lane * 2));
            }
        }
        float* rows = to + (run.channel - band.channel);
        const auto add = [&](const auto& add_row) {
            for (int64_t token = first; token < last; ++token) {
                const uint8_t* at[kSummedTerms];
                for (int64_t term = 0; term < count; ++term) at[term] = codes[term] + token * head.row_bytes;
                add_row(at, token, rows + token * stride);
            }
        };
        if (run.bits == 16) {
            add([&](const uint8_t* const* at, int64_t, float* row) { add_numbers_row(at, count, run.channels, row); });
            continue;
        }
        with_bits(run.bits, [&](auto bits) {
            add([&](const uint8_t* const* at, int64_t token, float* row) {
                add_run_row<bits.value>(at, scales[token], count, run.channels, zeros[token], row);
            });
        });
    }
}

}  // namespace
}  // namespace xquant
