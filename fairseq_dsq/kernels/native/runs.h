// Boxes along the last dimension, worked on in runs of neighbours: the lanes of a vector hold a stretch of one box.
#pragma once

#include "bits.h"
#include "encode.h"

namespace {

INLINE uint32_t largest_of(const float* x, int64_t count) {
    U found{};
    for (int64_t i = 0; i < count; i += LANES) found = max(found, magnitude(x + i, count - i));
    return largest_lane(found);
}

// Of LANES boxes of N, a multiple of 16, that follow on one another.
template <int N>
INLINE U largest_of_full(const float* x) {
    U found[LANES];
#pragma GCC unroll 16
    for (int box = 0; box < LANES; box++) {
        found[box] = magnitude(x + N * box);
#pragma GCC unroll 8
        for (int i = LANES; i < N; i += LANES) found[box] = max(found[box], magnitude(x + N * box + i));
    }
    return largest_of_each(found);
}

// Of boxes of n values that follow on one another.
INLINE void largest_of_boxes(const float* x, int64_t boxes, int64_t n, Exponents& largest) {
    int64_t box = 0;
    if (n == 16)
        for (; box + LANES <= boxes; box += LANES) store(largest + box, largest_of_full<16>(x + 16 * box));
    if (n == 32)
        for (; box + LANES <= boxes; box += LANES) store(largest + box, largest_of_full<32>(x + 32 * box));
    for (; box < boxes; box++) largest[box] = largest_of(x + box * n, n);
    clear_rest(largest, boxes);
}

// A stretch of one box. `index` is the first value's place in the tensor.
template <bool STOCHASTIC, class Out, class Format>
INLINE void quantize_stretch(const float* x, Out* out, int64_t count, uint32_t index, Scale down, Scale up,
                             Format format, uint64_t seed) {
    for (int64_t i = 0; i < count; i += LANES) {
        F code = encode<STOCHASTIC>(load<F>(x + i, count - i), down, format, index + i, seed);
        put(out + i, times(code, up), count - i);
    }
}

template <bool STOCHASTIC, class T, class Format>
INLINE void encode_stretch(const float* x, T* codes, int64_t count, uint32_t index, Scale down, Format format,
                           uint64_t seed) {
    for (int64_t i = 0; i < count; i += LANES) {
        U field = encode_field<STOCHASTIC>(load<F>(x + i, count - i), down, format, index + i, seed);
        store_integers(codes + i, field, count - i);
    }
}

template <class T, class Out, class Format>
INLINE void decode_stretch(const T* codes, Out* out, int64_t count, Scale up, Format format) {
    for (int64_t i = 0; i < count; i += LANES)
        put(out + i, times(from_field(load_integers(codes + i, count - i), format), up), count - i);
}

// A stretch of any length that begins on a whole byte of the packed codes.
template <bool STOCHASTIC, class T, class Format>
void pack_stretch(const float* x, uint8_t* out, int64_t count, uint32_t index, Scale down, Format format,
                  uint64_t seed) {
    T codes[CHUNK];
    for (int64_t start = 0; start < count; start += CHUNK) {
        int64_t part = smaller(CHUNK, count - start);
        encode_stretch<STOCHASTIC>(x + start, codes, part, index + start, down, format, seed);
        write_bits(codes, part, format.bits, out + start / 8 * format.bits);
    }
}
template <class T, class Out, class Format>
void unpack_stretch(const uint8_t* from, Out* out, int64_t count, Scale up, Format format) {
    T codes[CHUNK];
    for (int64_t start = 0; start < count; start += CHUNK) {
        int64_t part = smaller(CHUNK, count - start);
        read_bits(from + start / 8 * format.bits, part, format.bits, codes);
        decode_stretch(codes, out + start, part, up, format);
    }
}

// LANES boxes of N that follow on one another: scales stay in the first-level cache.
template <int N, bool STOCHASTIC, class Out, class Format>
INLINE void quantize_full(const float* x, Out* out, uint32_t index, Format format, uint64_t seed) {
    U largest = largest_of_full<N>(x), exponent = exponent_of(largest, format);
    alignas(64) float scales[4][LANES];
    if (!STOCHASTIC && has_grid(format) && !any(off_grid(largest, exponent))) {
        Grid grid = grid_of(exponent, format);
        store(scales[0], grid.limit);
        store(scales[1], bits<F>(grid.above));
#pragma GCC unroll 2
        for (int box = 0; box < LANES; box++) {
            Grid its{all(scales[0][box]), bits<U>(all(scales[1][box]))};
            for (int i = N * box; i < N * (box + 1); i += LANES)
                put(out + i, Unrounded(load<F>(x + i), its, format).rounded(), LANES);
        }
        return;
    }
    Scale down = scale_down(exponent, format), up = scale_up(exponent, format);
    store(scales[0], down.first);
    store(scales[1], down.second);
    store(scales[2], up.first);
    store(scales[3], up.second);
#pragma GCC unroll 2
    for (int box = 0; box < LANES; box++)
        quantize_stretch<STOCHASTIC>(x + N * box, out + N * box, N, index + N * box,
                                     {all(scales[0][box]), all(scales[1][box])},
                                     {all(scales[2][box]), all(scales[3][box])}, format, seed);
}

// A run: boxes of n values that follow on one another, up to CHUNK values or one box.
template <bool STOCHASTIC, class Out, class Format>
void quantize_run(const float* x, Out* out, int64_t boxes, int64_t n, uint32_t index, Format format, uint64_t seed) {
    int64_t whole = n * LANES;
    for (; n == 16 && boxes >= LANES; boxes -= LANES, x += whole, out += whole, index += whole)
        quantize_full<16, STOCHASTIC>(x, out, index, format, seed);
    for (; n == 32 && boxes >= LANES; boxes -= LANES, x += whole, out += whole, index += whole)
        quantize_full<32, STOCHASTIC>(x, out, index, format, seed);
    Exponents exponents;
    Scales down, up;
    largest_of_boxes(x, boxes, n, exponents);
    exponents_of(exponents, boxes, format);
    fill_down(down, exponents, boxes, format);
    fill_up(up, exponents, boxes, format);
    with_box_size(n, [&](auto values) __attribute__((always_inline)) {
        for (int64_t box = 0; box < boxes; box++) {
            int64_t at = box * values();
            quantize_stretch<STOCHASTIC>(x + at, out + at, values(), index + at, down.of_box(box), up.of_box(box),
                                         format, seed);
        }
    });
}

template <bool STOCHASTIC, class T, class Format>
void pack_run(const float* x, uint8_t* exponent_bytes, uint8_t* out, int64_t boxes, int64_t n, uint32_t index,
              Format format, uint64_t seed) {
    Exponents exponents;
    Scales down;
    largest_of_boxes(x, boxes, n, exponents);
    exponents_of(exponents, boxes, format);
    fill_down(down, exponents, boxes, format);
    for (int64_t box = 0; box < boxes; box++) exponent_bytes[box] = (uint8_t)exponents[box];
    if (n % 8 == 0 && n <= CHUNK) {  // boxes that end on whole bytes follow on one another without a gap
        T codes[CHUNK];
        with_box_size(n, [&](auto values) __attribute__((always_inline)) {
            for (int64_t box = 0; box < boxes; box++) {
                int64_t at = box * values();
                encode_stretch<STOCHASTIC>(x + at, codes + at, values(), index + at, down.of_box(box), format, seed);
            }
        });
        return write_bits(codes, n * boxes, format.bits, out);
    }
    for (int64_t box = 0; box < boxes; box++)
        pack_stretch<STOCHASTIC, T>(x + box * n, out + box * bytes_of(n, format.bits), n, index + box * n,
                                    down.of_box(box), format, seed);
}

template <class T, class Out, class Format>
void unpack_run(const uint8_t* exponent_bytes, const uint8_t* from, Out* out, int64_t boxes, int64_t n, Format format) {
    Exponents exponents;
    Scales up;
    read_exponents(exponent_bytes, boxes, exponents);
    fill_up(up, exponents, boxes, format);
    if (n % 8 == 0 && n <= CHUNK) {
        T codes[CHUNK];
        read_bits(from, n * boxes, format.bits, codes);
        return with_box_size(n, [&](auto values) __attribute__((always_inline)) {
            for (int64_t box = 0; box < boxes; box++)
                decode_stretch(codes + box * values(), out + box * values(), values(), up.of_box(box), format);
        });
    }
    for (int64_t box = 0; box < boxes; box++)
        unpack_stretch<T>(from + box * bytes_of(n, format.bits), out + box * n, n, up.of_box(box), format);
}

}  // namespace
