// New keys and values into KIVI's pages, with the bytes of xquant_vllm/kivi/codec.py.
#pragma once

#include <stdint.h>
#include <string.h>

#include "api.h"
#include "attention/tile.h"
#include "common/convert.h"
#include "common/layout.h"
#include "common/simd.h"
#include "kernels.h"
#include "kivi/kivi_api.h"
#include "kivi/pages.h"
#include "store/quantize.h"
#include "store/store.h"

namespace xquant {
namespace {

struct GroupScratch {
    float* keys;     // [key_group_size][width]
    float* scales;   // [width]
    float* zeros;    // [width]
    uint8_t* codes;  // [width]
    int64_t width;   // head_size, rounded up to 16
    int64_t floats;  // size of all of it

    // Without memory only the size is right.
    GroupScratch(const xquant_kivi_plan& plan, float* memory) {
        floats = 0;
        const auto take = [this, memory](int64_t count) {
            const int64_t at = floats;
            floats += round_up(count, kPad);
            return memory ? memory + at : nullptr;
        };
        width = round_up(plan.layer.head_size, kPad);
        keys = take(plan.key_group_size * width);
        scales = take(width);
        zeros = take(width);
        codes = (uint8_t*)take(width / 4);
    }
};

inline int64_t kivi_store_scratch(const xquant_kivi_plan& plan) {
    const int64_t tokens = store_scratch(plan.layer), group = GroupScratch(plan, nullptr).floats;
    return tokens > group ? tokens : group;
}

// A token's heads into its slot of residual pages: rows from `to` on, `head_stride` bytes apart.
inline void store_residual(const xquant_kivi_plan& plan, const xquant_input& input, int64_t token, uint8_t* to,
                           int64_t head_stride, float* scratch) {
    const int64_t head_size = plan.layer.head_size, size = bytes_of(input.dtype), dtype = plan.residual_dtype;
    for (int64_t head = 0; head < plan.layer.num_kv_heads; ++head, to += head_stride) {
        const int64_t at = token * input.stride + head * head_size;
        if (input.dtype == dtype) {
            memcpy(to, (const uint8_t*)input.data + at * size, head_size * size);
        } else {
            load_row(input.dtype, input.data, at, head_size, scratch);
            store_row(dtype, scratch, head_size, to, 0);
        }
    }
}

inline void kivi_store_tokens(const xquant_kivi_plan& plan, const xquant_kivi_store_call& call, int64_t first,
                              int64_t count, float* memory) {
    const xquant_kivi_residual& residual = call.residual;
    const int64_t head_stride = plan.residual_block_size * plan.layer.head_size * bytes_of(plan.residual_dtype);
    for (int64_t token = first; token < first + count; ++token) {
        const int64_t slot = call.residual_slot_mapping[token];
        if (slot < 0) continue;
        uint8_t* page = residual.pages.data + slot / plan.residual_block_size * residual.pages.stride;
        uint8_t* row = page + ResidualView(plan, residual, 0, 0).row(slot % plan.residual_block_size);
        store_residual(plan, call.keys, token, row, head_stride, memory);
        store_residual(plan, call.values.inputs[0], token, row + plan.residual_values, head_stride, memory);
    }
    store_tokens(plan.layer, call.values, first, count, memory);
}

// Scales and zeros of a group's channels, also into its page.
inline void store_group_parameters(const KeyView& view, uint8_t* page, int64_t slot, const GroupScratch& scratch) {
    const int64_t head_size = view.plan.layer.head_size;
    for (int64_t channel = 0; channel < scratch.width; channel += kLanes) {
        const float* keys = scratch.keys + channel;
        vf low = load(keys), high = low;
        vi unordered = {};
        for (int64_t token = 0; token < view.plan.key_group_size; ++token, keys += scratch.width) {
            const vf x = load(keys);
            low = minimum(x, low);
            high = maximum(x, high);
            unordered |= x != x;
        }
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            const GroupParameters of = group_parameters(low[lane], high[lane], unordered[lane], view.plan.key_bits);
            scratch.scales[channel + lane] = half_to_float(of.scale);
            scratch.zeros[channel + lane] = half_to_float(of.zero);
        }
    }
    // Numbers of FP16 come out as they went in.
    store_row(XQUANT_FP16, scratch.scales, head_size, page + view.scale(slot), 0);
    store_row(XQUANT_FP16, scratch.zeros, head_size, page + view.zero(slot), 0);
}

inline bool kivi_store_group(const xquant_kivi_plan& plan, const xquant_kivi_store_call& call, int64_t sequence,
                             int64_t group, float* memory) {
    const GroupScratch scratch(plan, memory);
    const int64_t size = plan.key_group_size, head_size = plan.layer.head_size, begin = group * size;
    const Pages pages{plan.layer, call.batch, call.batch.block_table + sequence * call.batch.block_table_stride};
    if (!pages.have(begin, begin + size)) return false;
    const int64_t slot = pages.slot(begin);
    uint8_t* page = const_cast<uint8_t*>(pages.page(0, begin));
    for (int64_t head = 0; head < plan.layer.num_kv_heads; ++head) {
        const ResidualView residual(plan, call.residual, sequence, head);
        if (!residual.have(begin, begin + size)) return false;
        for (int64_t token = 0; token < size; ++token) {
            load_row(plan.residual_dtype, residual.key(begin + token), 0, head_size, scratch.keys + token * scratch.width);
        }
        const KeyView view{plan, head};
        store_group_parameters(view, page, slot, scratch);
        for (int64_t token = 0; token < size; ++token) {
            const float* keys = scratch.keys + token * scratch.width;
            for (int64_t i = 0; i < head_size; i += kLanes) {
                store_codes(scratch.codes + i,
                            group_codes(load(keys + i), load(scratch.scales + i), load(scratch.zeros + i), plan.key_bits));
            }
            pack_run(scratch.codes, head_size, plan.key_bits, page + view.codes(slot + token));
        }
    }
    return true;
}

}  // namespace
}  // namespace xquant
