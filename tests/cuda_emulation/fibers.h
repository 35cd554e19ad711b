// The threads of a block as fibers, and what they have beside their stacks.
#ifndef XQUANT_EMULATION_FIBERS_H
#define XQUANT_EMULATION_FIBERS_H

#include <csetjmp>
#include <cstdint>
#include <ucontext.h>
#include <functional>
#include <memory>
#include <vector>

namespace emulation {

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

struct Copy {
    void* shared;
    const void* global;
};

struct Fiber {
    std::unique_ptr<unsigned char[]> stack;
    ucontext_t context;
    jmp_buf resume;
    bool started = false;
    State state = State::kReady;
    unsigned operations = 0;                  // warp operations so far
    std::vector<std::vector<Copy>> groups{1};  // asynchronous copies; the last group is open
};

// What lanes hand to each other. Two of each: a lane may be one operation ahead of another.
constexpr int kLanes = 32, kWords = 8;
struct Exchange {
    uint64_t given[2][kLanes][kWords];
    uint64_t result[2][kLanes][kWords];
    int arrived = 0;
};

// The running thread's index within its block.
int current();

// All lanes give `words` numbers; the last to arrive calls `combine` with what all of them gave; then every lane gets
// its row of the result.
using Combine = void (*)(const uint64_t (*given)[kWords], uint64_t (*result)[kWords]);
const uint64_t* exchange(const uint64_t* given, int words, Combine combine);

Fiber& fiber();

// Report misuse and end the launch, which then returns an error.
[[noreturn]] void fail(const char* what);

bool in_shared_memory(const void* begin, size_t bytes);

}  // namespace emulation

#endif
