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
    float* row;   // [head_size], of one token
    float* turn;  // [rotary_size], see load_turn
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
        turn = memory ? row + head : nullptr;
        floats = kStrip * term_stride + head + round_up(plan.rotary_size, kPad);
    }
};

inline int64_t hot_scratch(const xquant_plan& plan) { return HotScratch(plan, nullptr).floats; }

// A latent of some tokens, to be read from the pages of a layer.
struct Reading {
    const xquant_latent& latent;
    const xquant_pages* pages;
    const int64_t* slots;
    int64_t first_term;  // terms before this one are in `latents` already
    float* latents;      // [tokens, heads of the latent, its width]
};

// Tokens first ... first + count - 1, whose slots follow each other in one strip.
inline void read_strip(const xquant_plan& plan, const Reading& reading, int64_t first, int64_t count,
                       const HotScratch& scratch) {
    const xquant_latent& latent = reading.latent;
    const int64_t slot = reading.slots[first], block = slot / plan.block_size, offset = slot % plan.block_size;
    const int64_t strip = offset / kStrip * kStrip, begin = offset - strip;
    for (int64_t head = 0; head < latent.num_heads; ++head) {
        float* rows = reading.latents + (first * latent.num_heads + head) * latent.width;
        const int64_t stride = latent.num_heads * latent.width;
        int64_t row = 0, end = 0;
        for (int64_t i = 0; i < latent.num_terms; ++i) {
            const xquant_term& term = latent.terms[i];
            const int64_t width = term.stream.width;
            if (!term.adds) {
                row = end;
                end += width;
            }
            if (i < reading.first_term) continue;
            const xquant_pages& pages = reading.pages[term.page];
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

// Tokens first ... last - 1.
inline void read_rows(const xquant_plan& plan, const Reading& reading, int64_t first, int64_t last,
                      const HotScratch& scratch) {
    const int64_t* slots = reading.slots;
    for (int64_t begin = first, end; begin < last; begin = end) {
        const int64_t slot = slots[begin];
        for (end = begin + 1; end < last && slots[end] == slot + end - begin && slots[end] % kStrip;) ++end;
        read_strip(plan, reading, begin, end - begin, scratch);
    }
}

// Read tokens first ... first + count - 1 into the call's latents and output.
inline void read_tokens(const xquant_plan& plan, const xquant_read_call& call, int64_t first, int64_t count,
                        float* memory) {
    const xquant_latent& latent = call.values ? plan.value : plan.key;
    const Reading reading = {latent, call.pages, call.slots, call.first_term, call.latents};
    read_rows(plan, reading, first, first + count, HotScratch(plan, memory));
    if (!call.output) return;
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

// The cosines of all pairs at a position, then the sines: [rotary_size].
inline void load_turn(const xquant_plan& plan, int64_t position, float* turn) {
    const int64_t half = plan.rotary_size / 2;
    const float* table = plan.rope + position / kStrip * plan.rotary_size * kStrip + position % kStrip;
    for (int64_t pair = 0; pair < half; ++pair) {
        turn[pair] = table[pair * 2 * kStrip];
        turn[half + pair] = table[(pair * 2 + 1) * kStrip];
    }
}

inline void rotate_head(const xquant_plan& plan, const float* __restrict turn, float* head) {
    const int64_t half = plan.rotary_size / 2;
    if (plan.rotary_interleaved) {
        for (int64_t pair = 0; pair < half; ++pair) {
            const float x = head[2 * pair], y = head[2 * pair + 1];
            head[2 * pair] = x * turn[pair] - y * turn[half + pair];
            head[2 * pair + 1] = y * turn[pair] + x * turn[half + pair];
        }
        return;
    }
    float* __restrict first = head;
    float* __restrict second = head + half;
    for (int64_t pair = 0; pair < half; ++pair) {
        const float x = first[pair], y = second[pair];
        first[pair] = x * turn[pair] - y * turn[half + pair];
        second[pair] = y * turn[pair] + x * turn[half + pair];
    }
}

inline void add_row(const float* __restrict bias, int64_t count, float* __restrict row) {
    for (int64_t i = 0; i < count; ++i) row[i] += bias[i];
}

// Bias, norm and RoPE of one key; `turn` is not read without RoPE.
inline void finish_key(const xquant_plan& plan, int64_t kv_head, const float* turn, float* key) {
    if (plan.key_bias) add_row(plan.key_bias + kv_head * plan.head_size, plan.head_size, key);
    if (plan.key_norm) {
        normalize_head(plan.key_norm + kv_head * plan.head_size, plan.key_norm_eps, plan.head_size, key);
    }
    if (plan.rope) rotate_head(plan, turn, key);
}

// Bias, norm and RoPE of keys and bias of values of tokens first ... first + count - 1.
inline void finish_tokens(const xquant_plan& plan, const xquant_finish_call& call, int64_t first, int64_t count,
                          float* memory) {
    const HotScratch scratch(plan, memory);
    const int64_t head_size = plan.head_size;
    for (int64_t token = first; token < first + count; ++token) {
        if (plan.rope) load_turn(plan, call.positions[token], scratch.turn);
        for (int64_t head = 0; head < plan.num_kv_heads; ++head) {
            if (plan.key_bias || plan.key_norm || plan.rope) {
                const int64_t at = token * call.key_token_stride + head * call.key_head_stride;
                load_row(call.dtype, call.keys, at, head_size, scratch.row);
                finish_key(plan, head, scratch.turn, scratch.row);
                store_row(call.dtype, scratch.row, head_size, call.keys, at);
            }
            if (plan.value_bias) {
                const int64_t at = token * call.value_token_stride + head * call.value_head_stride;
                load_row(call.dtype, call.values, at, head_size, scratch.row);
                add_row(plan.value_bias + head * head_size, head_size, scratch.row);
                store_row(call.dtype, scratch.row, head_size, call.values, at);
            }
        }
    }
}

}  // namespace
}  // namespace xquant
