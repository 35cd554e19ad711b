// Addresses in a page; the drawing is in xquant_vllm/codec/layout.py.
#pragma once

// Slots are read in runs of 16, which never cross a page: block_size is a multiple of it.
constexpr int64_t kRun = 16;

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// One latent head of one stream.
struct HeadView {
    const xquant_stream& stream;
    int64_t head;
    int64_t block_size;

    int64_t group_bytes() const { return stream.group_size * stream.bits / 8; }
    int64_t num_groups() const { return stream.width / stream.group_size; }
    int64_t row_bytes() const { return num_groups() * group_bytes(); }

    // Offsets from the start of a page.
    int64_t codes(int64_t slot) const { return stream.codes + (head * block_size + slot) * row_bytes(); }
    int64_t scale(int64_t group, int64_t slot) const {
        return stream.scales + ((head * num_groups() + group) * block_size + slot) * 2;
    }
    int64_t zero(int64_t group, int64_t slot) const { return scale(group, slot) - stream.scales + stream.zeros; }
    int64_t outlier(int64_t channel, int64_t slot) const {
        return stream.outliers + ((head * stream.outlier_channels + channel) * block_size + slot) * 2;
    }
};

// The latent head of a term that a kv head reads.
inline HeadView head_view(const xquant_plan& plan, const xquant_term& term, int64_t kv_head) {
    return HeadView{term.stream, term.stream.num_heads == 1 ? 0 : kv_head, plan.block_size};
}

// Groups that are dequantized before they are multiplied: whole groups, about 256 channels, so that a tile of a joint
// basis stays in cache. A chunk that is not the last has a multiple of 16 channels.
inline int64_t groups_at_once(const xquant_stream& stream) {
    const int64_t groups = stream.group_size >= 256 ? 1 : 256 / stream.group_size;
    return stream.group_size % kPad ? round_up(groups, 2) : groups;
}

// Channels of the largest chunk.
inline int64_t channels_at_once(const xquant_latent& latent) {
    int64_t most = 0;
    for (int64_t i = 0; i < latent.num_terms; ++i) {
        const xquant_stream& stream = latent.terms[i].stream;
        const int64_t channels = groups_at_once(stream) * stream.group_size;
        const int64_t here = channels < stream.width ? channels : stream.width;
        if (here > most) most = here;
    }
    return most;
}

// Bytes of the largest group of codes.
inline int64_t most_group_bytes(const xquant_latent& latent) {
    int64_t most = 0;
    for (int64_t i = 0; i < latent.num_terms; ++i) {
        const xquant_stream& stream = latent.terms[i].stream;
        const int64_t bytes = stream.group_size * stream.bits / 8;
        if (bytes > most) most = bytes;
    }
    return most;
}

// Groups [begin, end) of the terms [first, last), whose channels are added, at `row` of the latent.
struct Chunk {
    int64_t first, last;
    int64_t begin, end;
    int64_t row;
    int64_t channels;
};

// Call visit(chunk) for all channels of a latent, in ascending order.
template <typename Visit>
inline void for_chunks(const xquant_latent& latent, const Visit& visit) {
    int64_t row = 0;
    for (int64_t first = 0, last; first < latent.num_terms; first = last) {
        for (last = first + 1; last < latent.num_terms && latent.terms[last].adds;) ++last;
        const xquant_stream& stream = latent.terms[first].stream;
        const int64_t groups = stream.width / stream.group_size, step = groups_at_once(stream);
        for (int64_t begin = 0; begin < groups; begin += step) {
            const int64_t end = begin + step < groups ? begin + step : groups;
            visit(Chunk{first, last, begin, end, row + begin * stream.group_size, (end - begin) * stream.group_size});
        }
        row += stream.width;
    }
}
