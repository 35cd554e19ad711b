// Matrix products of a warp on tensor cores, and the loads that bring their operands from shared memory.
//
// Of lane l, with g = l / 4 and t = l % 4, the registers hold (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//
//     a[0], a[1], a[2], a[3]   rows g, g + 8, g, g + 8; columns 2 t and 2 t + 1, of a[2] and a[3] 8 further
//     b[0], b[1]               rows 2 t and 2 t + 1, of b[1] 8 further; column g
//     c[0], c[1]               row g, columns 2 t and 2 t + 1;    c[2], c[3]   row g + 8
//
// Of bytes ("Matrix Fragments for mma.m16n8k32") a register holds four, so that t counts columns of a and rows of b by
// four and "8 further" is 16 further; c is the same.
#ifndef XQUANT_CUDA_MMA_H
#define XQUANT_CUDA_MMA_H

#include "common/numbers.h"

namespace xquant {

// c[16, 8] += a[16, 16] b[16, 8]; a and b of type T, c FP32. Subnormal operands count as what they are.
template <int T>
XQUANT_DEVICE void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef XQUANT_EMULATION
    emulation::mma_16816(c, a, b, T == kBf16);
#else
    if constexpr (T == kBf16) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#endif
}

// c[16, 8] += a[16, 32] b[32, 8]: unsigned bytes times signed ones, summed exactly.
XQUANT_DEVICE void mma_16832(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef XQUANT_EMULATION
    emulation::mma_16832(c, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8 x 8 matrices of 16-bit numbers. Lane l names row l % 8 of matrix l / 8, 16 bytes that start at a multiple of
// 16, and gets of matrix i in r[i] row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1: of 16 bytes a row, 4 (l % 4) and the
// three after it.
XQUANT_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
#ifdef XQUANT_EMULATION
    emulation::load_matrices(r, row, false);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
#endif
}

// The same, every matrix transposed.
XQUANT_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
#ifdef XQUANT_EMULATION
    emulation::load_matrices(r, row, true);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
#endif
}

}  // namespace xquant

#endif
