// Copies from global to shared memory that run beside other work.
#ifndef XQUANT_CUDA_COPY_H
#define XQUANT_CUDA_COPY_H

#include "common/platform.h"

namespace xquant {

// Start to copy 16 bytes; both addresses are multiples of 16. They pass by L1: every byte is read once.
XQUANT_DEVICE void copy_16(void* shared, const void* global) {
#ifdef XQUANT_EMULATION
    emulation::copy_16(shared, global);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
                 "l"(global)
                 : "memory");
#endif
}

// The copies that this thread has started since the last call are a group.
XQUANT_DEVICE void end_copy_group() {
#ifdef XQUANT_EMULATION
    emulation::end_copy_group();
#else
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Wait until at most `Pending` of this thread's groups are under way. Other threads see the bytes after a barrier.
template <int Pending>
XQUANT_DEVICE void wait_for_copies() {
#ifdef XQUANT_EMULATION
    emulation::wait_for_copies(Pending);
#else
    asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
#endif
}

}  // namespace xquant

#endif
