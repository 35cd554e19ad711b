// Which thread does what. Plain C++, compiled once, without vector flags.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <vector>

#include <omp.h>

#include "api.h"
#include "kernels.h"

namespace xquant {

// Memory of one thread that outlives a call: grows, never shrinks, aligned for the widest vectors.
class Buffer {
public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    float* get(int64_t floats) {
        if (floats > size_) {
            std::free(data_);
            data_ = nullptr;
            size_ = 0;
            void* memory = nullptr;
            if (posix_memalign(&memory, 64, floats * sizeof(float))) return nullptr;
            // Padding of rows is computed with and thrown away; zeros keep it free of slow denormals.
            std::fill_n(static_cast<float*>(memory), floats, 0.0f);
            data_ = static_cast<float*>(memory);
            size_ = floats;
        }
        return data_;
    }

private:
    float* data_ = nullptr;
    int64_t size_ = 0;
};

// Call body(i) for i in [0, count) on all threads, started in ascending order; a count of 1 and nested calls on this one.
// The team is always all threads or one: an OpenMP runtime may end and restart its threads when the size changes.
template <typename Body>
void parallel_for(int64_t count, bool parallel, const Body& body) {
    if (count <= 1 || !parallel || omp_in_parallel()) {
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
    std::atomic<int64_t> next{0};
#pragma omp parallel
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) body(i);
}

inline int64_t rows_of(const xquant_plan& plan, const Task& task) {
    return task.query_count * task.kv_heads * (plan.num_heads / plan.num_kv_heads);
}

inline int64_t pad(int64_t floats) { return (floats + kPad - 1) / kPad * kPad; }

// Floats of the state of a task with `rows` rows: a multiple of kPad.
inline int64_t state_floats(const xquant_plan& plan, int64_t rows) {
    return 2 * pad(rows) + rows * pad(plan.value.width);
}

inline State state_at(float* memory, int64_t rows) { return {memory, memory + pad(rows), memory + 2 * pad(rows)}; }

// A task, or one stretch of its context.
struct Job {
    int64_t task;
    int64_t first_stretch;
    int64_t last_stretch;  // inclusive
    int64_t state;         // of one stretch: where its state goes, in floats; -1: all of the task, finished at once
    double cost;
};

// A task cut into stretches, whose states are merged afterwards.
struct Split {
    int64_t task;
    int64_t stretches;
    int64_t state;  // of its first stretch; the others follow
};

struct Schedule {
    std::vector<Task> tasks;
    std::vector<Job> jobs;  // most expensive first
    std::vector<Split> splits;
    int64_t state_floats = 0;  // of all stretches of split tasks
    int64_t rows = 0;          // of the largest task

    // `cost` says what a cached token costs a task with so many rows of a kv head; only ratios of costs count.
    template <typename Cost>
    void build(const xquant_plan& plan, const xquant_attention_call& call, int threads, const Cost& cost);

private:
    void add_tasks(const xquant_plan& plan, const xquant_attention_call& call);
};

inline void Schedule::add_tasks(const xquant_plan& plan, const xquant_attention_call& call) {
    const int64_t group = plan.num_heads / plan.num_kv_heads;
    const int64_t tile = std::max<int64_t>(1, kQueryRows / group);
    for (int64_t sequence = 0; sequence < call.num_seqs; ++sequence) {
        const int64_t begin = call.query_start_loc[sequence], end = call.query_start_loc[sequence + 1];
        const int64_t position = call.seq_lens[sequence] - (end - begin);  // of the first query token
        const int64_t shared = (end - begin) * plan.num_heads * plan.value.width;
        const bool shares = plan.shares_latents && (end - begin == 1 || shared <= kSharedFloats);
        const int64_t together = shares ? plan.num_kv_heads : 1;
        for (int64_t query = begin; query < end; query += tile) {
            const int64_t count = std::min(tile, end - query), first = position + (query - begin);
            const int64_t oldest = plan.sliding_window ? std::max<int64_t>(0, first - plan.sliding_window + 1) : 0;
            rows = std::max(rows, count * group * together);
            for (int64_t kv_head = 0; kv_head < plan.num_kv_heads; kv_head += together) {
                tasks.push_back({sequence, kv_head, query, count, first, oldest, first + count, together});
            }
        }
    }
}

template <typename Cost>
inline void Schedule::build(const xquant_plan& plan, const xquant_attention_call& call, int threads, const Cost& cost) {
    tasks.clear();
    jobs.clear();
    splits.clear();
    state_floats = rows = 0;
    add_tasks(plan, call);
    double total = 0;
    for (size_t index = 0; index < tasks.size(); ++index) {
        const Task& task = tasks[index];
        const double of_token = cost(rows_of(plan, task) / task.kv_heads, task.kv_head) * double(task.kv_heads);
        const double whole = of_token * double(task.end - task.oldest);
        jobs.push_back({int64_t(index), task.oldest / kStretch, (task.end - 1) / kStretch, -1, whole});
        total += whole;
    }
    // Cut what would keep the other threads waiting. Results do not depend on this: see kStretch.
    const size_t count = jobs.size();
    for (size_t index = 0; threads > 1 && index < count; ++index) {
        const Job job = jobs[index];
        const int64_t stretches = job.last_stretch - job.first_stretch + 1;
        if (stretches == 1 || job.cost * threads * 4 < total) continue;
        const int64_t floats = xquant::state_floats(plan, rows_of(plan, tasks[job.task]));
        splits.push_back({job.task, stretches, state_floats});
        for (int64_t stretch = job.first_stretch; stretch <= job.last_stretch; ++stretch) {
            const Job part = {job.task, stretch, stretch, state_floats, job.cost / double(stretches)};
            state_floats += floats;
            if (stretch == job.first_stretch) {
                jobs[index] = part;
            } else {
                jobs.push_back(part);
            }
        }
    }
    std::sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) { return a.cost > b.cost; });
}

}  // namespace xquant
