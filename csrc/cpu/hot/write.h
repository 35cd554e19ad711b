// Tokens of pages into the pool of hot blocks: latents are read, multiplied, finished and written.
#pragma once

#include <stdint.h>
#include <string.h>

#include "api.h"
#include "common/convert.h"
#include "common/gemm.h"
#include "common/layout.h"
#include "hot/hot_tokens.h"
#include "hot/product.h"
#include "kernels.h"

namespace xquant {
namespace {

// What some tokens have in memory between reading and multiplying, beside a thread's HotScratch.
struct HotStage {
    float* latents[2];     // [tokens, heads of the latent, its width] of keys and of values; one where these share it
    uint16_t* rounded[2];  // the same in BF16, if that is what is multiplied
    float* turns;          // [tokens, rotary_size]
    int64_t floats;

    // Without memory only the size is right.
    HotStage(const xquant_plan& plan, const xquant_hot_layer& layer, int64_t tokens, float* memory) {
        floats = 0;
        const auto take = [this, memory](int64_t count) {
            const int64_t at = floats;
            floats += round_up(count, kPad);
            return memory ? memory + at : nullptr;
        };
        for (int of = 0; of < 2; ++of) {
            const xquant_latent& latent = of ? plan.value : plan.key;
            const int64_t numbers = tokens * latent.num_heads * latent.width;
            if (of && layer.shared) {
                latents[1] = latents[0];
                rounded[1] = rounded[0];
                continue;
            }
            latents[of] = take(numbers);
            rounded[of] = layer.dtype == XQUANT_BF16 ? (uint16_t*)take((numbers + 1) / 2) : nullptr;
        }
        turns = take(tokens * plan.rotary_size);
    }
};

inline int64_t hot_stage(const xquant_plan& plan, const xquant_hot_layer& layer, int64_t tokens) {
    return HotStage(plan, layer, tokens, nullptr).floats;
}

// One head of the tokens of a stage: [tokens][padded head_size], in FP32 and in the pool's dtype.
inline int64_t hot_heads_scratch(const xquant_plan& plan, int64_t tokens) {
    return 2 * tokens * round_up(plan.head_size, kPad);
}

// Read tokens first ... first + count - 1 into `stage`, which has room for `room` tokens, from its token `at` on.
inline void hot_read(const xquant_plan& plan, const xquant_hot_layer& layer, const xquant_hot_call& call, int64_t first,
                     int64_t count, float* memory, int64_t room, int64_t at, float* scratch) {
    const HotStage stage(plan, layer, room, memory);
    const HotScratch own(plan, scratch);
    for (int of = 0; of < (layer.shared ? 1 : 2); ++of) {
        const xquant_latent& latent = of ? plan.value : plan.key;
        const int64_t numbers = latent.num_heads * latent.width;
        float* latents = stage.latents[of] + at * numbers;
        if (call.latents) latents = call.latents + first * numbers;
        read_rows(plan, {latent, call.pages, call.slots + first, call.first_term, latents}, 0, count, own);
        if (layer.dtype == XQUANT_BF16) {
            store_row(XQUANT_BF16, latents, count * numbers, stage.rounded[of] + at * numbers, 0);
        }
        if (call.latents && (layer.dtype != XQUANT_BF16 || !layer.up_value)) {
            memcpy(stage.latents[of] + at * numbers, latents, count * numbers * sizeof(float));
        }
    }
    if (!plan.rope) return;
    for (int64_t token = 0; token < count; ++token) {
        load_turn(plan, call.positions[first + token], stage.turns + (at + token) * plan.rotary_size);
    }
}

// Multiply one head of `count` tokens of a stage into `heads` [count][stride], FP32.
inline void multiply_heads(const xquant_plan& plan, const xquant_hot_layer& layer, const HotStage& stage, bool values,
                           int64_t kv_head, int64_t count, float* heads, int64_t stride) {
    const xquant_latent& latent = values ? plan.value : plan.key;
    const int64_t at = latent.num_heads == 1 ? 0 : kv_head * latent.width, lda = latent.num_heads * latent.width;
    const void* up = values ? layer.up_value : layer.up_key;
    if (!up) {
        for (int64_t token = 0; token < count; ++token) {
            memcpy(heads + token * stride, stage.latents[1] + token * lda + at, plan.head_size * sizeof(float));
        }
    } else if (layer.dtype == XQUANT_BF16) {
        const uint16_t* panels = (const uint16_t*)up + kv_head * latent.width * stride;
        bf16_product(count, stride, {latent.width / 2, stage.rounded[values] + at, lda, panels, heads, stride});
    } else {
        const float* matrix = (const float*)up + kv_head * latent.width * stride;
        gemm<Order::kPlain>(count, stride,
                            {latent.width, stage.latents[values] + at, lda, matrix, stride, heads, stride, false});
    }
}

// Numbers of one head to where the pool has them. Of most layouts either the tokens or the channels of a block follow
// each other.
template <typename Number>
inline void scatter_heads(const Number* __restrict heads, int64_t stride, int64_t head_size, int64_t block_size,
                          const xquant_hot_places& places, const int64_t* slots, int64_t count, int64_t block_stride,
                          Number* pool) {
    for (int64_t token = 0; token < count; ++token) {
        const int64_t block = slots[token] / block_size, slot = slots[token] % block_size;
        Number* to = pool + block * block_stride + places.tokens[slot];
        const Number* from = heads + token * stride;
        if (places.contiguous) {
            memcpy(to, from, head_size * sizeof(Number));
        } else {
            for (int64_t i = 0; i < head_size; ++i) to[places.channels[i]] = from[i];
        }
    }
}

// Make keys or values of one kv head of tokens first ... first + count - 1, which are the stage's first, and write them.
inline void hot_write(const xquant_plan& plan, const xquant_hot_layer& layer, const xquant_hot_call& call, bool values,
                      int64_t kv_head, int64_t first, int64_t count, float* memory, int64_t room, float* scratch) {
    const HotStage stage(plan, layer, room, memory);
    const int64_t stride = round_up(plan.head_size, kPad);
    float* heads = scratch;
    void* rounded = layer.dtype == XQUANT_FP32 ? heads : heads + count * stride;
    multiply_heads(plan, layer, stage, values, kv_head, count, heads, stride);
    for (int64_t token = 0; token < count; ++token) {
        float* head = heads + token * stride;
        if (!values) {
            finish_key(plan, kv_head, stage.turns + token * plan.rotary_size, head);
        } else if (plan.value_bias) {
            add_row(plan.value_bias + kv_head * plan.head_size, plan.head_size, head);
        }
    }
    if (rounded != heads) store_row(layer.dtype, heads, count * stride, rounded, 0);
    const xquant_hot_places& places = values ? layer.values : layer.keys;
    const int64_t at = kv_head * layer.head_stride;
    if (layer.dtype == XQUANT_FP32) {
        scatter_heads((const float*)rounded, stride, plan.head_size, plan.block_size, places, call.hot_slots + first,
                      count, layer.block_stride, (float*)places.data + at);
    } else {
        scatter_heads((const uint16_t*)rounded, stride, plan.head_size, plan.block_size, places, call.hot_slots + first,
                      count, layer.block_stride, (uint16_t*)places.data + at);
    }
}

}  // namespace
}  // namespace xquant
