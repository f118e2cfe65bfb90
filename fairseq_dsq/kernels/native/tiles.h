// Boxes along another dimension, worked on in tiles of neighbouring columns: each lane is in a box of its own.
#pragma once

#include "bits.h"
#include "encode.h"

namespace {

// A few rows at a time: memory is read ahead row by row, and rows 2^n apart share few sets of the first-level cache.
// work(row, rows), with rows() known when compiling.
constexpr int ROWS_AT_ONCE = 4;
template <int AT_ONCE = ROWS_AT_ONCE, class Work>
INLINE void for_rows(int64_t rows, Work work) {
    int64_t row = 0;
    for (; row + AT_ONCE <= rows; row += AT_ONCE) work(row, Count<AT_ONCE>());
    if (AT_ONCE > 1)
        for (; row < rows; row++) work(row, Count<1>());
}
template <int AT_ONCE, class Work>
INLINE void for_rows(Values rows, Work work) {
    for_rows<AT_ONCE>(rows(), work);
}
// N is a multiple of AT_ONCE. Each row has its own instructions: of one that always steps from column to column the
// processor foresees what it loads.
template <int AT_ONCE, int N, class Work>
INLINE void for_rows(Count<N>, Work work) {
#pragma GCC unroll 16
    for (int64_t row = 0; row < N; row += AT_ONCE) work(row, Count<AT_ONCE>());
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

// Vectors of neighbouring columns that are worked on together: a cache line of them.
constexpr int LINE = LANES == 16 ? 1 : 2;

// Of V vectors of columns.
template <int V>
INLINE void largest_of_columns(const float* x, const Tile& tile, int64_t count, U (&largest)[V]) {
    for (int k = 0; k < V; k++) {
        largest[k] = U{};
        for (int64_t row = 0; row < tile.rows; row++)
            largest[k] = max(largest[k], magnitude(x + row * tile.stride + k * LANES, count));
    }
}

// From here on the compiler computes a pointer from this value alone: it keeps no distances of many rows instead.
template <class T>
INLINE void in_register(T*& pointer) {
    asm("" : "+r"(pointer));
}

// Boxes of V vectors of columns, each value rounded by round(value, vector); meanwhile the largest values of as
// many columns `ahead` are found, which brings them to the cache.
template <int V, class Out, class Rows, class Round>
INLINE void round_columns(const float* x, Out* out, const Tile& tile, Rows tile_rows, int64_t ahead, int64_t count,
                          U (&largest)[V], Round round) {
    for (U& found : largest) found = U{};
    const float* next = x + ahead;
    for_rows<ROWS_AT_ONCE / V>(tile_rows, [&](int64_t, auto rows) __attribute__((always_inline)) {
        F values[rows()][V];
        for (int i = 0; i < rows(); i++)
            for (int k = 0; k < V; k++) {
                int64_t at = i * tile.stride + k * LANES;
                largest[k] = max(largest[k], magnitude(next + at, count));
                values[i][k] = round(load<F>(x + at, count), k);
            }
        // After all loads: rows 2^n apart look alike to what keeps loads and stores in order.
        for (int i = 0; i < rows(); i++)
            for (int k = 0; k < V; k++) put(out + i * tile.stride + k * LANES, values[i][k], count);
        x += rows() * tile.stride, next += rows() * tile.stride, out += rows() * tile.stride;
        in_register(x), in_register(next), in_register(out);
    });
}

// As many columns, whose largest values are known. Whole vectors of them are rounded on a grid, where they have one.
template <int V, class Out, class Format>
INLINE void quantize_columns(const float* x, Out* out, const Tile& tile, int64_t ahead, int64_t count, U (&largest)[V],
                             Format format) {
    U exponents[V];
    I off{};
    for (int k = 0; k < V; k++) {
        exponents[k] = exponent_of(largest[k], format);
        off |= off_grid(largest[k], exponents[k]);
    }
    if (count == LANES && !any(off)) {
        Grid grids[V];
        for (int k = 0; k < V; k++) grids[k] = grid_of(exponents[k], format);
        return with_box_size(tile.rows, [&](auto rows) __attribute__((always_inline)) {
            round_columns(x, out, tile, rows, ahead, LANES, largest, [&](F value, int k)
                          __attribute__((always_inline)) { return Unrounded(value, grids[k], format).rounded(); });
        });
    }
    Scale down[V], up[V];
    for (int k = 0; k < V; k++) {
        down[k] = scale_down(exponents[k], format);
        up[k] = scale_up(exponents[k], format);
    }
    round_columns(x, out, tile, Values{tile.rows}, ahead, count, largest, [&](F value, int k)
                  __attribute__((always_inline)) { return times(encode<false>(value, down[k], format, 0, 0), up[k]); });
}

// Whether to walk along rows from their ends. A load waits for stores that are still under way to addresses whose last
// 12 bits are as its own. Where rows lie a power of two apart and `out` begins a little behind a row of x, these are
// the stores to the columns before, in other rows: then it is the loads that have to go first.
INLINE bool backwards(const void* x, const void* out, int64_t stride) {
    uint64_t row = stride * sizeof(float), period = smaller(row & -row, 4096);
    return ((uint64_t)out - (uint64_t)x) % period < period / 2;
}

// A cache line of columns at a time, read once from memory: of up to MOST_ROWS rows the first-level cache holds two.
constexpr int MOST_ROWS = 16;
template <class Out, class Format>
void quantize_narrow_tile(const float* x, Out* out, const Tile& tile, Format format) {
    constexpr int64_t WIDE = LINE * LANES;
    int64_t blocks = tile.columns / WIDE, end = blocks * WIDE;
    if (blocks) {
        bool back = backwards(x, out, tile.stride);
        int64_t column = back ? end - WIDE : 0, step = back ? -WIDE : WIDE;
        U largest[LINE];
        largest_of_columns(x + column, tile, LANES, largest);
        for (; blocks; blocks--, column += step)
            quantize_columns(x + column, out + column, tile, blocks > 1 ? step : 0, LANES, largest, format);
    }
    for (int64_t column = end; column < tile.columns; column += LANES) {
        U largest[1];
        int64_t count = smaller(LANES, tile.columns - column);
        largest_of_columns(x + column, tile, count, largest);
        quantize_columns(x + column, out + column, tile, 0, count, largest, format);
    }
}

template <bool STOCHASTIC, class Out, class Format>
void quantize_wide_tile(const float* x, Out* out, Tile tile, Format format, uint64_t seed) {
    Exponents exponents;
    Scales down, up;
    largest_of_columns(x, tile.rows, tile.stride, tile.columns, exponents);
    exponents_of(exponents, tile.columns, format);
    fill_down(down, exponents, tile.columns, format);
    fill_up(up, exponents, tile.columns, format);
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

// Where rows lie pages apart, all are in one set of the first-level cache: too many to come back for half of a line.
template <bool STOCHASTIC, class Out, class Format>
void quantize_tile(const float* x, Out* out, Tile tile, Format format, uint64_t seed) {
    if (!STOCHASTIC && has_grid(format) && tile.rows <= MOST_ROWS && (LINE == 1 || tile.stride % 1024))
        return quantize_narrow_tile(x, out, tile, format);
    quantize_wide_tile<STOCHASTIC>(x, out, tile, format, seed);
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
    fill_down(down, exponents, tile.columns, format);
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
    fill_up(up, exponents, tile.columns, format);
    auto unpacked = with_words(tile.rows, format.bits, [&](auto width, auto rows) {
        unpack_words<width(), rows()>(from, out, tile, up, format);
    });
    if (!unpacked) unpack_codes(from, out, tile, up, format);
}

}  // namespace
