// Entry points for latents: check the input, spread the work over threads.
#include <algorithm>
#include <atomic>

#include <omp.h>

#include "api.h"
#include "attention/batch_attention.h"
#include "attention/schedule.h"
#include "isa.h"
#include "kernels.h"

namespace xquant {

const char* check_batch(const xquant_plan& plan, const xquant_attention_call& call) {
    for (int64_t sequence = 0; sequence < call.num_seqs; ++sequence) {
        const int64_t begin = call.query_start_loc[sequence], end = call.query_start_loc[sequence + 1];
        if (begin < 0 || end < begin || end > call.num_tokens) {
            return "query_start_loc must not decrease nor exceed the number of query tokens";
        }
        if (begin == end) continue;
        const int64_t length = call.seq_lens[sequence];
        if (length < end - begin) return "seq_lens must count the query tokens of every sequence";
        if (length > call.max_blocks * plan.block_size) return "a sequence is longer than its row of block_table";
        if (plan.rope && length > plan.rotary_positions) return "a sequence is longer than the rotary table";
    }
    return nullptr;
}

namespace {

// Channels that are dequantized for one kv head of a token, and channels that they make up.
struct Channels {
    double unpacked = 0;
    double multiplied = 0;

    Channels(const xquant_latent& latent, int64_t kv_head) {
        for (int64_t i = 0; i < latent.num_terms; ++i) {
            const xquant_stream& stream = latent.terms[i].stream;
            const double stored = double(stream.heads[stream.num_heads == 1 ? 0 : kv_head].channels);
            unpacked += stored;
            if (!latent.terms[i].adds) multiplied += stored;
        }
    }
};

// What the cached tokens of a layer of latents cost, and their kernels.
struct Latents {
    const xquant_plan& plan;
    const xquant_attention_call& call;
    const Kernels& kernels;

    double cost(int64_t rows, int64_t kv_head) const {
        const Channels key(plan.key, kv_head), value(plan.value, kv_head);
        const double task_rows = double(rows), head_size = double(plan.head_size);
        const double keys =
            plan.key_absorbed ? task_rows * key.multiplied : key.multiplied * head_size + task_rows * head_size;
        return keys + 8.0 * (key.unpacked + value.unpacked) + task_rows * value.multiplied;
    }
    int64_t scratch(int64_t rows) const { return kernels.attention_scratch(plan, rows); }
    const char* attend_stretch(const Task& task, int64_t stretch, const State& state, float* scratch) const {
        if (kernels.attend_stretch(plan, call, task, stretch, state, scratch)) return nullptr;
        return "block_table names a block that pages does not have";
    }
};

}  // namespace
}  // namespace xquant

using namespace xquant;

extern "C" {

const char* xquant_cpu_store(const xquant_plan* plan, const xquant_store_call* call) {
    for (int64_t token = 0; token < call->num_tokens; ++token) {
        if (call->slot_mapping[token] >= call->num_blocks * plan->block_size) {
            return "slot_mapping names a slot that pages does not have";
        }
    }
    const Kernels& kernels = chosen_kernels();
    const int64_t floats = kernels.store_scratch(*plan);
    // Waking the other threads takes longer than quantizing some thousand numbers.
    int64_t channels = plan->prediction.num_terms * plan->prediction.width;
    for (int64_t i = 0; i < plan->num_streams; ++i) channels += plan->streams[i].num_heads * plan->streams[i].width;
    const bool parallel = call->num_tokens * channels > 8192;
    // The tokens of a decode step are too few for batches of kStoreTokens to keep all threads busy.
    const int64_t threads = parallel ? omp_get_max_threads() : 1;
    const int64_t share = std::max<int64_t>(1, (call->num_tokens + threads - 1) / threads);
    const int64_t tokens = std::min(kStoreTokens, share);
    std::atomic<const char*> error{nullptr};
    parallel_for((call->num_tokens + tokens - 1) / tokens, parallel, [&](int64_t i) {
        thread_local Buffer buffer;
        float* scratch = buffer.get(floats);
        if (!scratch) {
            error = kOutOfMemory;
            return;
        }
        const int64_t first = i * tokens;
        kernels.store(*plan, *call, first, std::min(tokens, call->num_tokens - first), scratch);
    });
    return error.load();
}

const char* xquant_cpu_attention(const xquant_plan* plan, const xquant_attention_call* call) {
    const char* error = check_batch(*plan, *call);
    return error ? error : Attention<Latents>({*plan, *call, chosen_kernels()}).compute();
}

}  // extern "C"
