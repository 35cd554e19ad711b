// Codes to FP32 latents, 16 tokens (a run) at a time, in the two arrangements that the matrix products want.
//
// Loads may run up to 15 bytes past a row of codes: they stay inside the page, where scales follow the codes, and what
// they read is never used.
#pragma once

// A number of bits as a type.
template <int kBits>
struct Bits {
    static constexpr int value = kBits;
};

// --- Channel-major: [channels][tokens], for keys -------------------------------------------------------------------

typedef uint8_t bytes16 __attribute__((vector_size(16)));

#if defined(__AVX512F__)
// 16 x 16 bytes in four vectors, rows 4i ... 4i + 3 in vector i. Columns come out 4m ... 4m + 3 in vector m, or, not
// kOrdered, m, 4 + m, 8 + m, 12 + m, which is cheaper.
template <bool kOrdered>
inline void transpose_block(vi (&rows)[4]) {
    const auto shuffle_lanes = [](vi x, __m128i order) {
        return (vi)_mm512_maskz_shuffle_epi8(~0ull, (__m512i)x, _mm512_maskz_broadcast_i32x4(0xffff, order));
    };
    // In a row: every fourth column together. In a lane: a 4 x 4 block of bytes transposed. Both are the same shuffle.
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const vi quads = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    for (int i = 0; i < 4; ++i) {
        if (kOrdered) rows[i] = shuffle_lanes(rows[i], order);
        rows[i] = shuffle_lanes(__builtin_shuffle(rows[i], quads), order);
    }
    const auto low = [](vi a, vi b) { return (vi)_mm512_maskz_unpacklo_epi32(0xffff, (__m512i)a, (__m512i)b); };
    const auto high = [](vi a, vi b) { return (vi)_mm512_maskz_unpackhi_epi32(0xffff, (__m512i)a, (__m512i)b); };
    const vi a = low(rows[0], rows[2]), b = high(rows[0], rows[2]), c = low(rows[1], rows[3]), d = high(rows[1], rows[3]);
    rows[0] = low(a, c);
    rows[1] = high(a, c);
    rows[2] = low(b, d);
    rows[3] = high(b, d);
}

// Four rows of 16 bytes, `stride` apart.
inline vi load_rows(const uint8_t* from, int64_t stride) {
    const auto row = [=](int i) { return _mm_loadu_si128((const __m128i*)(from + i * stride)); };
    __m512i rows = _mm512_maskz_broadcast_i32x4(0xffff, row(0));
    rows = _mm512_mask_broadcast_i32x4(rows, 0x00f0, row(1));
    rows = _mm512_mask_broadcast_i32x4(rows, 0x0f00, row(2));
    return (vi)_mm512_mask_broadcast_i32x4(rows, 0xf000, row(3));
}

// 16 bytes of 16 rows become 16 rows of 16 bytes.
inline void transpose_bytes(const uint8_t* from, int64_t stride, uint8_t* to) {
    vi rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = load_rows(from + 4 * i * stride, stride);
    transpose_block<true>(rows);
    memcpy(to, rows, sizeof rows);
}
#else
// A multiply-free 16 x 16 transpose: four perfect shuffles, each interleaving rows i and i + 8.
inline void transpose_bytes(const uint8_t* from, int64_t stride, uint8_t* to) {
    bytes16 rows[16];
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) memcpy(&rows[i], from + i * stride, 16);
    for (int step = 0; step < 4; ++step) {
        bytes16 next[16];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const bytes16 low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
            const bytes16 high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
            next[2 * i] = __builtin_shuffle(rows[i], rows[i + 8], low);
            next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + 8], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) rows[i] = next[i];
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) memcpy(to + i * 16, &rows[i], 16);
}
#endif

// `count` bytes of 16 rows become `count` rows of 16 bytes; `to` has room for `count` rounded up to 16.
inline void transpose_codes(const uint8_t* from, int64_t row_bytes, int64_t count, uint8_t* to) {
    for (int64_t start = 0; start < count; start += 16) transpose_bytes(from + start, row_bytes, to + start * 16);
}

// Rows of kRun bytes: where transpose_back puts row i.
inline int64_t back_row(int64_t i) {
#if defined(__AVX512F__)
    return i % 4 * 64 + i / 4 * 16;
#else
    return i * 16;
#endif
}

// 16 contiguous rows of 16 bytes become 16 others.
inline void transpose_back(const uint8_t* from, uint8_t* to) {
#if defined(__AVX512F__)
    vi rows[4];
    memcpy(rows, from, sizeof rows);
    transpose_block<false>(rows);
    memcpy(to, rows, sizeof rows);
#else
    transpose_bytes(from, 16, to);
#endif
}

// The codes of field `field` of a transposed byte row, kLanes tokens of it.
template <int kBits>
inline vi field_codes(const uint8_t* row, int64_t field) {
    return load_bytes(row) >> (int32_t)(field * kBits) & ((1 << kBits) - 1);
}

// Write a vector, or add it to what is there.
template <bool kAdd>
inline void put(float* to, vf x) {
    if constexpr (kAdd) x = load(to) + x;
    store(to, x);
}

// 3 and 6 bits are two planes: a high one, and a low one of twice as many bits and bytes. So field f of the high plane
// meets byte i of it with byte i, or i + size, of the low plane.
template <int kBits>
constexpr int kHighBits = kBits / 3;
template <int kBits>
constexpr bool kTwoPlanes = kBits % 3 == 0;

// One piece: transposed bytes [bytes][16] to latents [channels][stride], a run of 16 tokens wide.
template <int kBits, bool kAdd>
inline void unpack_piece_channels(const uint8_t* bytes, int64_t channels, const float* scales, const float* zeros,
                                  float* to, int64_t stride) {
    for (int64_t lane = 0; lane < kRun; lane += kLanes) {
        const vf scale = load(scales + lane), zero = load(zeros + lane);
        const uint8_t* at = bytes + lane;
        if constexpr (kTwoPlanes<kBits>) {
            constexpr int kHigh = kHighBits<kBits>;
            const int64_t size = channels * kHigh / 8;
            for (int64_t i = 0; i < size; ++i) {
                for (int64_t field = 0; field < 8 / kHigh; ++field) {
                    const vi low = field_codes<2 * kHigh>(at + ((field & 1) * size + i) * 16, field >> 1);
                    const vi high = field_codes<kHigh>(at + (2 * size + i) * 16, field);
                    const vi codes = low | high << (2 * kHigh);
                    put<kAdd>(to + (field * size + i) * stride + lane, to_float(codes) * scale + zero);
                }
            }
        } else {
            const int64_t size = channels * kBits / 8;
            for (int64_t i = 0; i < size; ++i) {
#pragma GCC unroll 4
                for (int64_t field = 0; field < 8 / kBits; ++field) {
                    const vi codes = field_codes<kBits>(at + i * 16, field);
                    put<kAdd>(to + (field * size + i) * stride + lane, to_float(codes) * scale + zero);
                }
            }
        }
    }
}

// The FP16 numbers of one piece, likewise; `codes` is the first slot's.
template <bool kAdd>
inline void copy_piece_channels(const uint8_t* codes, int64_t row_bytes, int64_t channels, float* to, int64_t stride) {
    for (int64_t channel = 0; channel < channels; ++channel) {
        float numbers[kRun];
        for (int64_t token = 0; token < kRun; ++token) {
            uint16_t half;
            memcpy(&half, codes + token * row_bytes + channel * 2, 2);
            numbers[token] = half_to_float(half);
        }
        for (int64_t lane = 0; lane < kRun; lane += kLanes) put<kAdd>(to + channel * stride + lane, load(numbers + lane));
    }
}

// 2 ** (i / 8)
constexpr float kEighths[8] = {1.0f,        1.09050775f, 1.18920708f, 1.29683959f,
                               1.41421354f, 1.54221082f, 1.68179286f, 1.8340081f};

// The 8-bit scale of an allocated stream's token: 2 ** ((code - 128) / 8), rounded once.
inline float token_scale(uint8_t code) {
    return bits_float(float_bits(kEighths[code % 8]) + ((uint32_t)(code / 8) << 23) - (16u << 23));
}

// Numbers are code * scale + zero, in both kinds of streams: scales and zeros of a piece, for 16 slots.
struct PieceScales {
    float scales[kRun], zeros[kRun];
    float tokens[kRun];  // of an allocated stream

    PieceScales(const HeadView& view, const uint8_t* page, int64_t slot) {
        if (!view.stream.allocated) return;
        for (int64_t i = 0; i < kRun; ++i) tokens[i] = token_scale(page[view.token_scale(slot) + i]);
    }

    void set(const HeadView& view, const uint8_t* page, int64_t slot, int64_t piece) {
        if (view.stream.allocated) {
            const int64_t channel = view.head.pieces[piece].channel;
            const float step = view.head.step[channel], middle = view.head.middle[channel];
            for (int64_t lane = 0; lane < kRun; lane += kLanes) {
                const vf scale = load(tokens + lane) * step;
                store(scales + lane, scale);
                store(zeros + lane, scale * -middle);
            }
            return;
        }
        for (int64_t lane = 0; lane < kRun; lane += kLanes) {
            store(scales + lane, load_half(page + view.scale(piece, slot) + lane * 2));
            store(zeros + lane, load_half(page + view.zero(piece, slot) + lane * 2));
        }
    }
};

// Call unpack with the bits, which are none of FP16 numbers, as a constant.
template <typename Unpack>
inline void with_bits(int64_t bits, const Unpack& unpack) {
    switch (bits) {
        case 8: unpack(Bits<8>{}); break;
        case 6: unpack(Bits<6>{}); break;
        case 4: unpack(Bits<4>{}); break;
        case 3: unpack(Bits<3>{}); break;
        default: unpack(Bits<2>{}); break;
    }
}

// A chunk of 16 slots to [channels][stride]; `bytes` is scratch for the codes. Terms that add have no outlier channels.
template <bool kAdd>
inline void unpack_channels(const HeadView& view, const uint8_t* page, int64_t slot, int64_t index, float* to,
                            int64_t stride, uint8_t* bytes) {
    const xquant_chunk& chunk = view.head.chunks[index];
    const int64_t first_byte = view.head.pieces[chunk.begin].byte;
    const uint8_t* codes = page + view.codes(slot);
    if (view.head.pieces[chunk.begin].bits != 16) {
        transpose_codes(codes + first_byte, view.head.row_bytes, chunk_bytes(view.head, chunk), bytes);
    }
    PieceScales scales(view, page, slot);
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
        const xquant_piece& piece = view.head.pieces[i];
        float* at = to + (piece.channel - chunk.channel) * stride;
        if (piece.bits == 16) {
            copy_piece_channels<kAdd>(codes + piece.byte, view.head.row_bytes, piece.channels, at, stride);
            continue;
        }
        scales.set(view, page, slot, i);
        with_bits(piece.bits, [&](auto bits) {
            unpack_piece_channels<bits.value, kAdd>(bytes + (piece.byte - first_byte) * 16, piece.channels,
                                                    scales.scales, scales.zeros, at, stride);
        });
    }
    if (index > 0) return;
    for (int64_t channel = 0; channel < view.stream.outlier_channels; ++channel) {
        for (int64_t lane = 0; lane < kRun; lane += kLanes) {
            store(to + channel * stride + lane, load_half(page + view.outlier(channel, slot) + lane * 2));
        }
    }
}

// --- Token-major: [tokens][channels], for values -------------------------------------------------------------------

// One piece of one token. Writes up to kLanes - 1 floats past it: fields are written in ascending order, so the excess
// of one is overwritten by the next.
template <int kBits>
inline void unpack_piece_row(const uint8_t* bytes, int64_t channels, float scale, float zero, float* to) {
    const vf scales = broadcast(scale), zeros = broadcast(zero);
    if constexpr (kTwoPlanes<kBits>) {
        constexpr int kHigh = kHighBits<kBits>;
        const int64_t size = channels * kHigh / 8;
        for (int64_t field = 0; field < 8 / kHigh; ++field, to += size) {
            const uint8_t* low = bytes + (field & 1) * size;
            const uint8_t* high = bytes + 2 * size;
            for (int64_t i = 0; i < size; i += kLanes) {
                const vi low_codes = field_codes<2 * kHigh>(low + i, field >> 1);
                const vi codes = low_codes | field_codes<kHigh>(high + i, field) << (2 * kHigh);
                store(to + i, to_float(codes) * scales + zeros);
            }
        }
    } else {
        const int64_t size = channels * kBits / 8;
#pragma GCC unroll 4
        for (int64_t field = 0; field < 8 / kBits; ++field, to += size) {
            for (int64_t i = 0; i < size; i += kLanes) {
                store(to + i, to_float(field_codes<kBits>(bytes + i, field)) * scales + zeros);
            }
        }
    }
}

// A chunk of tokens [first, last) of a run to [16][stride]; rows have room for kLanes more floats.
inline void unpack_rows(const HeadView& view, const uint8_t* page, int64_t slot, int64_t index, int64_t first,
                        int64_t last, float* to, int64_t stride) {
    const xquant_chunk& chunk = view.head.chunks[index];
    const int64_t row_bytes = view.head.row_bytes;
    PieceScales scales(view, page, slot);
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
        const xquant_piece& piece = view.head.pieces[i];
        const uint8_t* codes = page + view.codes(slot) + piece.byte;
        float* at = to + (piece.channel - chunk.channel);
        if (piece.bits == 16) {
            for (int64_t token = first; token < last; ++token) {
                load_row(XQUANT_FP16, codes + token * row_bytes, 0, piece.channels, at + token * stride);
            }
            continue;
        }
        scales.set(view, page, slot, i);
        with_bits(piece.bits, [&](auto bits) {
            for (int64_t token = first; token < last; ++token) {
                unpack_piece_row<bits.value>(codes + token * row_bytes, piece.channels, scales.scales[token],
                                             scales.zeros[token], at + token * stride);
            }
        });
    }
    if (index > 0) return;
    for (int64_t channel = 0; channel < view.stream.outlier_channels; ++channel) {
        float outliers[kRun];
        for (int64_t lane = 0; lane < kRun; lane += kLanes) {
            store(outliers + lane, load_half(page + view.outlier(channel, slot) + lane * 2));
        }
        for (int64_t token = first; token < last; ++token) to[token * stride + channel] = outliers[token];
    }
}

// Runs of an allocated stream are short: their fields would leave most lanes of a vector idle. So codes become bytes in
// channel-major order, where a field of a piece is one stretch of memory, and are then transposed back.

// Bytes, two in a lane: there are no vectors of bytes that shift.
typedef uint16_t byte_pairs __attribute__((vector_size(kLanes * 4)));

// Field `field` of kBits bits, moved to bit kTo.
template <int kBits, int kTo>
inline byte_pairs field_bytes(const uint8_t* from, int field) {
    byte_pairs x;
    memcpy(&x, from, sizeof x);
    const int right = field * kBits - kTo;
    const byte_pairs moved = right > 0 ? x >> (uint16_t)right : x << (uint16_t)-right;
    return moved & (uint16_t)(0x101 * ((1 << kBits) - 1) << kTo);
}

// One piece: transposed bytes [bytes][16] to codes [channels][16]. Reads and writes up to a vector too much; fields are
// written in ascending order, so the excess of one is overwritten by the next.
template <int kBits>
inline void unpack_piece_codes(const uint8_t* bytes, int64_t channels, uint8_t* to) {
    if constexpr (kTwoPlanes<kBits>) {
        constexpr int kHigh = kHighBits<kBits>;
        const int64_t size = channels * kHigh / 8 * 16;
#pragma GCC unroll 8
        for (int field = 0; field < 8 / kHigh; ++field, to += size) {
            for (int64_t i = 0; i < size; i += sizeof(byte_pairs)) {
                const byte_pairs low = field_bytes<2 * kHigh, 0>(bytes + (field & 1) * size + i, field >> 1);
                const byte_pairs codes = low | field_bytes<kHigh, 2 * kHigh>(bytes + 2 * size + i, field);
                memcpy(to + i, &codes, sizeof codes);
            }
        }
    } else {
        const int64_t size = channels * kBits / 8 * 16;
#pragma GCC unroll 4
        for (int field = 0; field < 8 / kBits; ++field, to += size) {
            for (int64_t i = 0; i < size; i += sizeof(byte_pairs)) {
                const byte_pairs codes = field_bytes<kBits, 0>(bytes + i, field);
                memcpy(to + i, &codes, sizeof codes);
            }
        }
    }
}

struct RunScratch {
    uint8_t* bytes;  // [bytes of a chunk, rounded up to 16][16], and a vector more
    uint8_t* codes;  // [channels of a chunk, rounded up to 16][16], and a vector more
};

// A chunk of an allocated stream's head: codes [channels][16 tokens] in scratch.codes.
inline void unpack_codes(const HeadView& view, const uint8_t* page, int64_t slot, const xquant_chunk& chunk,
                         const RunScratch& scratch) {
    const int64_t first_byte = view.head.pieces[chunk.begin].byte;
    transpose_codes(page + view.codes(slot) + first_byte, view.head.row_bytes, chunk_bytes(view.head, chunk),
                    scratch.bytes);
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
        const xquant_piece& piece = view.head.pieces[i];
        with_bits(piece.bits, [&](auto bits) {
            unpack_piece_codes<bits.value>(scratch.bytes + (piece.byte - first_byte) * 16, piece.channels,
                                           scratch.codes + (piece.channel - chunk.channel) * 16);
        });
    }
}

// A chunk of an allocated stream's head, 16 slots, to [channels][stride].
inline void unpack_allocated_channels(const HeadView& view, const uint8_t* page, int64_t slot, int64_t index, float* to,
                                      int64_t stride, const RunScratch& scratch) {
    const xquant_chunk& chunk = view.head.chunks[index];
    const float* step = view.head.step + chunk.channel;
    const float* zero = view.head.zero + chunk.channel;
    unpack_codes(view, page, slot, chunk, scratch);
    const PieceScales scales(view, page, slot);
    for (int64_t lane = 0; lane < kRun; lane += kLanes) {
        const vf scale = load(scales.tokens + lane);
#pragma GCC unroll 4
        for (int64_t channel = 0; channel < chunk.channels; ++channel) {
            const vf code = to_float(load_bytes(scratch.codes + channel * 16 + lane));
            store(to + channel * stride + lane, (code * step[channel] + zero[channel]) * scale);
        }
    }
}

// A chunk of an allocated stream's head, 16 slots, to [16][stride]; rows are rounded up to 16 channels.
__attribute__((noinline)) inline void unpack_allocated_rows(const HeadView& view, const uint8_t* page, int64_t slot, int64_t index, float* to,
                                  int64_t stride, const RunScratch& scratch) {
    const xquant_chunk& chunk = view.head.chunks[index];
    unpack_codes(view, page, slot, chunk, scratch);
    const PieceScales scales(view, page, slot);
    for (int64_t start = 0; start < chunk.channels; start += 16) {
        uint8_t rows[kRun * 16];
        transpose_back(scratch.codes + start * 16, rows);
        for (int64_t lane = 0; lane < 16; lane += kLanes) {
            const vf step = load(view.head.step + chunk.channel + start + lane);
            const vf zero = load(view.head.zero + chunk.channel + start + lane);
#pragma GCC unroll 16
            for (int64_t token = 0; token < kRun; ++token) {
                const vf code = to_float(load_bytes(rows + back_row(token) + lane));
                store(to + token * stride + start + lane, (code * step + zero) * scales.tokens[token]);
            }
        }
    }
}
