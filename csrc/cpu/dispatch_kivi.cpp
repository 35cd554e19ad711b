// Entry points for KIVI: check the input, spread the work over threads.
#include <algorithm>
#include <atomic>
#include <vector>

#include "attention/batch_attention.h"
#include "attention/schedule.h"
#include "isa.h"
#include "kernels.h"
#include "kivi/kivi_api.h"

namespace xquant {
namespace {

const char* const kNoBlock = "a block table names a block that its pages do not have";
const char* const kNoSlot = "a slot mapping names a slot that its pages do not have";

const char* check(const xquant_kivi_plan& plan, const xquant_attention_call& batch,
                  const xquant_kivi_residual& residual) {
    if (const char* error = check_batch(plan.layer, batch)) return error;
    for (int64_t sequence = 0; sequence < batch.num_seqs; ++sequence) {
        if (batch.query_start_loc[sequence] == batch.query_start_loc[sequence + 1]) continue;
        if (batch.seq_lens[sequence] > residual.max_blocks * plan.residual_block_size) {
            return "a sequence is longer than its row of the residual's block_table";
        }
    }
    return nullptr;
}

bool slots_fit(const int64_t* slots, int64_t count, int64_t limit) {
    return std::all_of(slots, slots + count, [=](int64_t slot) { return slot < limit; });
}

// What the cached tokens of a layer cost, and its kernels.
struct Kivi {
    const xquant_kivi_plan& kivi;
    const xquant_kivi_attention_call& kivi_call;
    const Kernels& kernels;
    const xquant_plan& plan = kivi.layer;
    const xquant_attention_call& call = kivi_call.batch;

    double cost(int64_t rows, int64_t) const { return double((8 + rows) * 2 * plan.head_size); }
    int64_t scratch(int64_t rows) const { return kernels.kivi_attention_scratch(kivi, rows); }
    const char* attend_stretch(const Task& task, int64_t stretch, const State& state, float* scratch) const {
        return kernels.kivi_attend_stretch(kivi, kivi_call, task, stretch, state, scratch) ? nullptr : kNoBlock;
    }
};

struct Group {
    int64_t sequence;
    int64_t index;
};

}  // namespace
}  // namespace xquant

using namespace xquant;

extern "C" {

const char* xquant_cpu_kivi_store(const xquant_kivi_plan* plan, const xquant_kivi_store_call* call) {
    const int64_t tokens = call->values.num_tokens, size = plan->key_group_size;
    const xquant_attention_call& batch = call->batch;
    if (!slots_fit(call->values.slot_mapping, tokens, call->values.num_blocks * plan->layer.block_size) ||
        !slots_fit(call->residual_slot_mapping, tokens, call->residual.num_blocks * plan->residual_block_size)) {
        return kNoSlot;
    }
    if (const char* error = check(*plan, batch, call->residual)) return error;
    const Kernels& kernels = chosen_kernels();
    const int64_t floats = kernels.kivi_store_scratch(*plan);
    const int64_t channels = plan->layer.num_kv_heads * plan->layer.head_size;
    std::atomic<const char*> error{nullptr};
    const auto scratch = [&] {
        thread_local Buffer buffer;
        float* memory = buffer.get(floats);
        if (!memory) error = kOutOfMemory;
        return memory;
    };
    // Waking the other threads takes longer than quantizing some thousand numbers.
    parallel_for((tokens + kStoreTokens - 1) / kStoreTokens, tokens * channels > 8192, [&](int64_t i) {
        if (float* memory = scratch()) {
            const int64_t first = i * kStoreTokens;
            kernels.kivi_store(*plan, *call, first, std::min(kStoreTokens, tokens - first), memory);
        }
    });
    if (error.load()) return error.load();
    // Groups that these tokens complete, which may begin with earlier ones.
    thread_local std::vector<Group> thread_groups;
    std::vector<Group>& groups = thread_groups;
    groups.clear();
    for (int64_t sequence = 0; sequence < batch.num_seqs; ++sequence) {
        const int64_t length = batch.seq_lens[sequence];
        const int64_t queries = batch.query_start_loc[sequence + 1] - batch.query_start_loc[sequence];
        for (int64_t i = (length - queries) / size; queries && i < length / size; ++i) groups.push_back({sequence, i});
    }
    const int64_t count = groups.size();
    parallel_for(count, count * size * channels > 8192, [&](int64_t i) {
        float* memory = scratch();
        if (memory && !kernels.kivi_store_group(*plan, *call, groups[i].sequence, groups[i].index, memory)) {
            error = kNoBlock;
        }
    });
    return error.load();
}

const char* xquant_cpu_kivi_attention(const xquant_kivi_plan* plan, const xquant_kivi_attention_call* call) {
    const char* error = check(*plan, call->batch, call->residual);
    return error ? error : Attention<Kivi>({*plan, *call, chosen_kernels()}).compute();
}

}  // extern "C"
