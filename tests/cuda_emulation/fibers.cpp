// Scheduling of a block's threads. Switches are longjmps between stacks: no system call, unlike swapcontext.
#include "fibers.h"

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>

#include "cuda_emulation.h"

dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 64;
constexpr unsigned char kPoison = 0xFF, kGuard = 0xA5;

std::vector<Fiber> fibers;
std::vector<Exchange> warps;
std::vector<unsigned char> shared;
unsigned char* shared_begin = nullptr;
size_t shared_size = 0;
const std::function<void()>* body = nullptr;
jmp_buf scheduler;
int running = 0;
int order = 0;
bool failed = false;

void enter() {
    (*body)();
    fiber().state = State::kDone;
    _longjmp(scheduler, 1);
}

void run(int index) {
    running = index;
    threadIdx.x = static_cast<unsigned>(index);
    if (_setjmp(scheduler) != 0) return;
    Fiber& next = fibers[static_cast<size_t>(index)];
    if (next.started) _longjmp(next.resume, 1);
    next.started = true;
    getcontext(&next.context);
    next.context.uc_stack.ss_sp = next.stack.get();
    next.context.uc_stack.ss_size = kStackBytes;
    next.context.uc_link = nullptr;
    makecontext(&next.context, enter, 0);
    setcontext(&next.context);
}

void yield(State state) {
    fiber().state = state;
    if (_setjmp(fiber().resume) == 0) _longjmp(scheduler, 1);
}

// Which thread goes first: ascending, descending, or drawn from `order`.
std::vector<int> schedule(int threads, unsigned block) {
    std::vector<int> result(static_cast<size_t>(threads));
    std::iota(result.begin(), result.end(), 0);
    if (order == 1) std::reverse(result.begin(), result.end());
    if (order > 1) std::shuffle(result.begin(), result.end(), std::mt19937(static_cast<unsigned>(order) + block));
    return result;
}

// False where threads wait for each other in vain.
bool run_block(int threads, unsigned block) {
    for (int index = 0; index < threads; ++index) {
        Fiber& next = fibers[static_cast<size_t>(index)];
        next.started = false;
        next.state = State::kReady;
        next.operations = 0;
        next.groups.assign(1, {});
    }
    for (Exchange& warp : warps) warp.arrived = 0;
    std::fill(shared.begin(), shared.end(), kPoison);
    std::fill_n(shared_begin + shared_size, kGuardBytes, kGuard);
    const std::vector<int> turns = schedule(threads, block);
    for (;;) {
        bool any = false;
        for (const int index : turns) {
            if (fibers[static_cast<size_t>(index)].state != State::kReady) continue;
            any = true;
            run(index);
            if (failed) return false;
        }
        if (any) continue;
        int waiting = 0, done = 0;
        for (int index = 0; index < threads; ++index) {
            waiting += fibers[static_cast<size_t>(index)].state == State::kAtBlockBarrier;
            done += fibers[static_cast<size_t>(index)].state == State::kDone;
        }
        if (done == threads) break;
        if (waiting + done != threads) return false;
        for (int index = 0; index < threads; ++index)
            if (fibers[static_cast<size_t>(index)].state == State::kAtBlockBarrier)
                fibers[static_cast<size_t>(index)].state = State::kReady;
    }
    for (size_t at = 0; at < kGuardBytes; ++at)
        if (shared_begin[shared_size + at] != kGuard) {
            std::fprintf(stderr, "CUDA emulation: a block wrote behind its shared memory\n");
            return false;
        }
    return true;
}

}  // namespace

int current() { return running; }
Fiber& fiber() { return fibers[static_cast<size_t>(running)]; }

void fail(const char* what) {
    std::fprintf(stderr, "CUDA emulation: %s (block %u %u %u, thread %d)\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
                 running);
    failed = true;
    _longjmp(scheduler, 1);
}

bool in_shared_memory(const void* begin, size_t bytes) {
    const auto* at = static_cast<const unsigned char*>(begin);
    return at >= shared_begin && at + bytes <= shared_begin + shared_size;
}

unsigned char* shared_memory() { return shared_begin; }

const uint64_t* exchange(const uint64_t* given, int words, Combine combine) {
    const int warp_index = running / kLanes, lane = running % kLanes;
    Exchange& warp = warps[static_cast<size_t>(warp_index)];
    const unsigned which = fiber().operations++ % 2;
    std::copy_n(given, words, warp.given[which][lane]);
    if (++warp.arrived < kLanes) {
        yield(State::kAtWarpBarrier);
    } else {
        warp.arrived = 0;
        combine(warp.given[which], warp.result[which]);
        for (int of_warp = 0; of_warp < kLanes; ++of_warp) {
            Fiber& other = fibers[static_cast<size_t>(warp_index * kLanes + of_warp)];
            if (other.state == State::kAtWarpBarrier) other.state = State::kReady;
        }
    }
    return warp.result[which][lane];
}

cudaError_t launch(const std::function<void()>& thread, dim3 grid, int threads, size_t shared_bytes) {
    if (threads % kLanes != 0) return cudaErrorInvalidValue;
    failed = false;
    body = &thread;
    while (fibers.size() < static_cast<size_t>(threads)) {
        fibers.emplace_back();
        fibers.back().stack.reset(new unsigned char[kStackBytes]);
    }
    warps.resize(static_cast<size_t>(threads / kLanes));
    shared.assign(shared_bytes + kGuardBytes + 16, kPoison);
    shared_begin = shared.data() + (-reinterpret_cast<uintptr_t>(shared.data()) & 15);
    shared_size = shared_bytes;
    gridDim = grid;
    blockDim = {static_cast<unsigned>(threads), 1, 1};
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, z};
                if (!run_block(threads, (z * grid.y + y) * grid.x + x)) return cudaErrorLaunchFailure;
            }
    return cudaSuccess;
}

}  // namespace emulation

void __syncthreads() { emulation::yield(emulation::State::kAtBlockBarrier); }

// 0: threads run in ascending order, 1: in descending order, others: in an order drawn from the number.
extern "C" void xquant_emulation_order(int order) { emulation::order = order; }
