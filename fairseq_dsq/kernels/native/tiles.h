// Boxes along another dimension, worked on in tiles of neighbouring columns: each lane is in a box of its own.
#pragma once

#include "bits.h"
#include "encode.h"

namespace {

// A few rows at a time: memory is read ahead row by row, and rows 2^n apart share few sets of the first-level cache.
// work(row, rows), with rows() known when compiling.
constexpr int ROWS_AT_ONCE = 4;
template <class Work>
INLINE void for_rows(int64_t rows, Work work) {
    int64_t row = 0;
    for (; row + ROWS_AT_ONCE <= rows; row += ROWS_AT_ONCE) work(row, Count<ROWS_AT_ONCE>());
    for (; row < rows; row++) work(row, Count<1>());
}

// Of columns.
INLINE void largest_of_columns(const float* x, int64_t rows, int64_t stride, int64_t columns, Exponents& largest) {
    memset(largest, 0, (columns + LANES - 1) / LANES * LANES * sizeof *largest);
    for_rows(rows, [&](int64_t row, auto rows_here) __attribute__((always_inline)) {
        for_vectors(columns, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
            U found = load<U>(largest + column);
            for (int i = 0; i < rows_here(); i++) found = max(found, magnitude(x + (row + i) * stride + column, count));
            store(largest + column, found);
        });
    });
}

// A tile: one box of each of up to BOXES neighbouring columns.
struct Tile {
    int64_t rows, columns;
    int64_t stride;  // from row to row
    uint32_t index;  // the first value's place in the tensor
};

template <bool STOCHASTIC, class Out, class Format>
void quantize_tile(const float* x, Out* out, Tile tile, Format format, uint64_t seed) {
    Exponents exponents;
    Scales down, up;
    largest_of_columns(x, tile.rows, tile.stride, tile.columns, exponents);
    exponents_of(exponents, tile.columns, format);
    fill(down, exponents, tile.columns, format.fraction_bits(), encode_scale);
    fill(up, exponents, tile.columns, format.fraction_bits(), decode_scale);
    for_rows(tile.rows, [&](int64_t row, auto rows) __attribute__((always_inline)) {
        for_vectors(tile.columns, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
            Scale down_here = down.of_columns(column), up_here = up.of_columns(column);
            for (int i = 0; i < rows(); i++) {
                int64_t at = (row + i) * tile.stride + column;
                __builtin_prefetch(x + tile.rows * tile.stride + at, 0, 2);  // the next box of the column, to L2
                F code = encode<STOCHASTIC>(load<F>(x + at, count), down_here, format, tile.index + at, seed);
                put(out + at, times(code, up_here), count);
            }
        });
    });
}

// Boxes of 16 or 32 codes whose bits are whole words of 32 bits: a column's lie together, so that the words of all
// columns are interleaved, with room for a power of two of them.
constexpr int room_for(int words) { return words <= 1 ? 1 : 2 * room_for((words + 1) / 2); }

template <int WORDS>
INLINE void store_words(uint8_t* out, U (&words)[room_for(WORDS)], int64_t columns) {
    constexpr int ROOM = room_for(WORDS);
    interleave<ROOM>(words);
    if (ROOM == WORDS) {
        memcpy(out, words, columns * WORDS * 4);
        return;
    }
    for (int64_t column = 0; column < columns; column++)
        memcpy(out + column * WORDS * 4, (const uint8_t*)words + column * ROOM * 4, WORDS * 4);
}
template <int WORDS>
INLINE void load_words(const uint8_t* from, U (&words)[room_for(WORDS)], int64_t columns) {
    constexpr int ROOM = room_for(WORDS);
    if (ROOM == WORDS)
        memcpy(words, from, columns * WORDS * 4);
    else
        for (int64_t column = 0; column < columns; column++)
            memcpy((uint8_t*)words + column * ROOM * 4, from + column * WORDS * 4, WORDS * 4);
    separate<ROOM>(words);
}

template <int WIDTH, int N, bool STOCHASTIC, class Format>
void pack_words(const float* x, uint8_t* out, Tile tile, const Scales& down, Format format, uint64_t seed) {
    constexpr int WORDS = WIDTH * N / 32;
    for_vectors(tile.columns, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
        U words[room_for(WORDS)]{};
        Scale scale = down.of_columns(column);
#pragma GCC unroll 32
        for (int row = 0; row < N; row++) {
            int64_t at = row * tile.stride + column;
            U field = encode_field<STOCHASTIC>(load<F>(x + at, count), scale, format, tile.index + at, seed);
            int word = row * WIDTH / 32, bit = row * WIDTH % 32;
            words[word] |= field << bit;
            if (bit + WIDTH > 32) words[word + 1] |= field >> (32 - bit);
        }
        store_words<WORDS>(out + column * WORDS * 4, words, count == LANES ? LANES : count);
    });
}
template <int WIDTH, int N, class Out, class Format>
void unpack_words(const uint8_t* from, Out* out, Tile tile, const Scales& up, Format format) {
    constexpr int WORDS = WIDTH * N / 32;
    for_vectors(tile.columns, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
        U words[room_for(WORDS)]{};
        load_words<WORDS>(from + column * WORDS * 4, words, count == LANES ? LANES : count);
        Scale scale = up.of_columns(column);
#pragma GCC unroll 32
        for (int row = 0; row < N; row++) {
            int word = row * WIDTH / 32, bit = row * WIDTH % 32;
            U field = words[word] >> bit;
            if (bit + WIDTH > 32) field |= words[word + 1] << (32 - bit);
            put(out + row * tile.stride + column, times(from_field(field & (~0u >> (32 - WIDTH)), format), scale), count);
        }
    });
}

// Any width and box size: codes go through memory, where those of a column lie together.
constexpr int ROWS = 64;  // a multiple of 8: whole bytes at every width

template <bool STOCHASTIC, class Format>
void pack_codes(const float* x, uint8_t* out, Tile tile, const Scales& down, Format format, uint64_t seed) {
    uint32_t codes[LANES][ROWS];
    int64_t box_bytes = bytes_of(tile.rows, format.bits);
    for_vectors(tile.columns, [&](int64_t column, int64_t count) {
        Scale scale = down.of_columns(column);
        for (int64_t start = 0; start < tile.rows; start += ROWS) {
            int64_t rows = smaller(ROWS, tile.rows - start);
            for (int64_t row = 0; row < rows; row++) {
                int64_t at = (start + row) * tile.stride + column;
                U field = encode_field<STOCHASTIC>(load<F>(x + at, count), scale, format, tile.index + at, seed);
                for (int lane = 0; lane < LANES; lane++) codes[lane][row] = field[lane];
            }
            for (int64_t lane = 0; lane < count; lane++)
                write_bits(codes[lane], rows, format.bits, out + (column + lane) * box_bytes + start / 8 * format.bits);
        }
    });
}
template <class Out, class Format>
void unpack_codes(const uint8_t* from, Out* out, Tile tile, const Scales& up, Format format) {
    uint32_t codes[LANES][ROWS]{};
    int64_t box_bytes = bytes_of(tile.rows, format.bits);
    for_vectors(tile.columns, [&](int64_t column, int64_t count) {
        Scale scale = up.of_columns(column);
        for (int64_t start = 0; start < tile.rows; start += ROWS) {
            int64_t rows = smaller(ROWS, tile.rows - start);
            for (int64_t lane = 0; lane < count; lane++)
                read_bits(from + (column + lane) * box_bytes + start / 8 * format.bits, rows, format.bits, codes[lane]);
            for (int64_t row = 0; row < rows; row++) {
                U field;
                for (int lane = 0; lane < LANES; lane++) field[lane] = codes[lane][row];
                put(out + (start + row) * tile.stride + column, times(from_field(field, format), scale), count);
            }
        }
    });
}

// work(width, rows), known when compiling, for what pack_words takes; whether it does.
template <class Work>
INLINE bool with_words(int64_t rows, int width, Work work) {
    if (rows == 16 && width == 2) return work(Count<2>(), Count<16>()), true;
    if (rows == 16 && width == 4) return work(Count<4>(), Count<16>()), true;
    if (rows == 16 && width == 6) return work(Count<6>(), Count<16>()), true;
    if (rows == 16 && width == 8) return work(Count<8>(), Count<16>()), true;
    if (rows == 16 && width == 16) return work(Count<16>(), Count<16>()), true;
    if (rows == 32 && width == 4) return work(Count<4>(), Count<32>()), true;
    if (rows == 32 && width == 6) return work(Count<6>(), Count<32>()), true;
    if (rows == 32 && width == 8) return work(Count<8>(), Count<32>()), true;
    return false;
}

template <bool STOCHASTIC, class Format>
void pack_tile(const float* x, uint8_t* exponent_bytes, uint8_t* out, Tile tile, Format format, uint64_t seed) {
    Exponents exponents;
    Scales down;
    largest_of_columns(x, tile.rows, tile.stride, tile.columns, exponents);
    exponents_of(exponents, tile.columns, format);
    fill(down, exponents, tile.columns, format.fraction_bits(), encode_scale);
    for (int64_t column = 0; column < tile.columns; column++) exponent_bytes[column] = (uint8_t)exponents[column];
    auto packed = with_words(tile.rows, format.bits, [&](auto width, auto rows) {
        pack_words<width(), rows(), STOCHASTIC>(x, out, tile, down, format, seed);
    });
    if (!packed) pack_codes<STOCHASTIC>(x, out, tile, down, format, seed);
}
template <class Out, class Format>
void unpack_tile(const uint8_t* exponent_bytes, const uint8_t* from, Out* out, Tile tile, Format format) {
    Exponents exponents;
    Scales up;
    read_exponents(exponent_bytes, tile.columns, exponents);
    fill(up, exponents, tile.columns, format.fraction_bits(), decode_scale);
    auto unpacked = with_words(tile.rows, format.bits, [&](auto width, auto rows) {
        unpack_words<width(), rows()>(from, out, tile, up, format);
    });
    if (!unpacked) unpack_codes(from, out, tile, up, format);
}

}  // namespace
