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

}  // namespace

extern "C" {

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
