// Addresses in KIVI's two kinds of pages, drawn in xquant_vllm/kivi/pages.py, and which tokens a query sees exactly.
#pragma once

#include <stdint.h>

#include "api.h"
#include "attention/tile.h"
#include "kivi/kivi_api.h"

namespace xquant {
namespace {

// The keys of one kv head in a quantized page.
struct KeyView {
    const xquant_kivi_plan& plan;
    int64_t kv_head;

    int64_t row_bytes() const { return plan.layer.head_size * plan.key_bits / 8; }
    // Offsets from the start of a page.
    int64_t codes(int64_t slot) const {
        return plan.key_codes + (kv_head * plan.layer.block_size + slot) * row_bytes();
    }
    int64_t scale(int64_t slot) const {
        const int64_t groups = plan.layer.block_size / plan.key_group_size;
        return plan.key_scales + (kv_head * groups + slot / plan.key_group_size) * plan.layer.head_size * 2;
    }
    int64_t zero(int64_t slot) const { return scale(slot) - plan.key_scales + plan.key_zeros; }
};

inline int64_t bytes_of(int64_t dtype) { return dtype == XQUANT_FP32 ? 4 : 2; }

// The residual of one sequence and kv head.
struct ResidualView {
    const xquant_kivi_plan& plan;
    const xquant_kivi_residual& residual;
    const int32_t* blocks;
    int64_t kv_head;

    ResidualView(const xquant_kivi_plan& of, const xquant_kivi_residual& pages, int64_t sequence, int64_t head)
        : plan(of),
          residual(pages),
          blocks(pages.block_table + sequence * pages.block_table_stride),
          kv_head(head) {}

    bool have(int64_t begin, int64_t end) const {
        return have_blocks(blocks, plan.residual_block_size, residual.num_blocks, begin, end);
    }
    int64_t row_bytes() const { return plan.layer.head_size * bytes_of(plan.residual_dtype); }
    // Of a slot's row, from the start of a page: its key, or its value.
    int64_t row(int64_t slot) const { return (kv_head * plan.residual_block_size + slot) * row_bytes(); }
    // The key of a position; those of a strip follow each other.
    const uint8_t* key(int64_t position) const {
        const int64_t size = plan.residual_block_size;
        return residual.pages.data + blocks[position / size] * residual.pages.stride + row(position % size);
    }
    const uint8_t* value(int64_t position) const { return key(position) + plan.residual_values; }
};

// The first tokens whose keys, and whose values, a query finds exact: KiviLayerPlan.first_exact.
struct FirstExact {
    int64_t key, value;

    FirstExact(const xquant_kivi_plan& plan, int64_t position, int64_t step_start) {
        const int64_t cached = position + 1, tokens = plan.residual_tokens;
        key = cached - cached % tokens;
        value = cached > tokens ? cached - tokens : 0;
        if (!plan.exact_step) return;
        if (key > step_start) key = step_start;
        if (value > step_start) value = step_start;
    }
};

}  // namespace
}  // namespace xquant
