// Tile registers: AMX, or the same by plain C++, bit for bit, for the instruction set "amx-emulated" that tests compare.
//
// A tile is up to 16 rows of up to 64 bytes. A product adds A [rows][k] times B [k][columns] to C [rows][columns] of 32
// bits, where four (INT8) or two (BF16) neighbouring k lie in 32 bits of a row of A, and of a row of B.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define XQUANT_TILES
#elif defined(XQUANT_EMULATE_TILES)
#define XQUANT_TILES
#include "tiles/emulated.h"
#endif

namespace xquant {
namespace {

#if defined(XQUANT_TILES)
constexpr bool kTiles = true;
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 64;  // of a row

// What LDTILECFG reads.
struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");

#if !defined(XQUANT_EMULATE_TILES)
inline void configure_tiles(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }

inline void release_tiles() { asm volatile("tilerelease"); }

template <int kNumber>
inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kNumber));
}

// Rows are `stride` bytes apart.
template <int kNumber>
inline void load_tile(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kNumber) : "memory");
}

template <int kNumber>
inline void store_tile(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kNumber) : "memory");
}

// C += A * B of signed bytes times unsigned ones, in INT32.
template <int kC, int kA, int kB>
inline void multiply_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

// C += A * B of BF16, in FP32.
template <int kC, int kA, int kB>
inline void multiply_bfloats() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}
#else
inline void configure_tiles(const TileConfig& config) { emulated_tiles.configure(config.row_bytes, config.rows); }
inline void release_tiles() { emulated_tiles.release(); }
template <int kNumber>
inline void zero_tile() {
    emulated_tiles.zero(kNumber);
}
template <int kNumber>
inline void load_tile(const void* from, int64_t stride) {
    emulated_tiles.load(kNumber, from, stride);
}
template <int kNumber>
inline void store_tile(void* to, int64_t stride) {
    emulated_tiles.store(kNumber, to, stride);
}
template <int kC, int kA, int kB>
inline void multiply_bytes() {
    emulated_tiles.multiply_bytes(kC, kA, kB);
}
template <int kC, int kA, int kB>
inline void multiply_bfloats() {
    emulated_tiles.multiply_bfloats(kC, kA, kB);
}
#endif

// Which tile is for what. Rows of a task's queries go in blocks of 16; those that are left go through tiles of so many
// rows, which cost less.
enum { kSumTile = 0, kOtherSumTile = 1, kLeftTile = 2, kRightTile = 3, kOtherRightTile = 4 };
enum { kLastSumTile = 5, kLastOtherSumTile = 6, kLastLeftTile = 7 };

// Before a task of so many rows uses tiles; release_tiles() follows.
inline void configure_tiles_for(int64_t rows) {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = kTileBytes;
        config.rows[i] = kTileRows;
    }
    const int64_t last = rows % kTileRows;
    if (last) config.rows[kLastSumTile] = config.rows[kLastOtherSumTile] = config.rows[kLastLeftTile] = (uint8_t)last;
    configure_tiles(config);
}
#else
constexpr bool kTiles = false;

inline void configure_tiles_for(int64_t) {}
inline void release_tiles() {}
#endif

}  // namespace
}  // namespace xquant
