// Which kernels run: the best that this machine has, or what was asked for.
#include <atomic>
#include <cstring>

#include <omp.h>

#include "api.h"
#include "isa.h"
#include "kernels.h"

namespace xquant {
namespace {

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

}  // namespace

const Kernels& chosen_kernels() { return *chosen.load(); }

}  // namespace xquant

using namespace xquant;

extern "C" {

const char* xquant_cpu_isa(void) { return chosen.load()->name; }

int xquant_cpu_set_isa(const char* name) {
    const Kernels* kernels = find(name);
    if (kernels) chosen = kernels;
    return kernels != nullptr;
}

int xquant_cpu_threads(void) { return omp_get_max_threads(); }

}  // extern "C"
