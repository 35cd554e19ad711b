// Latents of a tile, token-major: unpacked, and summed up where terms are added.
#pragma once

#include <stdint.h>

#include "api.h"
#include "attention/tile.h"
#include "common/layout.h"
#include "common/simd.h"
#include "unpack/unpack.h"
#include "unpack/unpack_allocated.h"
#include "unpack/unpack_sum.h"

namespace xquant {
namespace {

// Add terms [first, last) of a band, which have the same bits and runs, to tokens [from, to) of a strip.
inline void add_terms(const xquant_plan& plan, const Pages& pages, const xquant_latent& latent, int64_t kv_head,
                      int64_t first, int64_t last, int64_t index, int64_t position, int64_t from, int64_t to, float* rows,
                      int64_t stride) {
    SumTerm terms[kSummedTerms];
    for (int64_t i = first; i < last; ++i) {
        const xquant_term& term = latent.terms[i];
        const HeadView view = head_view(plan, term, kv_head);
        terms[i - first] = {&view.head, view.stream.scales, view.stream.zeros, view.index, pages.page(term, position)};
    }
    add_rows(terms, last - first, plan.block_size, pages.slot(position), index, from, to, rows, stride);
}

// A band of the latents of tokens start + [first, last) to [kTile][stride]; only these tokens: pages of others may hold
// anything, and 0 * NaN is NaN. Rows have room for kPad more floats.
inline void load_latents(const xquant_plan& plan, const Pages& pages, const xquant_latent& latent, int64_t kv_head,
                         int64_t start, int64_t first, int64_t last, const Band& band, const StripScratch& scratch,
                         float* to, int64_t stride) {
    for (int64_t strip = first / kStrip * kStrip; strip < last; strip += kStrip) {
        const int64_t from = first > strip ? first - strip : 0, end = last < strip + kStrip ? last - strip : kStrip;
        const int64_t position = start + strip;
        float* rows = to + strip * stride;
        const xquant_term& term = latent.terms[band.first];
        const HeadView view = head_view(plan, term, kv_head);
        const uint8_t* page = pages.page(term, position);
        if (term.stream.allocated) {  // never added
            unpack_allocated_rows(view, page, pages.slot(position), band.index, rows, stride, scratch);
            continue;
        }
        unpack_rows(view, page, pages.slot(position), band.index, from, end, rows, stride);
        const auto bits = [&](int64_t i) { return head_view(plan, latent.terms[i], kv_head).head.runs[0].bits; };
        for (int64_t i = band.first + 1, next; i < band.last; i = next) {
            for (next = i + 1; next < band.last && next < i + kSummedTerms && bits(next) == bits(i);) ++next;
            add_terms(plan, pages, latent, kv_head, i, next, band.index, position, from, end, rows, stride);
        }
    }
}

}  // namespace
}  // namespace xquant
