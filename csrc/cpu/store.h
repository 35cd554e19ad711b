// The latents of one token into their slot.
#pragma once

inline int64_t store_scratch(const xquant_plan& plan) {
    const auto floats = [](const xquant_stream& stream) {
        const int64_t group = round_up(stream.group_size, kPad);
        return round_up(stream.width, kPad) + group + group / (int64_t)sizeof(float);
    };
    const int64_t key = floats(plan.key), value = floats(plan.value);
    return key > value ? key : value;
}

inline void store_stream(const xquant_plan& plan, const xquant_stream& stream, const void* x, int64_t dtype,
                         int64_t at, int64_t slot, uint8_t* page, float* scratch) {
    const int64_t group_size = stream.group_size, padded = round_up(group_size, kPad);
    float* row = scratch;
    float* group_values = row + round_up(stream.width, kPad);
    uint8_t* codes = (uint8_t*)(group_values + padded);
    for (int64_t head = 0; head < stream.num_heads; ++head) {
        const HeadView view{stream, head, plan.block_size};
        load_row(dtype, x, at + head * stream.width, stream.width, row);
        for (int64_t group = 0; group < view.num_groups(); ++group) {
            const float* values = row + group * group_size;
            const int64_t outliers = group == 0 ? stream.outlier_channels : 0;
            // Outliers and padding take the value of a channel that is neither, so they do not widen the range.
            const float filler = values[group_size - 1];
            memcpy(group_values + outliers, values + outliers, (group_size - outliers) * sizeof(float));
            for (int64_t i = 0; i < outliers; ++i) group_values[i] = filler;
            for (int64_t i = group_size; i < padded; ++i) group_values[i] = filler;
            const GroupParameters parameters = quantize_group(group_values, padded, stream.bits, codes);
            memset(codes, 0, outliers);
            pack_group(codes, group_size, stream.bits, page + view.codes(slot) + group * view.group_bytes());
            memcpy(page + view.scale(group, slot), &parameters.scale, 2);
            memcpy(page + view.zero(group, slot), &parameters.zero, 2);
        }
        for (int64_t channel = 0; channel < stream.outlier_channels; ++channel) {
            const uint16_t half = saturating_half(row[channel]);
            memcpy(page + view.outlier(channel, slot), &half, 2);
        }
    }
}

inline void store_token(const xquant_plan& plan, const xquant_store_call& call, int64_t token, float* scratch) {
    const int64_t slot = call.slot_mapping[token];
    uint8_t* page = call.pages + slot / plan.block_size * call.pages_stride;
    const int64_t offset = slot % plan.block_size;
    store_stream(plan, plan.key, call.key, call.key_dtype, token * call.key_stride, offset, page, scratch);
    store_stream(plan, plan.value, call.value, call.value_dtype, token * call.value_stride, offset, page, scratch);
}
