// Whether this process may use AMX: what the processor, the operating system and the process's own rights say.
#pragma once

#include <stdint.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace xquant {
namespace {

struct TileFacts {
    uint64_t leaf7_edx;    // CPUID 7.0 EDX
    uint64_t leaf7_1_eax;  // CPUID 7.1 EAX
    uint64_t xcr0;         // what the operating system saves; 0 where it does not say
    bool permitted;        // the kernel grants this process the state of tiles
};

constexpr const char* kNoTiles = "the processor has no AMX";

// Why there are no tiles; NULL: there are.
inline const char* why_no_tiles(const TileFacts& facts) {
    constexpr uint64_t kTileBit = 1 << 24, kInt8Bit = 1 << 25, kBfloatBit = 1 << 22;
    constexpr uint64_t kVectorBfloatBit = 1 << 5, kTileState = 3 << 17;
    if (!(facts.leaf7_edx & kTileBit)) return kNoTiles;
    if (!(facts.leaf7_edx & kInt8Bit) || !(facts.leaf7_edx & kBfloatBit) || !(facts.leaf7_1_eax & kVectorBfloatBit)) {
        return "the processor's AMX lacks INT8 or BF16";
    }
    if ((facts.xcr0 & kTileState) != kTileState) return "the operating system does not save AMX's state";
    if (!facts.permitted) return "the kernel does not let this process use AMX";
    return nullptr;
}

#if defined(__x86_64__) && defined(__linux__)
// Asks the kernel for permission, for all threads of the process, if nothing else is missing.
inline TileFacts tile_facts() {
    TileFacts facts = {};
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return facts;
    facts.leaf7_edx = edx;
    if (eax >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) facts.leaf7_1_eax = eax;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx & (1u << 27)) {
        uint32_t low, high;
        asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        facts.xcr0 = low | (uint64_t)high << 32;
    }
    facts.permitted = true;
    if (!why_no_tiles(facts)) {
        constexpr long kRequestPermission = 0x1023, kTileData = 18;
        facts.permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }
    return facts;
}
#else
inline TileFacts tile_facts() { return {}; }
#endif

}  // namespace
}  // namespace xquant
