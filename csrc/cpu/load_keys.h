// Keys of a tile: unpacked, rematerialized, normed and turned.
#pragma once

// A chunk of the key latents of tokens start + [first, last), channel-major.
inline void load_key_latents(const xquant_plan& plan, const Pages& pages, int64_t kv_head, int64_t start,
                             int64_t first, int64_t last, const Chunk& chunk, const Scratch& scratch) {
    for (int64_t i = chunk.first; i < chunk.last; ++i) {
        const xquant_term& term = plan.key.terms[i];
        const HeadView view = head_view(plan, term, kv_head);
        for (int64_t run = first; run < last; run += kRun) {
            const int64_t position = start + run;
            const uint8_t* page = pages.page(term, position);
            if (term.stream.allocated) {  // never added
                unpack_allocated_channels(view, page, pages.slot(position), chunk.index, scratch.latents + run, kTile,
                                          scratch.run);
                continue;
            }
            const auto unpack = i == chunk.first ? unpack_channels<false> : unpack_channels<true>;
            unpack(view, page, pages.slot(position), chunk.index, scratch.latents + run, kTile, scratch.run.bytes);
        }
    }
}

// Whether keys of a chunk are made by integer.h: codes of one term, and no FP16 numbers among them.
inline bool in_integers(const xquant_plan& plan, int64_t kv_head, const Chunk& chunk) {
    if (!kIntegers || !plan.key_integers || chunk.last - chunk.first > 1) return false;
    const HeadView view = head_view(plan, plan.key.terms[chunk.first], kv_head);
    const xquant_chunk& pieces = view.head.chunks[chunk.index];
    for (int64_t i = pieces.begin; i < pieces.end; ++i) {
        if (view.head.pieces[i].bits == 16) return false;
    }
    return true;
}

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
// What a segment's sums are multiplied by, for a run.
inline void load_factors(const HeadView& view, const uint8_t* page, int64_t slot, int64_t piece, float* scales,
                         float* zeros) {
    if (view.stream.allocated) {
        token_scales(view, page, slot, scales);
        store(zeros, load(scales));
    } else {
        store(scales, load_half(page + view.scale(piece, slot)));
        store(zeros, load_half(page + view.zero(piece, slot)));
    }
}

// Whether the codes of a uniform chunk need not become bytes first: see interleave_piece.
inline bool straight(const HeadView& view, const xquant_chunk& pieces, const int64_t* words) {
    for (int64_t i = pieces.begin; i < pieces.end; ++i) {
        const xquant_piece& piece = view.head.pieces[i];
        if (words[i - pieces.begin] || (piece.bits != 4 && piece.bits != 2)) return false;
        if (piece.channels * piece.bits / 8 % 16) return false;
    }
    return true;
}

// Keys of a chunk of tokens start + [first, last), added to scratch.keys or the first there. True if bias and RoPE are
// done, too.
inline bool load_integer_keys(const xquant_plan& plan, const Pages& pages, int64_t kv_head, int64_t start, int64_t first,
                              int64_t last, const Chunk& chunk, const Scratch& scratch) {
    const int64_t head_size = plan.head_size;
    const xquant_term& term = plan.key.terms[chunk.first];
    const HeadView view = head_view(plan, term, kv_head);
    const xquant_chunk& pieces = view.head.chunks[chunk.index];
    const bool allocated = view.stream.allocated;
    const int64_t count = allocated ? 1 : pieces.end - pieces.begin;
    const int64_t first_segment = kv_head * plan.key_segments + chunk.segment;
    const int64_t* words = plan.key_words + first_segment;
    const xquant_piece* piece_of = view.head.pieces + pieces.begin;
    const auto channel_of = [&](int64_t i) { return allocated ? 0 : piece_of[i].channel - pieces.channel; };
    const auto channels_of = [&](int64_t i) { return allocated ? chunk.channels : piece_of[i].channels; };
    int32_t* codes = (int32_t*)scratch.latents;
    // Blocks turn four pairs of channels that are half of rotary_size apart.
    const bool finishes = !plan.key_norm && !plan.rotary_interleaved && plan.rotary_size % 8 == 0;
    Finish finish;
    finish.bias = plan.key_bias ? plan.key_bias + kv_head * head_size : nullptr;
    finish.half = plan.rotary_size / 2;
    finish.rope = plan.rope ? plan.rope + start / kRun * finish.half * 2 * kRun : nullptr;
    for (int64_t run = first; run < last; run += kRun) {
        const uint8_t* page = pages.page(term, start + run);
        if (!allocated && straight(view, pieces, words)) {
            const uint8_t* row = page + view.codes(pages.slot(start + run));
            for (int64_t i = 0; i < count; ++i) {
                const int64_t bits = piece_of[i].bits, size = piece_of[i].channels * bits / 8;
                const auto interleave = bits == 4 ? interleave_piece<4> : interleave_piece<2>;
                interleave(row + piece_of[i].byte, view.head.row_bytes, size, codes + channel_of(i) / 2 * kTile + run);
            }
            continue;
        }
        unpack_codes(view, page, pages.slot(start + run), pieces, scratch.run);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t first_channel = channel_of(i);
            interleave_codes(scratch.run.codes + first_channel * 16, words[i], channels_of(i),
                             codes + first_channel / 2 * kTile + run);
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        const int64_t channel = channel_of(i), index = first_segment + i;
        const int64_t row = kv_head * plan.key.width + chunk.row + channel;
        Segment segment;
        segment.pairs = words[i] / 2;
        segment.quads = (channels_of(i) - words[i]) / 4;
        segment.up = plan.key_integers + row / 2 * head_size;
        segment.codes = codes + channel / 2 * kTile;
        segment.scales = scratch.scales;
        segment.zeros = scratch.zeros;
        segment.units = plan.key_units + index * head_size;
        segment.sums = plan.key_sums + index * head_size;
        segment.outlier_channels = chunk.index || channel ? 0 : view.stream.outlier_channels;
        segment.outliers = scratch.outliers;
        segment.up_outliers = plan.up_key + row * head_size;
        segment.accumulate = row > kv_head * plan.key.width;
        for (int64_t run = first; run < last; run += kRun) {
            const uint8_t* page = pages.page(term, start + run);
            const int64_t slot = pages.slot(start + run);
            load_factors(view, page, slot, pieces.begin + i, scratch.scales + run, scratch.zeros + run);
            for (int64_t k = 0; k < segment.outlier_channels; ++k) {
                store(scratch.outliers + k * kTile + run, load_half(page + view.outlier(k, slot)));
            }
        }
        const bool ends = finishes && index + 1 == (kv_head + 1) * plan.key_segments;
        integer_keys(segment, ends ? finish : Finish{}, head_size, first, last, scratch.keys);
    }
    return finishes && chunk.segment + count == plan.key_segments;
}
#else
inline bool load_integer_keys(const xquant_plan&, const Pages&, int64_t, int64_t, int64_t, int64_t, const Chunk&,
                              const Scratch&) {
    return false;
}
#endif

// Keys of tokens start + [first, last), channel-major; both bounds are multiples of 16.
inline void load_keys(const xquant_plan& plan, const Pages& pages, int64_t kv_head, int64_t start, int64_t first,
                      int64_t last, const Scratch& scratch) {
    const float* up = plan.up_key + kv_head * plan.key.width * plan.head_size;
    float* keys = scratch.keys + first;
    bool finished = false;
    for_chunks(plan.key, kv_head, [&](const Chunk& chunk) {
        if (in_integers(plan, kv_head, chunk)) {
            finished = load_integer_keys(plan, pages, kv_head, start, first, last, chunk, scratch);
            return;
        }
        load_key_latents(plan, pages, kv_head, start, first, last, chunk, scratch);
        Product product;
        product.depth = chunk.channels;
        product.a = up + chunk.row * plan.head_size;
        product.lda = plan.head_size;
        product.b = scratch.latents + first;
        product.ldb = kTile;
        product.c = keys;
        product.ldc = kTile;
        product.accumulate = chunk.row > 0;
        gemm<Order::kTransposed>(plan.head_size, last - first, product);
    });
    if (finished) return;
    if (plan.key_bias) add_bias(plan.key_bias + kv_head * plan.head_size, plan.head_size, keys, kTile, last - first);
    if (plan.key_norm) normalize(plan.key_norm, plan.key_norm_eps, plan.head_size, keys, kTile, last - first);
    if (plan.rope) {
        for (int64_t run = first; run < last; run += kRun) {
            rotate(plan, (start + run) / kRun, scratch.keys + run, kTile);
        }
    }
}
