// Entry points for the pool of hot blocks: check the input, spread the work over threads.
#include <algorithm>
#include <atomic>

#include "api.h"
#include "attention/batch_attention.h"
#include "attention/schedule.h"
#include "isa.h"
#include "kernels.h"

using namespace xquant;

namespace {

// Neighbouring tokens that one thread handles.
constexpr int64_t kHotTokens = 16;

template <typename Work>
const char* for_tokens(const xquant_plan& plan, int64_t num_tokens, int64_t numbers, const Work& work) {
    const Kernels& kernels = chosen_kernels();
    const int64_t floats = kernels.hot_scratch(plan);
    std::atomic<const char*> error{nullptr};
    // Waking the other threads takes longer than unpacking some thousand numbers.
    parallel_for((num_tokens + kHotTokens - 1) / kHotTokens, num_tokens * numbers > 32768, [&](int64_t i) {
        thread_local Buffer buffer;
        float* scratch = buffer.get(floats);
        if (!scratch) {
            error = kOutOfMemory;
            return;
        }
        work(kernels, i * kHotTokens, std::min(kHotTokens, num_tokens - i * kHotTokens), scratch);
    });
    return error.load();
}

// Tokens up to which all threads multiply the same ones, by other heads: few tokens are read faster than an
// up-projection.
constexpr int64_t kTogether = 32;

// Tokens that go through all heads at once, so that an up-projection is read once for so many.
constexpr int64_t kWrittenTokens = 64;

// Few numbers are multiplied faster than other threads are woken.
constexpr int64_t kAlone = 1 << 17;

const char* check_call(const xquant_plan& plan, const xquant_hot_layer& layer, const xquant_hot_call& call) {
    const int64_t slots = call.num_blocks * plan.block_size, hot_slots = layer.num_hot_blocks * plan.block_size;
    for (int64_t token = 0; token < call.num_tokens; ++token) {
        if (call.slots[token] < 0 || call.slots[token] >= slots) return "slots names a slot that pages does not have";
        if (call.hot_slots[token] < 0 || call.hot_slots[token] >= hot_slots) {
            return "hot_slots names a slot that the pool does not have";
        }
        if (plan.rope && (call.positions[token] < 0 || call.positions[token] >= plan.rotary_positions)) {
            return "positions names one that the rotary table does not have";
        }
    }
    return nullptr;
}

// All threads read, then all multiply.
const char* write_together(const xquant_plan& plan, const xquant_hot_layer& layer, const xquant_hot_call& call,
                           bool parallel) {
    thread_local Buffer stages;
    const Kernels& kernels = chosen_kernels();
    const int64_t count = call.num_tokens;
    float* const stage = stages.get(kernels.hot_stage(plan, layer, kTogether));
    if (!stage) return kOutOfMemory;
    const int64_t numbers = plan.key.num_heads * plan.key.width * (plan.key.num_terms - call.first_term);
    const char* error = for_tokens(plan, count, numbers, [&](const Kernels&, int64_t first, int64_t some, float* scratch) {
        kernels.hot_read(plan, layer, call, first, some, stage, kTogether, first, scratch);
    });
    if (error) return error;
    std::atomic<const char*> failed{nullptr};
    const int64_t floats = kernels.hot_heads_scratch(plan, kTogether);
    parallel_for(2 * plan.num_kv_heads, parallel, [&](int64_t i) {
        thread_local Buffer buffer;
        float* scratch = buffer.get(floats);
        if (!scratch) {
            failed = kOutOfMemory;
            return;
        }
        const bool values = i >= plan.num_kv_heads;
        const int64_t kv_head = values ? i - plan.num_kv_heads : i;
        kernels.hot_write(plan, layer, call, values, kv_head, 0, count, stage, kTogether, scratch);
    });
    return failed.load();
}

// Every thread takes tokens through all.
const char* write_apart(const xquant_plan& plan, const xquant_hot_layer& layer, const xquant_hot_call& call) {
    const Kernels& kernels = chosen_kernels();
    const int64_t share = pad((call.num_tokens + omp_get_max_threads() - 1) / omp_get_max_threads());
    const int64_t tokens = std::min(share, kWrittenTokens), staged = kernels.hot_stage(plan, layer, tokens);
    const int64_t read = pad(kernels.hot_scratch(plan)), floats = staged + read + kernels.hot_heads_scratch(plan, tokens);
    std::atomic<const char*> failed{nullptr};
    parallel_for((call.num_tokens + tokens - 1) / tokens, true, [&](int64_t i) {
        thread_local Buffer buffer;
        float* const stage = buffer.get(floats);
        if (!stage) {
            failed = kOutOfMemory;
            return;
        }
        const int64_t first = i * tokens, count = std::min(tokens, call.num_tokens - first);
        kernels.hot_read(plan, layer, call, first, count, stage, tokens, 0, stage + staged);
        for (int64_t head = 0; head < 2 * plan.num_kv_heads; ++head) {
            const bool values = head >= plan.num_kv_heads;
            const int64_t kv_head = values ? head - plan.num_kv_heads : head;
            kernels.hot_write(plan, layer, call, values, kv_head, first, count, stage, tokens, stage + staged + read);
        }
    });
    return failed.load();
}

}  // namespace

extern "C" {

const char* xquant_cpu_write_hot(const xquant_plan* plan, const xquant_hot_layer* layer, const xquant_hot_call* call) {
    if (const char* error = check_call(*plan, *layer, *call)) return error;
    if (call->num_tokens > kTogether) return write_apart(*plan, *layer, *call);
    const int64_t multiplied = call->num_tokens * plan->num_kv_heads * plan->head_size * plan->key.width;
    return write_together(*plan, *layer, *call, multiplied > kAlone);
}

const char* xquant_cpu_read_tokens(const xquant_plan* plan, const xquant_read_call* call) {
    for (int64_t token = 0; token < call->num_tokens; ++token) {
        if (call->slots[token] < 0 || call->slots[token] >= call->num_blocks * plan->block_size) {
            return "slots names a slot that pages does not have";
        }
    }
    const xquant_latent& latent = call->values ? plan->value : plan->key;
    const int64_t numbers = latent.num_heads * latent.width * (latent.num_terms - call->first_term);
    return for_tokens(*plan, call->num_tokens, numbers,
                      [&](const Kernels& kernels, int64_t first, int64_t count, float* scratch) {
                          kernels.read_tokens(*plan, *call, first, count, scratch);
                      });
}

const char* xquant_cpu_finish_tokens(const xquant_plan* plan, const xquant_finish_call* call) {
    for (int64_t token = 0; token < call->num_tokens; ++token) {
        if (plan->rope && (call->positions[token] < 0 || call->positions[token] >= plan->rotary_positions)) {
            return "positions names one that the rotary table does not have";
        }
    }
    return for_tokens(*plan, call->num_tokens, plan->num_kv_heads * plan->head_size,
                      [&](const Kernels& kernels, int64_t first, int64_t count, float* scratch) {
                          kernels.finish_tokens(*plan, *call, first, count, scratch);
                      });
}

}  // extern "C"
