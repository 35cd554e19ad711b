// What single instructions do, as the PTX ISA documents it.
#include <cstring>

#include "cuda_emulation.h"
#include "fibers.h"

namespace emulation {
namespace {

float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

uint64_t pair(uint32_t low, uint32_t high) { return low | static_cast<uint64_t>(high) << 32; }

// Half h of a register, by the type's bits.
float half_of(uint64_t word, int h, bool bf16) {
    const auto bits = static_cast<uint16_t>(word >> (16 * h));
    return bf16 ? from_bf16(bits) : from_fp16(bits);
}

template <bool kBf16>
void combine_mma(const uint64_t (*given)[kWords], uint64_t (*result)[kWords]) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        const int group = lane / 4, member = lane % 4;
        const uint64_t* words = given[lane];
        for (int h = 0; h < 2; ++h) {
            const int column = 2 * member + h;
            a[group][column] = half_of(words[0], h, kBf16);
            a[group + 8][column] = half_of(words[0] >> 32, h, kBf16);
            a[group][column + 8] = half_of(words[1], h, kBf16);
            a[group + 8][column + 8] = half_of(words[1] >> 32, h, kBf16);
            b[column][group] = half_of(words[2], h, kBf16);
            b[column + 8][group] = half_of(words[2] >> 32, h, kBf16);
        }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        const int group = lane / 4, member = lane % 4;
        for (int index = 0; index < 4; ++index) {
            const int row = group + (index >= 2 ? 8 : 0), column = 2 * member + index % 2;
            // Products of 16-bit numbers are exact in double; the sum is rounded once.
            double sum = as_float(static_cast<uint32_t>(given[lane][3 + index / 2] >> (32 * (index % 2))));
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
            result[lane][index] = as_bits(static_cast<float>(sum));
        }
    }
}

void combine_mma_bytes(const uint64_t (*given)[kWords], uint64_t (*result)[kWords]) {
    int a[16][32], b[32][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        const int group = lane / 4, member = lane % 4;
        const uint64_t* words = given[lane];
        for (int byte = 0; byte < 4; ++byte) {
            const int column = 4 * member + byte;
            const auto of = [byte](uint64_t word) { return static_cast<uint8_t>(word >> (8 * byte)); };
            a[group][column] = of(words[0]);
            a[group + 8][column] = of(words[0] >> 32);
            a[group][column + 16] = of(words[1]);
            a[group + 8][column + 16] = of(words[1] >> 32);
            b[column][group] = static_cast<int8_t>(of(words[2]));
            b[column + 16][group] = static_cast<int8_t>(of(words[2] >> 32));
        }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        const int group = lane / 4, member = lane % 4;
        for (int index = 0; index < 4; ++index) {
            const int row = group + (index >= 2 ? 8 : 0), column = 2 * member + index % 2;
            // Sums wrap around.
            auto sum = static_cast<uint32_t>(given[lane][3 + index / 2] >> (32 * (index % 2)));
            for (int k = 0; k < 32; ++k) sum += static_cast<uint32_t>(a[row][k] * b[k][column]);
            result[lane][index] = sum;
        }
    }
}

template <bool kTransposed>
void combine_matrices(const uint64_t (*given)[kWords], uint64_t (*result)[kWords]) {
    for (int lane = 0; lane < kLanes; ++lane)
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint32_t register_bits = 0;
            for (int h = 0; h < 2; ++h) {
                const int row = kTransposed ? 2 * (lane % 4) + h : lane / 4;
                const int column = kTransposed ? lane / 4 : 2 * (lane % 4) + h;
                uint16_t element;
                const auto* at = reinterpret_cast<const unsigned char*>(given[8 * matrix + row][0]);
                std::memcpy(&element, at + 2 * column, sizeof element);
                register_bits |= static_cast<uint32_t>(element) << (16 * h);
            }
            result[lane][matrix] = register_bits;
        }
}

template <int kDistance>
void combine_shuffle(const uint64_t (*given)[kWords], uint64_t (*result)[kWords]) {
    for (int lane = 0; lane < kLanes; ++lane) result[lane][0] = given[lane ^ kDistance][0];
}

void combine_ballot(const uint64_t (*given)[kWords], uint64_t (*result)[kWords]) {
    uint64_t every = 0;
    for (int lane = 0; lane < kLanes; ++lane) every |= static_cast<uint64_t>(given[lane][0] != 0) << lane;
    for (int lane = 0; lane < kLanes; ++lane) result[lane][0] = every;
}

void combine_nothing(const uint64_t (*)[kWords], uint64_t (*)[kWords]) {}

}  // namespace

float from_fp16(uint16_t bits) {
    _Float16 x;
    std::memcpy(&x, &bits, sizeof x);
    return static_cast<float>(x);
}

uint16_t to_fp16(float x) {
    const auto rounded = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    return bits;
}

float from_bf16(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }

uint16_t to_bf16(float x) {
    const uint32_t bits = as_bits(x);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bf16) {
    const uint64_t given[] = {pair(a[0], a[1]), pair(a[2], a[3]), pair(b[0], b[1]),
                              pair(as_bits(c[0]), as_bits(c[1])), pair(as_bits(c[2]), as_bits(c[3]))};
    const uint64_t* result = exchange(given, 5, bf16 ? combine_mma<true> : combine_mma<false>);
    for (int index = 0; index < 4; ++index) c[index] = as_float(static_cast<uint32_t>(result[index]));
}

void mma_16832(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const auto bits = [&c](int index) { return static_cast<uint32_t>(c[index]); };
    const uint64_t given[] = {pair(a[0], a[1]), pair(a[2], a[3]), pair(b[0], b[1]), pair(bits(0), bits(1)),
                              pair(bits(2), bits(3))};
    const uint64_t* result = exchange(given, 5, combine_mma_bytes);
    for (int index = 0; index < 4; ++index) c[index] = static_cast<int32_t>(result[index]);
}

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0 || !in_shared_memory(row, 16)) fail("ldmatrix at a wrong address");
    const uint64_t given[] = {reinterpret_cast<uint64_t>(row)};
    const uint64_t* result = exchange(given, 1, transposed ? combine_matrices<true> : combine_matrices<false>);
    for (int index = 0; index < 4; ++index) r[index] = static_cast<uint32_t>(result[index]);
}

void copy_16(void* shared, const void* global) {
    if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || !in_shared_memory(shared, 16)) fail("copy to a wrong address");
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("copy from an odd address");
    fiber().groups.back().push_back({shared, global});
}

void end_copy_group() { fiber().groups.emplace_back(); }

void wait_for_copies(int pending) {
    auto& groups = fiber().groups;
    // The last group is still open.
    while (static_cast<int>(groups.size()) - 1 > pending) {
        for (const Copy& copy : groups.front()) std::memcpy(copy.shared, copy.global, 16);
        groups.erase(groups.begin());
    }
}

}  // namespace emulation

float __shfl_xor_sync(unsigned, float x, int distance) {
    using namespace emulation;
    const uint64_t given[] = {as_bits(x)};
    Combine combine = nullptr;
    switch (distance) {
        case 1: combine = combine_shuffle<1>; break;
        case 2: combine = combine_shuffle<2>; break;
        case 4: combine = combine_shuffle<4>; break;
        case 8: combine = combine_shuffle<8>; break;
        case 16: combine = combine_shuffle<16>; break;
        default: fail("a shuffle over an odd distance");
    }
    return as_float(static_cast<uint32_t>(*exchange(given, 1, combine)));
}

unsigned __ballot_sync(unsigned, int predicate) {
    const uint64_t given[] = {predicate != 0};
    return static_cast<unsigned>(*emulation::exchange(given, 1, emulation::combine_ballot));
}

void __syncwarp() {
    const uint64_t given[] = {0};
    emulation::exchange(given, 1, emulation::combine_nothing);
}

uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((low | static_cast<uint64_t>(high) << 32) >> (shift & 31));
}

float __int_as_float(int x) { return emulation::as_float(static_cast<uint32_t>(x)); }
