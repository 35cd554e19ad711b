// Addresses in a page; the drawing is in xquant_vllm/codec/layout.py.
#pragma once

// Slots are read in runs of 16, which never cross a page: block_size is a multiple of it.
constexpr int64_t kRun = 16;

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
    int64_t scale(int64_t piece, int64_t slot) const {
        return stream.scales + ((index * head.num_pieces + piece) * block_size + slot) * 2;
    }
    int64_t zero(int64_t piece, int64_t slot) const { return scale(piece, slot) - stream.scales + stream.zeros; }
    int64_t outlier(int64_t channel, int64_t slot) const {
        return stream.outliers + ((index * stream.outlier_channels + channel) * block_size + slot) * 2;
    }
    // Of an allocated stream: all pieces'.
    int64_t token_scale(int64_t slot) const { return stream.scales + index * block_size + slot; }
};

// The latent head of a term that a kv head reads.
inline HeadView head_view(const xquant_plan& plan, const xquant_term& term, int64_t kv_head) {
    return HeadView(term.stream, term.stream.num_heads == 1 ? 0 : kv_head, plan.block_size);
}

// Codes of a chunk's tokens, in bytes; of FP16 numbers as well, which nobody asks for.
inline int64_t chunk_bytes(const xquant_head& head, const xquant_chunk& chunk) {
    const int64_t end = chunk.end < head.num_pieces ? head.pieces[chunk.end].byte : head.row_bytes;
    return end - head.pieces[chunk.begin].byte;
}

// The largest chunk of a latent.
struct ChunkSize {
    int64_t channels = 0;
    int64_t bytes = 0;

    explicit ChunkSize(const xquant_latent& latent) {
        for (int64_t i = 0; i < latent.num_terms; ++i) {
            const xquant_stream& stream = latent.terms[i].stream;
            for (int64_t j = 0; j < stream.num_heads; ++j) add(stream.heads[j]);
        }
    }

private:
    void add(const xquant_head& head) {
        for (int64_t i = 0; i < head.num_chunks; ++i) {
            const int64_t size = chunk_bytes(head, head.chunks[i]);
            if (head.chunks[i].channels > channels) channels = head.chunks[i].channels;
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

// A chunk of the terms [first, last), whose channels are added, at `row` of the latent.
struct Chunk {
    int64_t first, last;
    int64_t index;  // of the head's chunks, the same in all of the terms
    int64_t row;
    int64_t channels;
    int64_t segment;  // the first; see cpu_integers.py
};

// Call visit(chunk) for all stored channels of a latent that a kv head reads, in ascending order.
template <typename Visit>
inline void for_chunks(const xquant_latent& latent, int64_t kv_head, const Visit& visit) {
    int64_t row = 0, segment = 0;
    for (int64_t first = 0, last; first < latent.num_terms; first = last) {
        for (last = first + 1; last < latent.num_terms && latent.terms[last].adds;) ++last;
        const xquant_stream& stream = latent.terms[first].stream;
        const xquant_head& head = stream.heads[stream.num_heads == 1 ? 0 : kv_head];
        for (int64_t i = 0; i < head.num_chunks; ++i) {
            const xquant_chunk& chunk = head.chunks[i];
            visit(Chunk{first, last, i, row + chunk.channel, chunk.channels, segment});
            segment += stream.allocated ? 1 : chunk.end - chunk.begin;
        }
        row += stream.width;
    }
}
