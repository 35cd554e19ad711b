// Attention of a batch: checked, cut into jobs, spread over threads, merged. Plain C++, compiled once.
#pragma once

#include <stdint.h>

#include <atomic>

#include <omp.h>

#include "api.h"
#include "attention/schedule.h"
#include "kernels.h"

namespace xquant {

inline const char* const kOutOfMemory = "out of memory for scratch";

// Whether the sequences of a batch fit its tensors and their rows of the block table.
const char* check_batch(const xquant_plan& plan, const xquant_attention_call& call);

// `Layer` holds the plan, the call and the kernels, and has
//   double cost(int64_t rows, int64_t kv_head)  of a cached token, for Schedule::build
//   int64_t scratch(int64_t rows)               floats that attend_stretch and finish need
//   const char* attend_stretch(task, stretch, state, scratch)  NULL, or what is wrong with the input
template <typename Layer>
class Attention {
public:
    explicit Attention(const Layer& layer) : layer_(layer) {}

    const char* compute() {
        thread_local Schedule schedule;
        thread_local Buffer states;
        const auto cost = [this](int64_t rows, int64_t kv_head) { return layer_.cost(rows, kv_head); };
        schedule.build(layer_.plan, layer_.call, omp_get_max_threads(), cost);
        schedule_ = &schedule;
        states_ = states.get(schedule.state_floats);
        if (schedule.state_floats && !states_) return kOutOfMemory;
        parallel_for(schedule.jobs.size(), true, [this](int64_t i) { do_job(schedule_->jobs[i]); });
        if (!error_.load()) {
            parallel_for(schedule.splits.size(), true, [this](int64_t i) { merge_split(schedule_->splits[i]); });
        }
        return error_.load();
    }

private:
    // Memory of this thread: two states of the largest task, then the kernels' scratch.
    float* memory() {
        thread_local Buffer buffer;
        const int64_t rows = schedule_->rows;
        float* memory = buffer.get(2 * state_floats(layer_.plan, rows) + layer_.scratch(rows));
        if (!memory) error_ = kOutOfMemory;
        return memory;
    }

    bool add_stretch(const Task& task, int64_t stretch, const State& state, float* scratch) {
        const char* const error = layer_.attend_stretch(task, stretch, state, scratch);
        if (error) error_ = error;
        return !error;
    }

    void do_job(const Job& job) {
        float* memory = this->memory();
        if (!memory || error_.load(std::memory_order_relaxed)) return;
        const Task& task = schedule_->tasks[job.task];
        const int64_t rows = rows_of(layer_.plan, task), floats = state_floats(layer_.plan, rows);
        float* scratch = memory + 2 * floats;
        if (job.state >= 0) {
            add_stretch(task, job.first_stretch, state_at(states_ + job.state, rows), scratch);
            return;
        }
        const State total = state_at(memory, rows), part = state_at(memory + floats, rows);
        if (!add_stretch(task, job.first_stretch, total, scratch)) return;
        for (int64_t stretch = job.first_stretch + 1; stretch <= job.last_stretch; ++stretch) {
            if (!add_stretch(task, stretch, part, scratch)) return;
            layer_.kernels.merge(layer_.plan, rows, total, part);
        }
        layer_.kernels.finish(layer_.plan, layer_.call, task, total, scratch);
    }

    void merge_split(const Split& split) {
        float* memory = this->memory();
        if (!memory) return;
        const Task& task = schedule_->tasks[split.task];
        const int64_t rows = rows_of(layer_.plan, task), floats = state_floats(layer_.plan, rows);
        const State total = state_at(states_ + split.state, rows);
        for (int64_t i = 1; i < split.stretches; ++i) {
            layer_.kernels.merge(layer_.plan, rows, total, state_at(states_ + split.state + i * floats, rows));
        }
        layer_.kernels.finish(layer_.plan, layer_.call, task, total, memory);
    }

    const Layer layer_;
    const Schedule* schedule_ = nullptr;
    float* states_ = nullptr;
    std::atomic<const char*> error_{nullptr};
};

}  // namespace xquant
