// AMX's instructions on a processor without AMX: it refuses each, the signal is caught, the instruction read as Intel's
// manual encodes it (volume 2), and done by csrc/cpu/tiles/emulated.h. And instructions of a range, counted by kinds, one
// step at a time. For one thread; see amx_trap.py.
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/ucontext.h>

#include "common/simd.h"
#include "tiles/emulated.h"

using namespace xquant;

namespace {

enum Kind { kTileProduct, kTileMove, kTileControl, kDotProduct, kVector, kOther, kKinds };

struct sigaction old_illegal, old_trap;
uint64_t counts[kKinds], low_address, high_address;
bool stepping;

// A tile's instruction, or length 0.
struct Instruction {
    int length = 0;
    uint8_t opcode, prefix;  // prefix: 0 none, 1 66, 2 F3, 3 F2
    int reg, rm, third;
    bool in_memory;
    int64_t address, stride;
};

int64_t value(const gregset_t& registers, int number) {
    static const int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return registers[kOrder[number]];
}

bool is_tile(const uint8_t* code) {
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || code[2] & 0x84) return false;  // VEX.128.0F38.W0
    return code[3] == 0x49 || code[3] == 0x4b || code[3] == 0x5c || code[3] == 0x5e;
}

Instruction read(const uint8_t* code, const gregset_t& registers) {
    Instruction x;
    if (!is_tile(code)) return x;
    const int extend_index = code[1] & 0x40 ? 0 : 8, extend_base = code[1] & 0x20 ? 0 : 8;
    x.prefix = code[2] & 3;
    x.third = ~(code[2] >> 3) & 15;
    x.opcode = code[3];
    const uint8_t modes = code[4];
    const int mode = modes >> 6;
    x.reg = modes >> 3 & 7;
    x.rm = modes & 7;
    x.in_memory = mode != 3;
    const uint8_t* at = code + 5;
    x.address = x.stride = 0;
    if (x.in_memory) {
        bool relative = mode == 0 && x.rm == 5, wide = mode == 2 || relative;
        if (x.rm == 4) {
            const uint8_t scaled = *at++;
            const int index = (scaled >> 3 & 7) + extend_index, base = scaled & 7;
            if (index != 4) x.stride = value(registers, index) << (scaled >> 6);
            if (mode == 0 && base == 5) {
                wide = true;
            } else {
                x.address = value(registers, base + extend_base);
            }
        } else if (!relative) {
            x.address = value(registers, x.rm + extend_base);
        }
        if (wide) {
            int32_t offset;
            memcpy(&offset, at, 4);
            x.address += offset;
            at += 4;
        } else if (mode == 1) {
            x.address += (int8_t)*at++;
        }
        if (relative) x.address += (int64_t)at;
    }
    x.length = int(at - code);
    return x;
}

// False: it is none that the kernels use.
bool run(const Instruction& x) {
    if (x.opcode == 0x49) {
        if (x.prefix == 0 && x.in_memory && x.reg == 0) {  // LDTILECFG
            const uint8_t* config = (const uint8_t*)(x.address + x.stride);
            uint16_t row_bytes[16];
            memcpy(row_bytes, config + 16, sizeof row_bytes);
            if (config[0] != 1 || config[1] != 0) return false;
            emulated_tiles.configure(row_bytes, config + 48);
        } else if (x.prefix == 0 && !x.in_memory && x.reg == 0 && x.rm == 0) {  // TILERELEASE
            emulated_tiles.release();
        } else if (x.prefix == 3 && !x.in_memory && x.rm == 0) {  // TILEZERO
            emulated_tiles.zero(x.reg);
        } else {
            return false;
        }
        return true;
    }
    if (x.opcode == 0x4b) {
        if (!x.in_memory || x.rm != 4) return false;
        if (x.prefix == 3) {  // TILELOADD
            emulated_tiles.load(x.reg, (const void*)x.address, x.stride);
        } else if (x.prefix == 2) {  // TILESTORED
            emulated_tiles.store(x.reg, (void*)x.address, x.stride);
        } else {
            return false;
        }
        return true;
    }
    if (x.in_memory || x.prefix != 2) return false;
    if (x.opcode == 0x5e) {  // TDPBSUD
        emulated_tiles.multiply_bytes(x.reg, x.rm, x.third);
    } else {  // TDPBF16PS
        emulated_tiles.multiply_bfloats(x.reg, x.rm, x.third);
    }
    return true;
}

Kind kind_of(const uint8_t* code) {
    if (is_tile(code)) return code[3] == 0x49 ? kTileControl : code[3] == 0x4b ? kTileMove : kTileProduct;
    if (code[0] != 0x62 || (code[3] >> 5 & 3) != 2) return kOther;  // EVEX.512
    const bool product = (code[1] & 7) == 2 && (code[2] & 3) == 1 && (code[4] == 0x50 || code[4] == 0x52);
    return product ? kDotProduct : kVector;
}

void count(int64_t address) {
    if (stepping && (uint64_t)address >= low_address && (uint64_t)address < high_address) {
        ++counts[kind_of((const uint8_t*)address)];
    }
}

void on_illegal(int, siginfo_t*, void* context) {
    gregset_t& registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    const Instruction x = read((const uint8_t*)registers[REG_RIP], registers);
    if (!x.length || !run(x)) {  // not ours: it is met again, without this handler
        sigaction(SIGILL, &old_illegal, nullptr);
        return;
    }
    registers[REG_RIP] += x.length;
    // A step traps after an instruction that was run, so not after this one.
    count(registers[REG_RIP]);
}

void on_step(int, siginfo_t*, void* context) {
    gregset_t& registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    constexpr int64_t kTrapFlag = 0x100;
    registers[REG_EFL] = stepping ? registers[REG_EFL] | kTrapFlag : registers[REG_EFL] & ~kTrapFlag;
    count(registers[REG_RIP]);
}

void handle(int signal, void (*handler)(int, siginfo_t*, void*), struct sigaction* old) {
    struct sigaction action = {};
    action.sa_sigaction = handler;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(signal, &action, old);
}

}  // namespace

extern "C" {

void trap_start() { handle(SIGILL, on_illegal, &old_illegal); }

void trap_stop() { sigaction(SIGILL, &old_illegal, nullptr); }

void count_start(uint64_t low, uint64_t high) {
    memset(counts, 0, sizeof counts);
    low_address = low;
    high_address = high;
    handle(SIGTRAP, on_step, &old_trap);
    stepping = true;
    raise(SIGTRAP);
}

void count_stop(uint64_t* to) {
    stepping = false;
    raise(SIGTRAP);
    sigaction(SIGTRAP, &old_trap, nullptr);
    memcpy(to, counts, sizeof counts);
}

}  // extern "C"
