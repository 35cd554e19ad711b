// Codes to FP32 latents, 16 tokens (a run) at a time, in the two arrangements that the matrix products want.
//
// Loads may run up to 15 bytes past a row of codes: they stay inside the page, where scales follow the codes, and what
// they read is never used.
#pragma once

// --- Channel-major: [channels][tokens], for keys -------------------------------------------------------------------

typedef uint8_t bytes16 __attribute__((vector_size(16)));

// A multiply-free 16 x 16 transpose: four perfect shuffles, each interleaving rows i and i + 8.
inline void transpose_bytes(bytes16 (&rows)[16]) {
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
}

// `count` bytes of 16 rows become `count` rows of 16 bytes; `to` has room for `count` rounded up to 16.
inline void transpose_codes(const uint8_t* from, int64_t row_bytes, int64_t count, uint8_t* to) {
    for (int64_t start = 0; start < count; start += 16) {
        bytes16 rows[16];
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i) memcpy(&rows[i], from + i * row_bytes + start, 16);
        transpose_bytes(rows);
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i) memcpy(to + (start + i) * 16, &rows[i], 16);
    }
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

// One group: transposed bytes [group_bytes][16] to latents [group_size][stride], a run of 16 tokens wide.
template <int kBits, bool kAdd>
inline void unpack_group_channels(const uint8_t* bytes, int64_t group_size, const float* scales, const float* zeros,
                                  float* to, int64_t stride) {
    for (int64_t lane = 0; lane < kRun; lane += kLanes) {
        const vf scale = load(scales + lane), zero = load(zeros + lane);
        const uint8_t* at = bytes + lane;
        if constexpr (kBits == 3) {
            // Twice as many bytes of low planes as of high planes: field f of the high plane meets byte i of it with
            // byte i or i + size of the low plane.
            const int64_t size = group_size / 8;
            for (int64_t i = 0; i < size; ++i) {
                for (int64_t field = 0; field < 8; ++field) {
                    const vi low = field_codes<2>(at + ((field & 1) * size + i) * 16, field >> 1);
                    const vi high = field_codes<1>(at + (2 * size + i) * 16, field);
                    put<kAdd>(to + (field * size + i) * stride + lane, to_float(low | high << 2) * scale + zero);
                }
            }
        } else {
            const int64_t size = group_size * kBits / 8;
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

// The FP16 numbers of one group, likewise; `codes` is the first slot's.
template <bool kAdd>
inline void copy_group_channels(const uint8_t* codes, int64_t row_bytes, int64_t group_size, float* to,
                                int64_t stride) {
    for (int64_t channel = 0; channel < group_size; ++channel) {
        float numbers[kRun];
        for (int64_t token = 0; token < kRun; ++token) {
            uint16_t half;
            memcpy(&half, codes + token * row_bytes + channel * 2, 2);
            numbers[token] = half_to_float(half);
        }
        for (int64_t lane = 0; lane < kRun; lane += kLanes) put<kAdd>(to + channel * stride + lane, load(numbers + lane));
    }
}

// Groups [begin, end) of 16 slots to [channels][stride]; `bytes` is scratch for a group's codes of 16 tokens. Terms that
// add have no outlier channels.
template <bool kAdd>
inline void unpack_channels(const HeadView& view, const uint8_t* page, int64_t slot, int64_t begin, int64_t end,
                            float* to, int64_t stride, uint8_t* bytes) {
    const int64_t group_size = view.stream.group_size, group_bytes = view.group_bytes();
    for (int64_t group = begin; group < end; ++group, to += group_size * stride) {
        const uint8_t* codes = page + view.codes(slot) + group * group_bytes;
        if (view.stream.bits == 16) {
            copy_group_channels<kAdd>(codes, view.row_bytes(), group_size, to, stride);
            continue;
        }
        float scales[kRun], zeros[kRun];
        for (int64_t lane = 0; lane < kRun; lane += kLanes) {
            store(scales + lane, load_half(page + view.scale(group, slot) + lane * 2));
            store(zeros + lane, load_half(page + view.zero(group, slot) + lane * 2));
        }
        transpose_codes(codes, view.row_bytes(), group_bytes, bytes);
        switch (view.stream.bits) {
            case 8: unpack_group_channels<8, kAdd>(bytes, group_size, scales, zeros, to, stride); break;
            case 4: unpack_group_channels<4, kAdd>(bytes, group_size, scales, zeros, to, stride); break;
            case 3: unpack_group_channels<3, kAdd>(bytes, group_size, scales, zeros, to, stride); break;
            default: unpack_group_channels<2, kAdd>(bytes, group_size, scales, zeros, to, stride); break;
        }
        if (group == 0) {
            for (int64_t channel = 0; channel < view.stream.outlier_channels; ++channel) {
                for (int64_t lane = 0; lane < kRun; lane += kLanes) {
                    store(to + channel * stride + lane, load_half(page + view.outlier(channel, slot) + lane * 2));
                }
            }
        }
    }
}

// --- Token-major: [tokens][channels], for values -------------------------------------------------------------------

// One group of one token. Writes up to kLanes - 1 floats past the group: fields are written in ascending order, so the
// excess of one is overwritten by the next.
template <int kBits>
inline void unpack_group_row(const uint8_t* bytes, int64_t group_size, float scale, float zero, float* to) {
    const vf scales = broadcast(scale), zeros = broadcast(zero);
    if constexpr (kBits == 3) {
        const int64_t size = group_size / 8;
        for (int64_t field = 0; field < 8; ++field, to += size) {
            const uint8_t* low = bytes + (field & 1) * size;
            const uint8_t* high = bytes + 2 * size;
            for (int64_t i = 0; i < size; i += kLanes) {
                const vi codes = field_codes<2>(low + i, field >> 1) | field_codes<1>(high + i, field) << 2;
                store(to + i, to_float(codes) * scales + zeros);
            }
        }
    } else {
        const int64_t size = group_size * kBits / 8;
#pragma GCC unroll 4
        for (int64_t field = 0; field < 8 / kBits; ++field, to += size) {
            for (int64_t i = 0; i < size; i += kLanes) {
                store(to + i, to_float(field_codes<kBits>(bytes + i, field)) * scales + zeros);
            }
        }
    }
}

template <int kBits>
inline void unpack_group_rows(const uint8_t* codes, int64_t row_bytes, int64_t group_size, const float* scales,
                              const float* zeros, int64_t first, int64_t last, float* to, int64_t stride) {
    for (int64_t token = first; token < last; ++token) {
        unpack_group_row<kBits>(codes + token * row_bytes, group_size, scales[token], zeros[token],
                                to + token * stride);
    }
}

inline void copy_group_rows(const uint8_t* codes, int64_t row_bytes, int64_t group_size, int64_t first, int64_t last,
                            float* to, int64_t stride) {
    for (int64_t token = first; token < last; ++token) {
        load_row(XQUANT_FP16, codes + token * row_bytes, 0, group_size, to + token * stride);
    }
}

// Groups [begin, end) of tokens [first, last) of a run to [16][stride]; rows have room for kLanes more floats.
inline void unpack_rows(const HeadView& view, const uint8_t* page, int64_t slot, int64_t begin, int64_t end,
                        int64_t first, int64_t last, float* to, int64_t stride) {
    const int64_t group_size = view.stream.group_size, row_bytes = view.row_bytes();
    for (int64_t group = begin; group < end; ++group) {
        const uint8_t* codes = page + view.codes(slot) + group * view.group_bytes();
        float* at = to + (group - begin) * group_size;
        if (view.stream.bits == 16) {
            copy_group_rows(codes, row_bytes, group_size, first, last, at, stride);
            continue;
        }
        float scales[kRun], zeros[kRun];
        for (int64_t lane = 0; lane < kRun; lane += kLanes) {
            store(scales + lane, load_half(page + view.scale(group, slot) + lane * 2));
            store(zeros + lane, load_half(page + view.zero(group, slot) + lane * 2));
        }
        switch (view.stream.bits) {
            case 8: unpack_group_rows<8>(codes, row_bytes, group_size, scales, zeros, first, last, at, stride); break;
            case 4: unpack_group_rows<4>(codes, row_bytes, group_size, scales, zeros, first, last, at, stride); break;
            case 3: unpack_group_rows<3>(codes, row_bytes, group_size, scales, zeros, first, last, at, stride); break;
            default: unpack_group_rows<2>(codes, row_bytes, group_size, scales, zeros, first, last, at, stride); break;
        }
    }
    if (begin == 0) {
        for (int64_t channel = 0; channel < view.stream.outlier_channels; ++channel) {
            float outliers[kRun];
            for (int64_t lane = 0; lane < kRun; lane += kLanes) {
                store(outliers + lane, load_half(page + view.outlier(channel, slot) + lane * 2));
            }
            for (int64_t token = first; token < last; ++token) to[token * stride + channel] = outliers[token];
        }
    }
}
