// What new tokens bring into their slots: rotation, prediction, codes.
#pragma once

#include <stdint.h>
#include <string.h>

#include "api.h"
#include "common/convert.h"
#include "common/gemm.h"
#include "common/layout.h"
#include "kernels.h"
#include "store/quantize.h"
#include "store/rotate.h"
#include "unpack/unpack.h"

namespace xquant {
namespace {

struct StoreScratch {
    float* rows;       // [kStoreTokens][row_stride], channels of a stream, all heads
    float* rotated;    // [row_stride]
    float* numbers;    // [channels that are quantized at once, rounded up to 16]
    uint8_t* codes;    // likewise
    float* predicted;  // [kStoreTokens][predicted_stride], one head
    float* term;       // [kStrip][term_stride], of one token
    int64_t row_stride;
    int64_t predicted_stride;
    int64_t term_stride;
    int64_t floats;

    // Without memory only the size is right.
    StoreScratch(const xquant_plan& plan, float* memory) {
        floats = 0;
        const auto take = [this, memory](int64_t count) {
            const int64_t at = floats;
            floats += round_up(count, kPad);
            return memory ? memory + at : nullptr;
        };
        int64_t channels = 0, at_once = 0, width = 0;
        for (int64_t i = 0; i < plan.num_streams; ++i) {
            const xquant_stream& stream = plan.streams[i];
            const int64_t all = stream.num_heads * stream.width;
            if (all > channels) channels = all;
            for (int64_t j = 0; j < stream.num_heads; ++j) {
                const xquant_head& head = stream.heads[j];
                const int64_t here = stream.allocated ? head.channels : head.runs[0].channels;
                if (here > at_once) at_once = here;
            }
        }
        for (int64_t i = 0; i < plan.prediction.num_terms; ++i) {
            if (plan.prediction.terms[i].stream.width > width) width = plan.prediction.terms[i].stream.width;
        }
        row_stride = round_up(channels, kPad) + kPad;  // a product of the last head ends past its channels
        predicted_stride = round_up(plan.prediction.width, kPad);
        term_stride = round_up(width, kPad) + kPad;  // unpack_rows writes past its last run
        rows = take(kStoreTokens * row_stride);
        rotated = take(row_stride);
        numbers = take(at_once);
        codes = (uint8_t*)take(at_once);
        predicted = take(kStoreTokens * predicted_stride);
        term = take(plan.prediction.num_terms ? kStrip * term_stride : 0);
    }
};

inline int64_t store_scratch(const xquant_plan& plan) { return StoreScratch(plan, nullptr).floats; }

// Write one token's channels of one latent head of an allocated stream.
inline void store_allocated(const HeadView& view, const float* row, int64_t slot, uint8_t* page,
                            const StoreScratch& scratch) {
    const xquant_head& head = view.head;
    const int64_t padded = round_up(head.channels, kPad);
    memcpy(scratch.numbers, row, head.channels * sizeof(float));
    for (int64_t i = head.channels; i < padded; ++i) scratch.numbers[i] = 0.0f;
    page[view.token_scale(slot)] = quantize_allocated(head, scratch.numbers, padded, scratch.codes);
    for (int64_t i = 0; i < head.num_runs; ++i) {
        const xquant_run& run = head.runs[i];
        pack_run(scratch.codes + run.channel, run.channels, run.bits, page + view.codes(slot) + run.byte);
    }
}

// Write one token's channels of one latent head of a uniform stream.
inline void store_uniform(const HeadView& view, const float* row, int64_t slot, uint8_t* page,
                          const StoreScratch& scratch) {
    const xquant_stream& stream = view.stream;
    for (int64_t index = 0; index < view.head.num_runs; ++index) {
        const xquant_run& run = view.head.runs[index];
        const float* values = row + run.channel;
        uint8_t* to = page + view.codes(slot) + run.byte;
        if (run.bits == 16) {
            for (int64_t i = 0; i < run.channels; ++i) {
                const uint16_t half = saturating_half(values[i]);
                memcpy(to + i * 2, &half, 2);
            }
            continue;
        }
        const int64_t outliers = index == 0 ? stream.outlier_channels : 0, padded = round_up(run.channels, kPad);
        // Outliers and padding take the value of a channel that is neither, so they do not widen the range.
        const float filler = values[run.channels - 1];
        memcpy(scratch.numbers + outliers, values + outliers, (run.channels - outliers) * sizeof(float));
        for (int64_t i = 0; i < outliers; ++i) scratch.numbers[i] = filler;
        for (int64_t i = run.channels; i < padded; ++i) scratch.numbers[i] = filler;
        const GroupParameters parameters = quantize_group(scratch.numbers, padded, run.bits, scratch.codes);
        memset(scratch.codes, 0, outliers);
        pack_run(scratch.codes, run.channels, run.bits, to);
        memcpy(page + view.scale(index, slot), &parameters.scale, 2);
        memcpy(page + view.zero(index, slot), &parameters.zero, 2);
    }
    for (int64_t channel = 0; channel < stream.outlier_channels; ++channel) {
        const uint16_t half = saturating_half(row[channel]);
        memcpy(page + view.outlier(channel, slot), &half, 2);
    }
}

// What the pages of earlier layers say of one head of `count` tokens, whose slots follow each other in one strip: rows of
// `predicted`. 0 where they store nothing.
inline void read_prediction(const xquant_plan& plan, const xquant_store_call& call, int64_t head, int64_t slot,
                            int64_t count, float* predicted, const StoreScratch& scratch) {
    const int64_t block = slot / plan.block_size, offset = slot % plan.block_size;
    const int64_t strip = offset / kStrip * kStrip, token = offset - strip;
    int64_t row = -1, end = 0;
    for (int64_t i = 0; i < plan.prediction.num_terms; ++i) {
        const xquant_term& term = plan.prediction.terms[i];
        const xquant_pages& pages = call.pages[term.page];
        const HeadView view = head_view(plan, term, head);
        for (int64_t j = 0; j < view.head.num_bands; ++j) {
            unpack_rows(view, pages.data + block * pages.stride, strip, j, token, token + count,
                        scratch.term + view.head.bands[j].channel, scratch.term_stride);
        }
        const int64_t width = term.stream.width;
        if (!term.adds) {
            row = end;
            end += width;
        }
        for (int64_t i = 0; i < count; ++i) {
            float* __restrict x = scratch.term + (token + i) * scratch.term_stride;
            float* __restrict to = predicted + i * scratch.predicted_stride + row;
            memset(x + view.head.channels, 0, (width - view.head.channels) * sizeof(float));
            if (term.adds) {
                for (int64_t j = 0; j < width; ++j) to[j] += x[j];
            } else {
                memcpy(to, x, width * sizeof(float));
            }
        }
    }
}

// Subtract the prediction from `count` rows of the first stream; slots below 0 are left alone.
inline void subtract_prediction(const xquant_plan& plan, const xquant_store_call& call, int64_t first, int64_t count,
                                const StoreScratch& scratch) {
    const xquant_stream& stream = plan.streams[0];
    const int64_t padded = round_up(stream.width, kPad);
    for (int64_t head = 0; head < stream.num_heads; ++head) {
        float* rows = scratch.rows + head * stream.width;
        const int64_t* slots = call.slot_mapping + first;
        for (int64_t i = 0, next; i < count; i = next) {
            float* predicted = scratch.predicted + i * scratch.predicted_stride;
            next = i + 1;
            if (slots[i] < 0) {
                memset(predicted, 0, plan.prediction.width * sizeof(float));
                continue;
            }
            while (next < count && slots[next] == slots[i] + next - i && slots[next] % kStrip) ++next;
            read_prediction(plan, call, head, slots[i], next - i, predicted, scratch);
        }
        for (int64_t i = 0; i < count; ++i) {
            float* __restrict predicted = scratch.predicted + i * scratch.predicted_stride;
            float* __restrict row = rows + i * scratch.row_stride;
            if (plan.prediction_matrix) {
                for (int64_t j = 0; j < plan.prediction.width; ++j) predicted[j] = -predicted[j];
            } else if (slots[i] >= 0) {
                for (int64_t j = 0; j < stream.width; ++j) row[j] -= predicted[j];
            }
        }
        if (!plan.prediction_matrix) continue;
        const float* matrix = plan.prediction_matrix + head * plan.prediction.width * padded;
        for_bands(plan.prediction, head, [&](const Band& band) {
            Product product;
            product.depth = band.channels;
            product.a = scratch.predicted + band.row;
            product.lda = scratch.predicted_stride;
            product.b = matrix + band.row * padded;
            product.ldb = padded;
            product.c = rows;
            product.ldc = scratch.row_stride;
            product.accumulate = true;  // the matrix' rows end in zeros, so the next head's channels stay what they are
            gemm<Order::kPlain>(count, padded, product);
        });
    }
}

// Store tokens first ... first + count - 1, at most kStoreTokens.
inline void store_tokens(const xquant_plan& plan, const xquant_store_call& call, int64_t first, int64_t count,
                         float* memory) {
    const StoreScratch scratch(plan, memory);
    for (int64_t index = 0; index < plan.num_streams; ++index) {
        const xquant_stream& stream = plan.streams[index];
        const xquant_input& input = call.inputs[index];
        for (int64_t i = 0; i < count; ++i) {
            float* row = scratch.rows + i * scratch.row_stride;
            load_row(input.dtype, input.data, (first + i) * input.stride, stream.num_heads * stream.width, row);
            if (index == 0 && plan.rotation_signs) rotate_input(plan, stream.width, row, scratch.rotated);
        }
        if (index == 0 && plan.prediction.num_terms) subtract_prediction(plan, call, first, count, scratch);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t slot = call.slot_mapping[first + i];
            if (slot < 0) continue;
            uint8_t* page = call.pages[0].data + slot / plan.block_size * call.pages[0].stride;
            const float* row = scratch.rows + i * scratch.row_stride;
            for (int64_t head = 0; head < stream.num_heads; ++head) {
                const HeadView view(stream, head, plan.block_size);
                const auto store = stream.allocated ? store_allocated : store_uniform;
                store(view, row + head * stream.width, slot % plan.block_size, page, scratch);
            }
        }
    }
}

}  // namespace
}  // namespace xquant
