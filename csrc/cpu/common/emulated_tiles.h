// What AMX's instructions do, written down after Intel's manual (volume 2, TDPBSUD and TDPBF16PS): for tests on processors
// without it. Wrong use, which the processor answers with an exception, ends the process.
#pragma once

#include <stdint.h>
#include <string.h>

namespace xquant {
namespace {

class EmulatedTiles {
public:
    void configure(const uint16_t* row_bytes, const uint8_t* rows) {
        memset(tiles_, 0, sizeof tiles_);
        for (int i = 0; i < 8; ++i) {
            require(row_bytes[i] <= 64 && row_bytes[i] % 4 == 0 && rows[i] <= 16);
            tiles_[i].row_bytes = row_bytes[i];
            tiles_[i].rows = rows[i];
        }
        configured_ = true;
    }

    void release() { configured_ = false; }

    void zero(int tile) {
        require(configured_);
        memset(tiles_[tile].data, 0, sizeof tiles_[tile].data);
    }

    void load(int tile, const void* from, int64_t stride) {
        zero(tile);
        for (int row = 0; row < tiles_[tile].rows; ++row) {
            memcpy(tiles_[tile].data[row], (const uint8_t*)from + row * stride, tiles_[tile].row_bytes);
        }
    }

    void store(int tile, void* to, int64_t stride) const {
        require(configured_);
        for (int row = 0; row < tiles_[tile].rows; ++row) {
            memcpy((uint8_t*)to + row * stride, tiles_[tile].data[row], tiles_[tile].row_bytes);
        }
    }

    // TDPBSUD
    void multiply_bytes(int c, int a, int b) {
        check(c, a, b);
        for (int m = 0; m < tiles_[c].rows; ++m) {
            int32_t sums[16];
            memcpy(sums, tiles_[c].data[m], sizeof sums);
            for (int k = 0; k < tiles_[a].row_bytes / 4; ++k) {
                for (int n = 0; n < 16; ++n) {
                    for (int i = 0; i < 4; ++i) {
                        sums[n] += (int8_t)tiles_[a].data[m][4 * k + i] * (int32_t)tiles_[b].data[k][4 * n + i];
                    }
                }
            }
            memcpy(tiles_[c].data[m], sums, tiles_[c].row_bytes);
        }
    }

    // TDPBF16PS: even and odd numbers are summed for themselves, then both are added, and what comes of it to C. Subnormal
    // numbers are taken for 0, and so are subnormal results.
    void multiply_bfloats(int c, int a, int b) {
        check(c, a, b);
        for (int m = 0; m < tiles_[c].rows; ++m) {
            float even[16] = {}, odd[16] = {}, sums[16];
            for (int k = 0; k < tiles_[a].row_bytes / 4; ++k) {
                const uint8_t* left = tiles_[a].data[m] + 4 * k;
                const uint8_t* right = tiles_[b].data[k];
                const float left_even = bfloat(left), left_odd = bfloat(left + 2);
                for (int n = 0; n < 16; ++n) {
                    even[n] = flushed(__builtin_fmaf(left_even, bfloat(right + 4 * n), even[n]));
                    odd[n] = flushed(__builtin_fmaf(left_odd, bfloat(right + 4 * n + 2), odd[n]));
                }
            }
            memcpy(sums, tiles_[c].data[m], sizeof sums);
            for (int n = 0; n < 16; ++n) sums[n] = flushed(flushed(sums[n]) + flushed(even[n] + odd[n]));
            memcpy(tiles_[c].data[m], sums, tiles_[c].row_bytes);
        }
    }

private:
    struct Tile {
        int row_bytes, rows;
        alignas(64) uint8_t data[16][64];
    };

    static void require(bool condition) {
        if (!condition) __builtin_trap();
    }

    void check(int c, int a, int b) const {
        require(configured_ && c != a && c != b && a != b);
        require(tiles_[a].rows == tiles_[c].rows && tiles_[b].row_bytes == tiles_[c].row_bytes);
        require(tiles_[a].row_bytes == 4 * tiles_[b].rows);
    }

    static float flushed(float x) {
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        if (!(bits & 0x7f800000u)) bits &= 0x80000000u;
        memcpy(&x, &bits, sizeof x);
        return x;
    }

    static float bfloat(const uint8_t* from) {
        uint16_t half;
        memcpy(&half, from, sizeof half);
        const uint32_t bits = (uint32_t)half << 16;
        float x;
        memcpy(&x, &bits, sizeof x);
        return flushed(x);
    }

    Tile tiles_[8];
    bool configured_;
};

// Of this thread, as the registers are.
inline thread_local EmulatedTiles emulated_tiles;

}  // namespace
}  // namespace xquant
