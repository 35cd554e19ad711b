// Single tokens for the pool of hot blocks: latents read from their pages, and what follows the product.
#pragma once

#include <stdint.h>
#include <string.h>

#include "api.h"
#include "common/convert.h"
#include "common/layout.h"
#include "kernels.h"
#include "unpack/unpack.h"

namespace xquant {
namespace {

struct HotScratch {
    float* term;  // [kStrip][term_stride], of one head
    float* row;   // [row], of one token: all heads, or one
    int64_t term_stride;
    int64_t floats;

    // Without memory only the size is right.
    HotScratch(const xquant_plan& plan, float* memory) {
        int64_t width = 0;
        const xquant_latent* latents[] = {&plan.key, &plan.value};
        for (const xquant_latent* latent : latents) {
            for (int64_t i = 0; i < latent->num_terms; ++i) {
                if (latent->terms[i].stream.width > width) width = latent->terms[i].stream.width;
            }
        }
        term_stride = round_up(width, kPad) + kPad;  // unpack_rows writes past its last run
        const int64_t head = round_up(plan.head_size, kPad);
        term = memory;
        row = memory ? memory + kStrip * term_stride : nullptr;
        floats = kStrip * term_stride + head;
    }
};

inline int64_t hot_scratch(const xquant_plan& plan) { return HotScratch(plan, nullptr).floats; }

// Tokens first ... first + count - 1, whose slots follow each other in one strip.
inline void read_strip(const xquant_plan& plan, const xquant_read_call& call, int64_t first, int64_t count,
                     const HotScratch& scratch) {
    const xquant_latent& latent = call.values ? plan.value : plan.key;
    const int64_t slot = call.slots[first], block = slot / plan.block_size, offset = slot % plan.block_size;
    const int64_t strip = offset / kStrip * kStrip, begin = offset - strip;
    for (int64_t head = 0; head < latent.num_heads; ++head) {
        float* rows = call.latents + (first * latent.num_heads + head) * latent.width;
        const int64_t stride = latent.num_heads * latent.width;
        int64_t row = 0, end = 0;
        for (int64_t i = 0; i < latent.num_terms; ++i) {
            const xquant_term& term = latent.terms[i];
            const int64_t width = term.stream.width;
            if (!term.adds) {
                row = end;
                end += width;
            }
            if (i < call.first_term) continue;
            const xquant_pages& pages = call.pages[term.page];
            const HeadView view = head_view(plan, term, head);
            for (int64_t j = 0; j < view.head.num_bands; ++j) {
                unpack_rows(view, pages.data + block * pages.stride, strip, j, begin, begin + count,
                            scratch.term + view.head.bands[j].channel, scratch.term_stride);
            }
            for (int64_t token = 0; token < count; ++token) {
                float* x = scratch.term + (begin + token) * scratch.term_stride;
                float* to = rows + token * stride + row;
                for (int64_t k = view.head.channels; k < width; ++k) x[k] = 0.0f;
                if (term.adds) {
                    for (int64_t k = 0; k < width; ++k) to[k] += x[k];
                } else {
                    memcpy(to, x, width * sizeof(float));
                }
            }
        }
    }
}

// Read tokens first ... first + count - 1 into the call's latents and output.
inline void read_tokens(const xquant_plan& plan, const xquant_read_call& call, int64_t first, int64_t count,
                        float* memory) {
    const HotScratch scratch(plan, memory);
    const int64_t last = first + count;
    for (int64_t begin = first, end; begin < last; begin = end) {
        const int64_t slot = call.slots[begin];
        for (end = begin + 1; end < last && call.slots[end] == slot + end - begin && call.slots[end] % kStrip;) ++end;
        read_strip(plan, call, begin, end - begin, scratch);
    }
    if (!call.output) return;
    const xquant_latent& latent = call.values ? plan.value : plan.key;
    const int64_t elements = latent.num_heads * latent.width;
    store_row(call.dtype, call.latents + first * elements, count * elements, call.output, first * elements);
}

// RMS norm of a head.
inline void normalize_head(const float* weight, float eps, int64_t head_size, float* head) {
    float squares = 0.0f;
    for (int64_t i = 0; i < head_size; ++i) squares += head[i] * head[i];
    const float factor = 1.0f / __builtin_sqrtf(squares / (float)head_size + eps);
    for (int64_t i = 0; i < head_size; ++i) head[i] = head[i] * factor * weight[i];
}

inline void rotate_head(const xquant_plan& plan, const float* cosines, float* head) {
    const int64_t half = plan.rotary_size / 2;
    const int64_t step = plan.rotary_interleaved ? 2 : 1, apart = plan.rotary_interleaved ? 1 : half;
    for (int64_t pair = 0; pair < half; ++pair) {
        const float cosine = cosines[pair * 2 * kStrip], sine = cosines[(pair * 2 + 1) * kStrip];
        float* first = head + pair * step;
        const float x = first[0], y = first[apart];
        first[0] = x * cosine - y * sine;
        first[apart] = y * cosine + x * sine;
    }
}

// Bias, norm and RoPE of keys and bias of values of tokens first ... first + count - 1.
inline void finish_tokens(const xquant_plan& plan, const xquant_finish_call& call, int64_t first, int64_t count,
                          float* memory) {
    const HotScratch scratch(plan, memory);
    const int64_t head_size = plan.head_size;
    for (int64_t token = first; token < first + count; ++token) {
        const int64_t position = call.positions[token];
        const float* cosines = nullptr;
        if (plan.rope) cosines = plan.rope + position / kStrip * plan.rotary_size * kStrip + position % kStrip;
        for (int64_t head = 0; head < plan.num_kv_heads; ++head) {
            if (plan.key_bias || plan.key_norm || plan.rope) {
                const int64_t at = token * call.key_token_stride + head * call.key_head_stride;
                load_row(call.dtype, call.keys, at, head_size, scratch.row);
                if (plan.key_bias) {
                    const float* bias = plan.key_bias + head * head_size;
                    for (int64_t i = 0; i < head_size; ++i) scratch.row[i] += bias[i];
                }
                if (plan.key_norm) normalize_head(plan.key_norm, plan.key_norm_eps, head_size, scratch.row);
                if (plan.rope) rotate_head(plan, cosines, scratch.row);
                store_row(call.dtype, scratch.row, head_size, call.keys, at);
            }
            if (plan.value_bias) {
                const int64_t at = token * call.value_token_stride + head * call.value_head_stride;
                const float* bias = plan.value_bias + head * head_size;
                load_row(call.dtype, call.values, at, head_size, scratch.row);
                for (int64_t i = 0; i < head_size; ++i) scratch.row[i] += bias[i];
                store_row(call.dtype, scratch.row, head_size, call.values, at);
            }
        }
    }
}

}  // namespace
}  // namespace xquant
