// Which kernels run: the best that this machine has, or what was asked for.
#include <atomic>
#include <cstring>

#include <omp.h>

#include "api.h"
#include "isa.h"
#include "kernels.h"
#include "tiles/processor.h"

namespace xquant {
namespace {

// Why this process does not use AMX; NULL: it may. Asked once, since the answer asks the kernel for permission.
const char* tiles_refused() {
#if defined(XQUANT_WITH_AMX)
    static const char* const reason = why_no_tiles(tile_facts());
    return reason;
#else
    return "this build was made by a compiler without AMX";
#endif
}

bool supported(const Kernels& kernels) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
#if defined(XQUANT_WITH_AMX)
    if (&kernels == &kAmxKernels) return vnni && !tiles_refused();
#endif
#if defined(XQUANT_WITH_EMULATED_AMX)
    if (&kernels == &kEmulatedAmxKernels) return vnni;
#endif
    if (&kernels == &kVnniKernels) return vnni;
    if (&kernels == &kAvx512Kernels) return avx512;
    // F16C is not asked for: no CPU has FMA3 without it.
    if (&kernels == &kAvx2Kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return &kernels == &kPortableKernels;
}

#if defined(XQUANT_WITH_AMX) && defined(XQUANT_WITH_EMULATED_AMX)
// The code for AMX on a processor that lacks nothing else, for tests that catch and do its instructions.
const Kernels* find_trapped() {
    const bool rest = supported(kVnniKernels) && __builtin_cpu_supports("avx512bf16");
    return rest ? &kAmxKernels : nullptr;
}
#else
const Kernels* find_trapped() { return nullptr; }
#endif

// NULL where it is not available. Without a name the first that is.
const Kernels* find(const char* name) {
    if (name && !std::strcmp(name, "amx-trapped")) return find_trapped();
    const Kernels* const all[] = {
#if defined(XQUANT_WITH_AMX)
        &kAmxKernels,
#endif
#if defined(__x86_64__)
        &kVnniKernels,
        &kAvx512Kernels,
        &kAvx2Kernels,
#endif
        &kPortableKernels,
#if defined(XQUANT_WITH_EMULATED_AMX)
        &kEmulatedAmxKernels,  // last, so never the first that is
#endif
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

const char* xquant_cpu_tiles_refused(void) { return tiles_refused(); }

const char* xquant_cpu_why_no_tiles(uint64_t leaf7_edx, uint64_t leaf7_1_eax, uint64_t xcr0, int permitted) {
    return why_no_tiles({leaf7_edx, leaf7_1_eax, xcr0, permitted != 0});
}

int xquant_cpu_threads(void) { return omp_get_max_threads(); }

}  // extern "C"
