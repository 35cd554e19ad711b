// Addresses in a page; the drawing is in xquant_vllm/codec/layout.py.
#pragma once

#include <stdint.h>

#include "api.h"

namespace xquant {
namespace {

// A strip: 16 neighbouring slots, which are read at once. It never crosses a page: block_size is a multiple of it.
constexpr int64_t kStrip = 16;

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// One latent head of one stream.
struct HeadView {
    const xquant_stream& stream;
    const xquant_head& head;
    int64_t index;  // of the head
    int64_t block_size;

    HeadView(const xquant_stream& of, int64_t at, int64_t slots)
        : stream(of), head(of.heads[at]), index(at), block_size(slots) {}

    // Offsets from the start of a page.
    int64_t codes(int64_t slot) const { return head.codes + slot * head.row_bytes; }
    int64_t scale(int64_t run, int64_t slot) const {
        return stream.scales + ((index * head.num_runs + run) * block_size + slot) * 2;
    }
    int64_t zero(int64_t run, int64_t slot) const { return scale(run, slot) - stream.scales + stream.zeros; }
    int64_t outlier(int64_t channel, int64_t slot) const {
        return stream.outliers + ((index * stream.outlier_channels + channel) * block_size + slot) * 2;
    }
    // Of an allocated stream: all runs'.
    int64_t token_scale(int64_t slot) const { return stream.scales + index * block_size + slot; }
};

// The latent head of a term that a kv head reads.
inline HeadView head_view(const xquant_plan& plan, const xquant_term& term, int64_t kv_head) {
    return HeadView(term.stream, term.stream.num_heads == 1 ? 0 : kv_head, plan.block_size);
}

// Codes of a band's tokens, in bytes; of FP16 numbers as well, which nobody asks for.
inline int64_t band_bytes(const xquant_head& head, const xquant_band& band) {
    const int64_t end = band.end < head.num_runs ? head.runs[band.end].byte : head.row_bytes;
    return end - head.runs[band.begin].byte;
}

// The largest band of a latent.
struct BandSize {
    int64_t channels = 0;
    int64_t bytes = 0;

    explicit BandSize(const xquant_latent& latent) {
        for (int64_t i = 0; i < latent.num_terms; ++i) {
            const xquant_stream& stream = latent.terms[i].stream;
            for (int64_t j = 0; j < stream.num_heads; ++j) add(stream.heads[j]);
        }
    }

private:
    void add(const xquant_head& head) {
        for (int64_t i = 0; i < head.num_bands; ++i) {
            const int64_t size = band_bytes(head, head.bands[i]);
            if (head.bands[i].channels > channels) channels = head.bands[i].channels;
            if (size > bytes) bytes = size;
        }
    }
};

inline int64_t most_outliers(const xquant_latent& latent) {
    int64_t most = 0;
    for (int64_t i = 0; i < latent.num_terms; ++i) {
        const int64_t count = latent.terms[i].stream.outlier_channels;
        if (count > most) most = count;
    }
    return most;
}

// A band of the terms [first, last), whose channels are added, at `row` of the latent.
struct Band {
    int64_t first, last;
    int64_t index;  // of the head's bands, the same in all of the terms
    int64_t row;
    int64_t channels;
    int64_t scale_group;  // the first; see attention/cpu/integers.py
};

// Call visit(band) for all stored channels of a latent that a kv head reads, in ascending order.
template <typename Visit>
inline void for_bands(const xquant_latent& latent, int64_t kv_head, const Visit& visit) {
    int64_t row = 0, scale_group = 0;
    for (int64_t first = 0, last; first < latent.num_terms; first = last) {
        for (last = first + 1; last < latent.num_terms && latent.terms[last].adds;) ++last;
        const xquant_stream& stream = latent.terms[first].stream;
        const xquant_head& head = stream.heads[stream.num_heads == 1 ? 0 : kv_head];
        for (int64_t i = 0; i < head.num_bands; ++i) {
            const xquant_band& band = head.bands[i];
            visit(Band{first, last, i, row + band.channel, band.channels, scale_group});
            scale_group += stream.allocated ? 1 : band.end - band.begin;
        }
        row += stream.width;
    }
}

}  // namespace
}  // namespace xquant
