// What AMX's instructions do, written down after Intel's manual (volume 2, TDPBSUD and TDPBF16PS): for tests on processors
// without it. Wrong use, which the processor answers with an exception, ends the process.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/simd.h"

namespace xquant {
namespace {

// A row of a tile is a vector of AVX-512.
#if defined(__AVX512F__)
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
        for (int k = 0; k < tiles_[b].rows; ++k) {
            for (int i = 0; i < 4; ++i) {
                const vi right = number<vi>(b, k) >> (8 * i) & 0xff;
                for (int m = 0; m < tiles_[c].rows; ++m) {
                    const int32_t left = (int8_t)tiles_[a].data[m][4 * k + i];
                    set(c, m, number<vi>(c, m) + left * right);
                }
            }
        }
    }

    // TDPBF16PS: even and odd numbers are summed for themselves, then both are added, and what comes of it to C. Subnormal
    // numbers are taken for 0, and so are subnormal results.
    void multiply_bfloats(int c, int a, int b) {
        check(c, a, b);
        for (int m = 0; m < tiles_[c].rows; ++m) {
            vf even = {}, odd = {};
            for (int k = 0; k < tiles_[b].rows; ++k) {
                uint32_t left;
                memcpy(&left, tiles_[a].data[m] + 4 * k, sizeof left);
                const vi right = number<vi>(b, k);
                even = multiply_add(lower(vi{} + (int32_t)left), lower(right), even);
                odd = multiply_add(upper(vi{} + (int32_t)left), upper(right), odd);
            }
            set(c, m, flushed(flushed(number<vf>(c, m)) + flushed(even + odd)));
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

    template <typename Vector>
    Vector number(int tile, int row) const {
        Vector x;
        memcpy(&x, tiles_[tile].data[row], sizeof x);
        return x;
    }

    // Bytes behind a row stay 0.
    template <typename Vector>
    void set(int tile, int row, Vector x) {
        memcpy(tiles_[tile].data[row], &x, tiles_[tile].row_bytes);
    }

    static vf flushed(vf x) { return (vf)(((vi)x & 0x7f800000) != 0 ? (vi)x : (vi)x & (vi{} + INT32_MIN)); }
    static vf lower(vi bfloats) { return flushed((vf)(bfloats << 16)); }
    static vf upper(vi bfloats) { return flushed((vf)(bfloats & (vi{} + (int32_t)0xffff0000))); }
    // Rounded once.
    static vf multiply_add(vf a, vf b, vf c) {
        return flushed((vf)_mm512_maskz_fmadd_ps(0xffff, (__m512)a, (__m512)b, (__m512)c));
    }

    Tile tiles_[8];
    bool configured_;
};

// Of this thread, as the registers are.
inline thread_local EmulatedTiles emulated_tiles;
#endif

}  // namespace
}  // namespace xquant
