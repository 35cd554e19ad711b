// Keys of a tile: unpacked, rematerialized, normed and turned.
#pragma once

#include <stdint.h>

#include "api.h"
#include "attention/integer.h"
#include "attention/rematerialize.h"
#include "attention/tile.h"
#include "common/gemm.h"
#include "common/layout.h"
#include "common/simd.h"
#include "kernels.h"
#include "tiles/keys.h"
#include "unpack/unpack.h"
#include "unpack/unpack_allocated.h"

namespace xquant {
namespace {

// A band of the key latents of tokens start + [first, last), channel-major.
inline void load_key_latents(const xquant_plan& plan, const Pages& pages, int64_t kv_head, int64_t start,
                             int64_t first, int64_t last, const Band& band, const Scratch& scratch) {
    for (int64_t i = band.first; i < band.last; ++i) {
        const xquant_term& term = plan.key.terms[i];
        const HeadView view = head_view(plan, term, kv_head);
        for (int64_t strip = first; strip < last; strip += kStrip) {
            const int64_t position = start + strip;
            const uint8_t* page = pages.page(term, position);
            if (term.stream.allocated) {  // never added
                unpack_allocated_channels(view, page, pages.slot(position), band.index, scratch.latents + strip, kTile,
                                          scratch.strip);
                continue;
            }
            const auto unpack = i == band.first ? unpack_channels<false> : unpack_channels<true>;
            unpack(view, page, pages.slot(position), band.index, scratch.latents + strip, kTile, scratch.strip.bytes);
        }
    }
}

// Whether keys of a band are made by integer.h: codes of one term, and no FP16 numbers among them.
inline bool in_integers(const xquant_plan& plan, int64_t kv_head, const Band& band) {
    if (!kIntegers || !plan.key_integers || band.last - band.first > 1) return false;
    const HeadView view = head_view(plan, plan.key.terms[band.first], kv_head);
    const xquant_band& runs = view.head.bands[band.index];
    for (int64_t i = runs.begin; i < runs.end; ++i) {
        if (view.head.runs[i].bits == 16) return false;
    }
    return true;
}

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
// What a scale group's sums are multiplied by, for a strip.
inline void load_factors(const HeadView& view, const uint8_t* page, int64_t slot, int64_t run, float* scales,
                         float* zeros) {
    if (view.stream.allocated) {
        token_scales(view, page, slot, scales);
        store(zeros, load(scales));
    } else {
        store(scales, load_half(page + view.scale(run, slot)));
        store(zeros, load_half(page + view.zero(run, slot)));
    }
}

// Whether the codes of a uniform band need not become bytes first: see interleave_run.
inline bool straight(const HeadView& view, const xquant_band& runs, const int64_t* words) {
    for (int64_t i = runs.begin; i < runs.end; ++i) {
        const xquant_run& run = view.head.runs[i];
        if (words[i - runs.begin] || (run.bits != 4 && run.bits != 2)) return false;
        if (run.channels * run.bits / 8 % 16) return false;
    }
    return true;
}

// Keys of a band of tokens start + [first, last), added to scratch.keys or the first there. True if bias and RoPE are
// done, too; then keys go to `bfloats`, if that is not NULL.
inline bool load_integer_keys(const xquant_plan& plan, const Pages& pages, int64_t kv_head, int64_t start, int64_t first,
                              int64_t last, const Band& band, const Scratch& scratch, uint32_t* bfloats) {
    const int64_t head_size = plan.head_size;
    const xquant_term& term = plan.key.terms[band.first];
    const HeadView view = head_view(plan, term, kv_head);
    const xquant_band& runs = view.head.bands[band.index];
    const bool allocated = view.stream.allocated;
    const int64_t count = allocated ? 1 : runs.end - runs.begin;
    const int64_t first_scale_group = kv_head * plan.key_scale_groups + band.scale_group;
    const int64_t* words = plan.key_words + first_scale_group;
    const xquant_run* run_of = view.head.runs + runs.begin;
    const auto channel_of = [&](int64_t i) { return allocated ? 0 : run_of[i].channel - runs.channel; };
    const auto channels_of = [&](int64_t i) { return allocated ? band.channels : run_of[i].channels; };
    int32_t* codes = (int32_t*)scratch.latents;
    // Blocks turn four pairs of channels that are half of rotary_size apart.
    const bool finishes = !plan.key_norm && !plan.rotary_interleaved && plan.rotary_size % 8 == 0;
    Finish finish;
    finish.bias = plan.key_bias ? plan.key_bias + kv_head * head_size : nullptr;
    finish.half = plan.rotary_size / 2;
    finish.bfloats = bfloats;
    finish.rope = plan.rope ? plan.rope + start / kStrip * finish.half * 2 * kStrip : nullptr;
    for (int64_t strip = first; strip < last; strip += kStrip) {
        const uint8_t* page = pages.page(term, start + strip);
        if (!allocated && straight(view, runs, words)) {
            const uint8_t* row = page + view.codes(pages.slot(start + strip));
            for (int64_t i = 0; i < count; ++i) {
                const int64_t bits = run_of[i].bits, size = run_of[i].channels * bits / 8;
                const auto interleave = bits == 4 ? interleave_run<4> : interleave_run<2>;
                interleave(row + run_of[i].byte, view.head.row_bytes, size, codes + channel_of(i) / 2 * kTile + strip);
            }
            continue;
        }
        unpack_codes(view, page, pages.slot(start + strip), runs, scratch.strip);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t first_channel = channel_of(i);
            interleave_codes(scratch.strip.codes + first_channel * 16, words[i], channels_of(i),
                             codes + first_channel / 2 * kTile + strip);
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        const int64_t channel = channel_of(i), index = first_scale_group + i;
        const int64_t row = kv_head * plan.key.width + band.row + channel;
        ScaleGroup scale_group;
        scale_group.pairs = words[i] / 2;
        scale_group.quads = (channels_of(i) - words[i]) / 4;
        scale_group.up = plan.key_integers + row / 2 * head_size;
        const int64_t tile = kTiles ? plan.key_first_tiles[index] : -1, tile_bytes = round_up(head_size, 16) * 64;
        scale_group.tiles = tile < 0 ? nullptr : plan.key_tiles + tile * tile_bytes;
        scale_group.codes = codes + channel / 2 * kTile;
        scale_group.scales = scratch.scales;
        scale_group.zeros = scratch.zeros;
        scale_group.units = plan.key_units + index * head_size;
        scale_group.sums = plan.key_sums + index * head_size;
        scale_group.outlier_channels = band.index || channel ? 0 : view.stream.outlier_channels;
        scale_group.outliers = scratch.outliers;
        scale_group.up_outliers = plan.up_key + row * head_size;
        scale_group.accumulate = row > kv_head * plan.key.width;
        for (int64_t strip = first; strip < last; strip += kStrip) {
            const uint8_t* page = pages.page(term, start + strip);
            const int64_t slot = pages.slot(start + strip);
            load_factors(view, page, slot, runs.begin + i, scratch.scales + strip, scratch.zeros + strip);
            for (int64_t k = 0; k < scale_group.outlier_channels; ++k) {
                store(scratch.outliers + k * kTile + strip, load_half(page + view.outlier(k, slot)));
            }
        }
        const bool ends = finishes && index + 1 == (kv_head + 1) * plan.key_scale_groups;
#if defined(XQUANT_TILES)
        if (scale_group.tiles) {
            tile_keys(scale_group, ends ? finish : Finish{}, head_size, first, last, scratch.keys,
                      (int32_t*)scratch.products);
            continue;
        }
#endif
        integer_keys(scale_group, ends ? finish : Finish{}, head_size, first, last, scratch.keys);
    }
    return finishes && band.scale_group + count == plan.key_scale_groups;
}
#else
inline bool load_integer_keys(const xquant_plan&, const Pages&, int64_t, int64_t, int64_t, int64_t, const Band&,
                              const Scratch&, uint32_t*) {
    return false;
}
#endif

// Bias, norm and RoPE of keys of tokens start + [first, last).
inline void finish_keys(const xquant_plan& plan, int64_t kv_head, int64_t start, int64_t first, int64_t last,
                        const Scratch& scratch) {
    float* keys = scratch.keys + first;
    if (plan.key_bias) add_bias(plan.key_bias + kv_head * plan.head_size, plan.head_size, keys, kTile, last - first);
    if (plan.key_norm) {
        const float* weight = plan.key_norm + kv_head * plan.head_size;
        normalize(weight, plan.key_norm_eps, plan.head_size, keys, kTile, last - first);
    }
    if (!plan.rope) return;
    for (int64_t strip = first; strip < last; strip += kStrip) {
        rotate(plan, (start + strip) / kStrip, scratch.keys + strip, kTile);
    }
}

// Keys of tokens start + [first, last), channel-major; both bounds are multiples of 16. True if they are in `bfloats`,
// see Finish, and not in scratch.keys.
inline bool load_keys(const xquant_plan& plan, const Pages& pages, int64_t kv_head, int64_t start, int64_t first,
                      int64_t last, const Scratch& scratch, uint32_t* bfloats) {
    const float* up = plan.up_key + kv_head * plan.key.width * plan.head_size;
    float* keys = scratch.keys + first;
    bool finished = false;
    for_bands(plan.key, kv_head, [&](const Band& band) {
        if (in_integers(plan, kv_head, band)) {
            finished = load_integer_keys(plan, pages, kv_head, start, first, last, band, scratch, bfloats);
            return;
        }
        load_key_latents(plan, pages, kv_head, start, first, last, band, scratch);
        Product product;
        product.depth = band.channels;
        product.a = up + band.row * plan.head_size;
        product.lda = plan.head_size;
        product.b = scratch.latents + first;
        product.ldb = kTile;
        product.c = keys;
        product.ldc = kTile;
        product.accumulate = band.row > 0;
        gemm<Order::kTransposed>(plan.head_size, last - first, product);
    });
    if (finished) return bfloats != nullptr;
    finish_keys(plan, kv_head, start, first, last, scratch);
    return false;
}

}  // namespace
}  // namespace xquant
