// Entry points: check the input, pick the instruction set, spread the work over threads.
#include "api.h"

#include <cstring>

#include "kernels.h"
#include "schedule.h"

namespace xquant {
namespace {

const char* const kOutOfMemory = "out of memory for scratch";

bool supported(const Kernels& kernels) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (&kernels == &kVnniKernels) {
        return avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
    }
    if (&kernels == &kAvx512Kernels) return avx512;
    // F16C is not asked for: no CPU has FMA3 without it.
    if (&kernels == &kAvx2Kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return &kernels == &kPortableKernels;
}

// NULL where it is not available.
const Kernels* find(const char* name) {
    const Kernels* const all[] = {
#if defined(__x86_64__)
        &kVnniKernels,
        &kAvx512Kernels,
        &kAvx2Kernels,
#endif
        &kPortableKernels,
    };
    for (const Kernels* kernels : all) {
        if (supported(*kernels) && (!name || !std::strcmp(name, kernels->name))) return kernels;
    }
    return nullptr;
}

std::atomic<const Kernels*> chosen{find(nullptr)};

const char* check(const xquant_plan& plan, const xquant_attention_call& call) {
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

class Attention {
public:
    Attention(const xquant_plan& plan, const xquant_attention_call& call) : plan_(plan), call_(call) {}

    const char* run() {
        thread_local Schedule schedule;
        thread_local Buffer states;
        schedule.build(plan_, call_, omp_get_max_threads());
        schedule_ = &schedule;
        states_ = states.get(schedule.state_floats);
        if (schedule.state_floats && !states_) return kOutOfMemory;
        parallel_for(schedule.units.size(), true, [this](int64_t i) { run_unit(schedule_->units[i]); });
        if (!error_.load()) {
            parallel_for(schedule.splits.size(), true, [this](int64_t i) { run_split(schedule_->splits[i]); });
        }
        return error_.load();
    }

private:
    // Memory of this thread: two states of the largest task, then the kernels' scratch.
    float* memory() {
        thread_local Buffer buffer;
        const int64_t rows = schedule_->rows;
        float* memory = buffer.get(2 * state_floats(plan_, rows) + kernels_.attention_scratch(plan_, rows));
        if (!memory) error_ = kOutOfMemory;
        return memory;
    }

    bool attend(const Task& task, int64_t chunk, const State& state, float* scratch) {
        if (kernels_.attend(plan_, call_, task, chunk, state, scratch)) return true;
        error_ = "block_table names a block that pages does not have";
        return false;
    }

    void run_unit(const Unit& unit) {
        float* memory = this->memory();
        if (!memory || error_.load(std::memory_order_relaxed)) return;
        const Task& task = schedule_->tasks[unit.task];
        const int64_t rows = rows_of(plan_, task), floats = state_floats(plan_, rows);
        float* scratch = memory + 2 * floats;
        if (unit.state >= 0) {
            attend(task, unit.first_chunk, state_at(states_ + unit.state, rows), scratch);
            return;
        }
        const State total = state_at(memory, rows), part = state_at(memory + floats, rows);
        if (!attend(task, unit.first_chunk, total, scratch)) return;
        for (int64_t chunk = unit.first_chunk + 1; chunk <= unit.last_chunk; ++chunk) {
            if (!attend(task, chunk, part, scratch)) return;
            kernels_.merge(plan_, rows, total, part);
        }
        kernels_.finish(plan_, call_, task, total, scratch);
    }

    void run_split(const Split& split) {
        float* memory = this->memory();
        if (!memory) return;
        const Task& task = schedule_->tasks[split.task];
        const int64_t rows = rows_of(plan_, task), floats = state_floats(plan_, rows);
        const State total = state_at(states_ + split.state, rows);
        for (int64_t i = 1; i < split.chunks; ++i) {
            kernels_.merge(plan_, rows, total, state_at(states_ + split.state + i * floats, rows));
        }
        kernels_.finish(plan_, call_, task, total, memory);
    }

    const xquant_plan& plan_;
    const xquant_attention_call& call_;
    const Kernels& kernels_ = *chosen.load();
    const Schedule* schedule_ = nullptr;
    float* states_ = nullptr;
    std::atomic<const char*> error_{nullptr};
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
    const Kernels& kernels = *chosen.load();
    const int64_t floats = kernels.store_scratch(*plan);
    // Waking the other threads takes longer than quantizing some thousand numbers.
    int64_t channels = plan->prediction.num_terms * plan->prediction.width;
    for (int64_t i = 0; i < plan->num_streams; ++i) channels += plan->streams[i].num_heads * plan->streams[i].width;
    std::atomic<const char*> error{nullptr};
    const int64_t units = (call->num_tokens + kStoreTokens - 1) / kStoreTokens;
    parallel_for(units, call->num_tokens * channels > 8192, [&](int64_t i) {
        thread_local Buffer buffer;
        float* scratch = buffer.get(floats);
        if (!scratch) {
            error = kOutOfMemory;
            return;
        }
        const int64_t first = i * kStoreTokens;
        kernels.store(*plan, *call, first, std::min(kStoreTokens, call->num_tokens - first), scratch);
    });
    return error.load();
}

const char* xquant_cpu_attention(const xquant_plan* plan, const xquant_attention_call* call) {
    const char* error = check(*plan, *call);
    return error ? error : Attention(*plan, *call).run();
}

const char* xquant_cpu_isa(void) { return chosen.load()->name; }

int xquant_cpu_set_isa(const char* name) {
    const Kernels* kernels = find(name);
    if (kernels) chosen = kernels;
    return kernels != nullptr;
}

int xquant_cpu_threads(void) { return omp_get_max_threads(); }

int xquant_cpu_abi(void) { return XQUANT_CPU_ABI; }

}  // extern "C"
