// Quantize, pack and unpack float32 tensors on the CPU: quant/reference.py and quant/packing.py, bit for bit.
//
// A contiguous tensor is seen as (before, length, after) with boxes of n values along `length`, or the whole tensor
// is one box. Values of a box share a biased exponent e (float32's own; 255 marks a box with Inf or NaN):
//
//   code  = clamp(round(x * 2^(bits - 2 + 127 - e)))       value = code * 2^(e - (bits - 2 + 127))
//
// Besides: dropout whose mask is a function of a seed, and masks of one bit per value (quant/masks.py).
//
// Packed bytes: a part of all full boxes, then a part of the short last ones; each part is one byte e per box in the
// order (before, boxes, after), then the boxes' codes in the same order, `bits` bits each, little-endian, a box
// starting on a whole byte.
//
// Boxes along the last dimension are worked on in runs of neighbours; the lanes of a vector hold a stretch of one box.
// Boxes along another dimension are worked on in tiles of neighbouring columns; each lane is in a box of its own.
// Tensors are read where they lie; nothing is transposed. First the largest magnitude of each box is found, then the
// scales of all boxes of the run or tile, then its values are rounded, all within the caches.
//
// This file is compiled once per instruction set: DSQ_NAME(f) is the exported name. No fused multiply-add and no fast
// math: each operation is rounded as PyTorch rounds it.

#include "lanes.h"
#include "names.h"

extern "C" {
// What fairseq_dsq.formats says of a format; native/__init__.py has the same fields.
struct DsqFormat {
    int32_t bits;
    int32_t signed_zero;
    int64_t box_size;        // 0: the whole tensor is one box
    int32_t fixed_exponent;  // biased; 0: it follows from the box
    float min_code, max_code;
    uint32_t headroom;  // added to the bits of the largest magnitude before its exponent is read
};
}

namespace {

using Format = DsqFormat;
constexpr int BIAS = 127;
constexpr uint32_t NAN_EXPONENT = 255;
constexpr uint32_t SIGN = 0x80000000u;
// Values of a run; a multiple of 8: whole bytes at every width.
constexpr int CHUNK = 1024;
// Boxes of a run, columns of a tile: a tile of 16 rows is as large as the first-level cache.
constexpr int BOXES = 512;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t bytes_of(int64_t values, int bits) { return (values * bits + 7) / 8; }

template <class Body>
void for_each(int64_t items, int threads, Body body) {
    if (threads <= 1 || items <= 1) {
        for (int64_t item = 0; item < items; item++) body(item);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t item = 0; item < items; item++) body(item);
}

// ---- Scales

// A power of two as the product of two, so that neither over- nor underflows.
struct Scale {
    F first, second;
};

// The scales of a run's or tile's boxes.
struct Scales {
    alignas(64) float first[BOXES], second[BOXES];

    INLINE Scale of_box(int64_t box) const { return {all(first[box]), all(second[box])}; }
    INLINE Scale of_columns(int64_t column) const { return {load<F>(first + column), load<F>(second + column)}; }
};

using Exponents = uint32_t[BOXES];

INLINE F power_of_two(I exponent) { return bits<F>((exponent + BIAS) << 23); }

// The biased exponent of boxes, given the magnitude bits of their largest values.
INLINE U exponent_of(U largest, Format format) {
    U exponent = largest >> 23, raised = (largest + format.headroom) >> 23;
    raised += (U)(raised == NAN_EXPONENT);  // a comparison is -1: float32's largest exponent stays
    if (format.fixed_exponent) raised = all((uint32_t)format.fixed_exponent);
    return choose((I)(exponent == NAN_EXPONENT), exponent, max(raised, all(1u)));
}

INLINE Scale encode_scale(U exponent, Format format) {
    I shift = (format.bits - 2 + BIAS) - (I)exponent, half = shift >> 1;
    return {power_of_two(half), power_of_two(shift - half)};
}

INLINE Scale decode_scale(U exponent, Format format) {
    I shift = (I)exponent - (format.bits - 2 + BIAS), half = shift >> 1;
    F nan = bits<F>(all(0x7fc00000u));
    // NaN times anything is NaN: the mark needs no pass of its own.
    return {choose((I)(exponent == NAN_EXPONENT), nan, power_of_two(half)), power_of_two(shift - half)};
}

// The arrays have room for whole vectors; lanes that no box has are computed with too, and hold 0.
INLINE void clear_rest(Exponents& exponents, int64_t boxes) {
    for (; boxes % LANES; boxes++) exponents[boxes] = 0;
}
INLINE void read_exponents(const uint8_t* from, int64_t boxes, Exponents& exponents) {
    for (int64_t box = 0; box < boxes; box++) exponents[box] = from[box];
    clear_rest(exponents, boxes);
}
INLINE void exponents_of(Exponents& largest, int64_t boxes, Format format) {
    for (int64_t i = 0; i < boxes; i += LANES) store(largest + i, exponent_of(load<U>(largest + i), format));
}
template <class ScaleOf>
INLINE void fill(Scales& scales, const Exponents& exponents, int64_t boxes, Format format, ScaleOf scale_of) {
    for (int64_t i = 0; i < boxes; i += LANES) {
        Scale scale = scale_of(load<U>(exponents + i), format);
        store(scales.first + i, scale.first);
        store(scales.second + i, scale.second);
    }
}

// ---- Rounding

// The noise of an element: uniform multiples of 2^-24 in [0, 1). reference.noise is the definition.
INLINE U mix(U h) {
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = (h ^ (h >> 15)) * 0x846ca68bu;
    return h ^ (h >> 16);
}
INLINE F noise(U index, uint64_t seed) {
    U h = mix(mix(index + (uint32_t)seed) ^ (uint32_t)(seed >> 32));
    return __builtin_convertvector((I)(h >> 8), F) * 0x1p-24f;
}

// Codes, as float. `index` is the first lane's place in the tensor.
template <bool STOCHASTIC>
INLINE F encode(F x, Scale scale, Format format, uint32_t index, uint64_t seed) {
    F code = x * scale.first * scale.second;
    if (STOCHASTIC) {
        F below = floor(code);
        I up = noise(lane_numbers() + index, seed) < code - below;
        code = below + bits<F>(bits<U>(up) & bits<U>(all(1.0f)));
        U sign = all(format.signed_zero ? SIGN : 0);  // lost where a negative number rounds to zero
        code = bits<F>((bits<U>(code) & ~sign) | (bits<U>(x) & sign));
    } else {
        code = round_even(code);
    }
    code = min(all(format.max_code), max(all(format.min_code), code));
    return code + all(format.signed_zero ? -0.0f : 0.0f);  // -0 + 0 = 0, and -0 + -0 = -0
}

INLINE F value_of(F code, Scale scale) { return code * scale.first * scale.second; }

// Codes as they are stored: sign and magnitude, or two's complement.
INLINE U to_field(F code, Format format) {
    code = bits<F>(bits<U>(code) & bits<U>((I)(code == code)));  // a NaN is stored as 0
    if (!format.signed_zero) return (U)__builtin_convertvector(code, I) & (~0u >> (32 - format.bits));
    U sign = bits<U>(code) & SIGN;
    return (U)__builtin_convertvector(bits<F>(bits<U>(code) ^ sign), I) | sign >> (32 - format.bits);
}

INLINE F from_field(U field, Format format) {
    U top = field << (32 - format.bits);
    if (!format.signed_zero) return __builtin_convertvector((I)top >> (32 - format.bits), F);
    U magnitude = (top & ~SIGN) >> (32 - format.bits);
    return bits<F>(bits<U>(__builtin_convertvector((I)magnitude, F)) | (top & SIGN));
}

INLINE void put(float* to, F value, int64_t count) { store(to, value, count); }
// bfloat16 is float32's upper half; exact for formats of up to 9 bits.
INLINE void put(uint16_t* to, F value, int64_t count) { store_integers(to, bits<U>(value) >> 16, count); }

// ---- Largest magnitudes, as bits

INLINE U magnitude(const float* x, int64_t count = LANES) { return load<U>(x, count) & ~SIGN; }

INLINE uint32_t largest_of(const float* x, int64_t count) {
    U found{};
    for (int64_t i = 0; i < count; i += LANES) found = max(found, magnitude(x + i, count - i));
    return largest_lane(found);
}

// Of LANES boxes of 16 that follow on one another.
INLINE U largest_of_sixteens(const float* x) {
    U found[LANES];
#pragma GCC unroll 16
    for (int box = 0; box < LANES; box++) {
        found[box] = magnitude(x + 16 * box);
#pragma GCC unroll 4
        for (int i = LANES; i < 16; i += LANES) found[box] = max(found[box], magnitude(x + 16 * box + i));
    }
    return largest_of_each(found);
}

// Of boxes of n values that follow on one another.
INLINE void largest_of_boxes(const float* x, int64_t boxes, int64_t n, Exponents& largest) {
    int64_t box = 0;
    if (n == 16)
        for (; box + LANES <= boxes; box += LANES) store(largest + box, largest_of_sixteens(x + 16 * box));
    for (; box < boxes; box++) largest[box] = largest_of(x + box * n, n);
    clear_rest(largest, boxes);
}

// A few rows at a time: memory is read ahead row by row, and rows 2^n apart share few sets of the first-level cache.
// work(row, rows), with rows() known when compiling.
constexpr int ROWS_AT_ONCE = 4;
template <int N>
struct Count {
    constexpr int operator()() const { return N; }
};
template <class Work>
INLINE void for_rows(int64_t rows, Work work) {
    int64_t row = 0;
    for (; row + ROWS_AT_ONCE <= rows; row += ROWS_AT_ONCE) work(row, Count<ROWS_AT_ONCE>());
    for (; row < rows; row++) work(row, Count<1>());
}

// Full vectors of columns, then the rest: work(column, count).
template <class Work>
INLINE void for_columns(int64_t columns, Work work) {
    int64_t column = 0;
    for (; column + LANES <= columns; column += LANES) work(column, (int64_t)LANES);
    if (column < columns) work(column, columns - column);
}

// Of columns.
INLINE void largest_of_columns(const float* x, int64_t rows, int64_t stride, int64_t columns, Exponents& largest) {
    memset(largest, 0, (columns + LANES - 1) / LANES * LANES * sizeof *largest);
    for_rows(rows, [&](int64_t row, auto rows_here) __attribute__((always_inline)) {
        for_columns(columns, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
            U found = load<U>(largest + column);
            for (int i = 0; i < rows_here(); i++)
                found = max(found, magnitude(x + (row + i) * stride + column, count));
            store(largest + column, found);
        });
    });
}

// ---- Bits

// One byte per code to `width` bits per code and back, eight codes in a word: neighbours close up, then pairs, then
// fours. Bytes that hold less than their width have 0 above it.
INLINE uint64_t close_up(uint64_t w, int width) {
    int gap = 8 - width;
    w = (w & 0x00ff00ff00ff00ffu) | (w & 0xff00ff00ff00ff00u) >> gap;
    w = (w & 0x0000ffff0000ffffu) | (w & 0xffff0000ffff0000u) >> 2 * gap;
    return (w & 0x00000000ffffffffu) | (w & 0xffffffff00000000u) >> 4 * gap;
}
INLINE uint64_t spread_out(uint64_t w, int width) {
    int gap = 8 - width;
    uint64_t codes = (1u << width) - 1, pairs = codes | codes << width, fours = pairs | pairs << 2 * width;
    w = (w & fours) | (w << 4 * gap & 0xffffffff00000000u);
    w = (w & pairs * 0x0000000100000001u) | (w << 2 * gap & 0xffff0000ffff0000u);
    return (w & codes * 0x0001000100010001u) | (w << gap & 0xff00ff00ff00ff00u);
}

// `Word` holds eight codes of a fast width exactly.
template <class Word>
INLINE void close_up_words(const uint8_t* codes, int64_t count, uint8_t* out) {
    for (int64_t i = 0; i < count / 8; i++) {
        uint64_t w;
        memcpy(&w, codes + 8 * i, 8);
        Word word = (Word)close_up(w, sizeof(Word));
        memcpy(out + i * sizeof(Word), &word, sizeof word);
    }
}
template <class Word>
INLINE void spread_out_words(const uint8_t* from, int64_t count, uint8_t* codes) {
    for (int64_t i = 0; i < count / 8; i++) {
        Word word;
        memcpy(&word, from + i * sizeof(Word), sizeof word);
        uint64_t w = spread_out(word, sizeof(Word));
        memcpy(codes + 8 * i, &w, 8);
    }
}

// Codes, one per T, to `width` bits each, beginning and ending on whole bytes.
template <class T>
void write_bits(const T* codes, int64_t count, int width, uint8_t* out) {
    if (sizeof(T) == 1 && count % 8 == 0) {
        if (width == 2) return close_up_words<uint16_t>((const uint8_t*)codes, count, out);
        if (width == 4) return close_up_words<uint32_t>((const uint8_t*)codes, count, out);
    }
    if (width == 8 * (int)sizeof(T)) {
        memcpy(out, codes, count * sizeof(T));
        return;
    }
    uint64_t held = 0;
    int bits_held = 0;
    for (int64_t i = 0; i < count; i++) {
        held |= (uint64_t)codes[i] << bits_held;
        bits_held += width;
        if (bits_held >= 32) {
            uint32_t word = (uint32_t)held;
            memcpy(out, &word, 4);
            out += 4;
            held >>= 32;
            bits_held -= 32;
        }
    }
    for (; bits_held > 0; bits_held -= 8, held >>= 8) *out++ = (uint8_t)held;
}

template <class T>
void read_bits(const uint8_t* from, int64_t count, int width, T* codes) {
    if (sizeof(T) == 1 && count % 8 == 0) {
        if (width == 2) return spread_out_words<uint16_t>(from, count, (uint8_t*)codes);
        if (width == 4) return spread_out_words<uint32_t>(from, count, (uint8_t*)codes);
    }
    if (width == 8 * (int)sizeof(T)) {
        memcpy(codes, from, count * sizeof(T));
        return;
    }
    const uint8_t* end = from + bytes_of(count, width);
    const uint64_t mask = ~0u >> (32 - width);
    uint64_t held = 0;
    int bits_held = 0;
    for (int64_t i = 0; i < count; i++) {
        if (bits_held < width) {
            uint32_t word = 0;
            if (end - from >= 4)
                memcpy(&word, from, 4);
            else
                for (int byte = 0; from + byte < end; byte++) word |= (uint32_t)from[byte] << 8 * byte;
            from += 4;
            held |= (uint64_t)word << bits_held;
            bits_held += 32;
        }
        codes[i] = (T)(held & mask);
        held >>= width;
        bits_held -= width;
    }
}

// ---- Boxes along the last dimension

// A stretch of one box. `index` is the first value's place in the tensor.
template <bool STOCHASTIC, class Out>
INLINE void quantize_stretch(const float* x, Out* out, int64_t count, uint32_t index, Scale down, Scale up,
                             Format format, uint64_t seed) {
    for (int64_t i = 0; i < count; i += LANES) {
        F code = encode<STOCHASTIC>(load<F>(x + i, count - i), down, format, index + i, seed);
        put(out + i, value_of(code, up), count - i);
    }
}

template <bool STOCHASTIC, class T>
INLINE void encode_stretch(const float* x, T* codes, int64_t count, uint32_t index, Scale down, Format format,
                           uint64_t seed) {
    for (int64_t i = 0; i < count; i += LANES) {
        F code = encode<STOCHASTIC>(load<F>(x + i, count - i), down, format, index + i, seed);
        store_integers(codes + i, to_field(code, format), count - i);
    }
}

template <class T, class Out>
INLINE void decode_stretch(const T* codes, Out* out, int64_t count, Scale up, Format format) {
    for (int64_t i = 0; i < count; i += LANES)
        put(out + i, value_of(from_field(load_integers(codes + i, count - i), format), up), count - i);
}

// A stretch of any length that begins on a whole byte of the packed codes.
template <bool STOCHASTIC, class T>
void pack_stretch(const float* x, uint8_t* out, int64_t count, uint32_t index, Scale down, Format format,
                  uint64_t seed) {
    T codes[CHUNK];
    for (int64_t start = 0; start < count; start += CHUNK) {
        int64_t part = smaller(CHUNK, count - start);
        encode_stretch<STOCHASTIC>(x + start, codes, part, index + start, down, format, seed);
        write_bits(codes, part, format.bits, out + start / 8 * format.bits);
    }
}
template <class T, class Out>
void unpack_stretch(const uint8_t* from, Out* out, int64_t count, Scale up, Format format) {
    T codes[CHUNK];
    for (int64_t start = 0; start < count; start += CHUNK) {
        int64_t part = smaller(CHUNK, count - start);
        read_bits(from + start / 8 * format.bits, part, format.bits, codes);
        decode_stretch(codes, out + start, part, up, format);
    }
}

// LANES boxes of 16 that follow on one another: scales stay in the first-level cache.
template <bool STOCHASTIC, class Out>
INLINE void quantize_sixteens(const float* x, Out* out, uint32_t index, Format format, uint64_t seed) {
    U exponent = exponent_of(largest_of_sixteens(x), format);
    Scale down = encode_scale(exponent, format), up = decode_scale(exponent, format);
    alignas(64) float scales[4][LANES];
    store(scales[0], down.first);
    store(scales[1], down.second);
    store(scales[2], up.first);
    store(scales[3], up.second);
#pragma GCC unroll 2
    for (int box = 0; box < LANES; box++)
        quantize_stretch<STOCHASTIC>(x + 16 * box, out + 16 * box, 16, index + 16 * box,
                                     {all(scales[0][box]), all(scales[1][box])},
                                     {all(scales[2][box]), all(scales[3][box])}, format, seed);
}

// A run: boxes of n values that follow on one another, up to CHUNK values or one box. n = 16 is known when compiling.
template <bool STOCHASTIC, class Out>
void quantize_run(const float* x, Out* out, int64_t boxes, int64_t n, uint32_t index, Format format, uint64_t seed) {
    for (; n == 16 && boxes >= LANES; boxes -= LANES, x += 16 * LANES, out += 16 * LANES, index += 16 * LANES)
        quantize_sixteens<STOCHASTIC>(x, out, index, format, seed);
    Exponents exponents;
    Scales down, up;
    largest_of_boxes(x, boxes, n, exponents);
    exponents_of(exponents, boxes, format);
    fill(down, exponents, boxes, format, encode_scale);
    fill(up, exponents, boxes, format, decode_scale);
    auto quantize = [&](int64_t values) __attribute__((always_inline)) {
        for (int64_t box = 0; box < boxes; box++) {
            int64_t at = box * values;
            quantize_stretch<STOCHASTIC>(x + at, out + at, values, index + at, down.of_box(box), up.of_box(box), format,
                                         seed);
        }
    };
    n == 16 ? quantize(16) : quantize(n);
}

template <bool STOCHASTIC, class T>
void pack_run(const float* x, uint8_t* exponent_bytes, uint8_t* out, int64_t boxes, int64_t n, uint32_t index,
              Format format, uint64_t seed) {
    Exponents exponents;
    Scales down;
    largest_of_boxes(x, boxes, n, exponents);
    exponents_of(exponents, boxes, format);
    fill(down, exponents, boxes, format, encode_scale);
    for (int64_t box = 0; box < boxes; box++) exponent_bytes[box] = (uint8_t)exponents[box];
    if (n == 16) {
        T codes[CHUNK];
        for (int64_t box = 0; box < boxes; box++)
            encode_stretch<STOCHASTIC>(x + 16 * box, codes + 16 * box, 16, index + 16 * box, down.of_box(box), format,
                                       seed);
        return write_bits(codes, 16 * boxes, format.bits, out);
    }
    for (int64_t box = 0; box < boxes; box++)
        pack_stretch<STOCHASTIC, T>(x + box * n, out + box * bytes_of(n, format.bits), n, index + box * n,
                                    down.of_box(box), format, seed);
}

template <class T, class Out>
void unpack_run(const uint8_t* exponent_bytes, const uint8_t* from, Out* out, int64_t boxes, int64_t n, Format format) {
    Exponents exponents;
    Scales up;
    read_exponents(exponent_bytes, boxes, exponents);
    fill(up, exponents, boxes, format, decode_scale);
    if (n == 16) {
        T codes[CHUNK];
        read_bits(from, 16 * boxes, format.bits, codes);
        for (int64_t box = 0; box < boxes; box++)
            decode_stretch(codes + 16 * box, out + 16 * box, 16, up.of_box(box), format);
        return;
    }
    for (int64_t box = 0; box < boxes; box++)
        unpack_stretch<T>(from + box * bytes_of(n, format.bits), out + box * n, n, up.of_box(box), format);
}

// ---- Boxes along another dimension

// A tile: one box of each of up to BOXES neighbouring columns.
struct Tile {
    int64_t rows, columns;
    int64_t stride;  // from row to row
    uint32_t index;  // the first value's place in the tensor
};

template <bool STOCHASTIC, class Out>
void quantize_tile(const float* x, Out* out, Tile tile, Format format, uint64_t seed) {
    Exponents exponents;
    Scales down, up;
    largest_of_columns(x, tile.rows, tile.stride, tile.columns, exponents);
    exponents_of(exponents, tile.columns, format);
    fill(down, exponents, tile.columns, format, encode_scale);
    fill(up, exponents, tile.columns, format, decode_scale);
    for_rows(tile.rows, [&](int64_t row, auto rows) __attribute__((always_inline)) {
        for_columns(tile.columns, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
            Scale down_here = down.of_columns(column), up_here = up.of_columns(column);
            for (int i = 0; i < rows(); i++) {
                int64_t at = (row + i) * tile.stride + column;
                __builtin_prefetch(x + tile.rows * tile.stride + at, 0, 2);  // the next box of the column, to L2
                F code = encode<STOCHASTIC>(load<F>(x + at, count), down_here, format, tile.index + at, seed);
                put(out + at, value_of(code, up_here), count);
            }
        });
    });
}

// Boxes of 16 codes of a width that divides 16: the codes of a column are WIDTH / 2 whole words of 32 bits.
template <int WIDTH, bool STOCHASTIC>
void pack_words(const float* x, uint8_t* out, Tile tile, const Scales& down, Format format, uint64_t seed) {
    constexpr int WORDS = WIDTH / 2;
    for_columns(tile.columns, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
        U words[WORDS]{};
        Scale scale = down.of_columns(column);
#pragma GCC unroll 16
        for (int row = 0; row < 16; row++) {
            int64_t at = row * tile.stride + column;
            F code = encode<STOCHASTIC>(load<F>(x + at, count), scale, format, tile.index + at, seed);
            words[row * WIDTH / 32] |= to_field(code, format) << (row * WIDTH % 32);
        }
        interleave<WORDS>(words);
        memcpy(out + column * WORDS * 4, words, (count == LANES ? LANES : count) * WORDS * 4);
    });
}
template <int WIDTH, class Out>
void unpack_words(const uint8_t* from, Out* out, Tile tile, const Scales& up, Format format) {
    constexpr int WORDS = WIDTH / 2;
    for_columns(tile.columns, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
        U words[WORDS]{};
        memcpy(words, from + column * WORDS * 4, (count == LANES ? LANES : count) * WORDS * 4);
        separate<WORDS>(words);
        Scale scale = up.of_columns(column);
#pragma GCC unroll 16
        for (int row = 0; row < 16; row++) {
            U field = words[row * WIDTH / 32] >> (row * WIDTH % 32) & (~0u >> (32 - WIDTH));
            put(out + row * tile.stride + column, value_of(from_field(field, format), scale), count);
        }
    });
}

// Any width and box size: codes go through memory, where those of a column lie together.
constexpr int ROWS = 64;  // a multiple of 8: whole bytes at every width

template <bool STOCHASTIC>
void pack_codes(const float* x, uint8_t* out, Tile tile, const Scales& down, Format format, uint64_t seed) {
    uint32_t codes[LANES][ROWS];
    int64_t box_bytes = bytes_of(tile.rows, format.bits);
    for_columns(tile.columns, [&](int64_t column, int64_t count) {
        Scale scale = down.of_columns(column);
        for (int64_t start = 0; start < tile.rows; start += ROWS) {
            int64_t rows = smaller(ROWS, tile.rows - start);
            for (int64_t row = 0; row < rows; row++) {
                int64_t at = (start + row) * tile.stride + column;
                F code = encode<STOCHASTIC>(load<F>(x + at, count), scale, format, tile.index + at, seed);
                U field = to_field(code, format);
                for (int lane = 0; lane < LANES; lane++) codes[lane][row] = field[lane];
            }
            for (int64_t lane = 0; lane < count; lane++)
                write_bits(codes[lane], rows, format.bits,
                           out + (column + lane) * box_bytes + start / 8 * format.bits);
        }
    });
}
template <class Out>
void unpack_codes(const uint8_t* from, Out* out, Tile tile, const Scales& up, Format format) {
    uint32_t codes[LANES][ROWS]{};
    int64_t box_bytes = bytes_of(tile.rows, format.bits);
    for_columns(tile.columns, [&](int64_t column, int64_t count) {
        Scale scale = up.of_columns(column);
        for (int64_t start = 0; start < tile.rows; start += ROWS) {
            int64_t rows = smaller(ROWS, tile.rows - start);
            for (int64_t lane = 0; lane < count; lane++)
                read_bits(from + (column + lane) * box_bytes + start / 8 * format.bits, rows, format.bits, codes[lane]);
            for (int64_t row = 0; row < rows; row++) {
                U field;
                for (int lane = 0; lane < LANES; lane++) field[lane] = codes[lane][row];
                put(out + (start + row) * tile.stride + column, value_of(from_field(field, format), scale), count);
            }
        }
    });
}

template <bool STOCHASTIC>
void pack_tile(const float* x, uint8_t* exponent_bytes, uint8_t* out, Tile tile, Format format, uint64_t seed) {
    Exponents exponents;
    Scales down;
    largest_of_columns(x, tile.rows, tile.stride, tile.columns, exponents);
    exponents_of(exponents, tile.columns, format);
    fill(down, exponents, tile.columns, format, encode_scale);
    for (int64_t column = 0; column < tile.columns; column++) exponent_bytes[column] = (uint8_t)exponents[column];
    bool words = tile.rows == 16;
    if (words && format.bits == 2) return pack_words<2, STOCHASTIC>(x, out, tile, down, format, seed);
    if (words && format.bits == 4) return pack_words<4, STOCHASTIC>(x, out, tile, down, format, seed);
    if (words && format.bits == 8) return pack_words<8, STOCHASTIC>(x, out, tile, down, format, seed);
    if (words && format.bits == 16) return pack_words<16, STOCHASTIC>(x, out, tile, down, format, seed);
    pack_codes<STOCHASTIC>(x, out, tile, down, format, seed);
}
template <class Out>
void unpack_tile(const uint8_t* exponent_bytes, const uint8_t* from, Out* out, Tile tile, Format format) {
    Exponents exponents;
    Scales up;
    read_exponents(exponent_bytes, tile.columns, exponents);
    fill(up, exponents, tile.columns, format, decode_scale);
    bool words = tile.rows == 16;
    if (words && format.bits == 2) return unpack_words<2>(from, out, tile, up, format);
    if (words && format.bits == 4) return unpack_words<4>(from, out, tile, up, format);
    if (words && format.bits == 8) return unpack_words<8>(from, out, tile, up, format);
    if (words && format.bits == 16) return unpack_words<16>(from, out, tile, up, format);
    unpack_codes(from, out, tile, up, format);
}

// ---- Tensors

struct Shape {
    int64_t before, length, after;

    int64_t count() const { return before * length * after; }
};

// Boxes of equal size: all full ones, or all short ones.
struct Part {
    int64_t start;         // of the first box along the length
    int64_t boxes, n;      // of a fibre, of a box
    int64_t exponents_at;  // where they lie in the packed bytes
    int64_t codes_at, box_bytes;
};

// work(part) for each part of a packed tensor.
template <class Work>
INLINE void for_parts(Shape shape, Format format, Work work) {
    int64_t n = format.box_size, full = shape.length / n, rest = shape.length % n, at = 0;
    const Part parts[] = {{0, full, n, 0, 0, 0}, {full * n, 1, rest, 0, 0, 0}};
    for (Part part : parts) {
        int64_t boxes = shape.before * part.boxes * shape.after;
        if (!boxes || !part.n) continue;
        part.exponents_at = at;
        part.codes_at = at + boxes;
        part.box_bytes = bytes_of(part.n, format.bits);
        at += boxes * (1 + part.box_bytes);
        work(part);
    }
}

// Fibres without a short box follow on one another: they are one long one.
INLINE Shape joined(Shape shape, Format format) {
    return shape.after == 1 && shape.length % format.box_size == 0 ? Shape{1, shape.before * shape.length, 1} : shape;
}

// Boxes along the last dimension: work(place of the first value, place of the first box in its part, boxes).
template <class Work>
INLINE void for_runs(Shape shape, const Part& part, int threads, Work work) {
    int64_t per_run = part.n < CHUNK ? smaller(CHUNK / part.n, BOXES) : 1;
    int64_t runs = (part.boxes + per_run - 1) / per_run;
    for_each(shape.before * runs, threads, [&](int64_t item) {
        int64_t fibre = item / runs, box = item % runs * per_run;
        work(fibre * shape.length + part.start + box * part.n, fibre * part.boxes + box,
             smaller(per_run, part.boxes - box));
    });
}

// One row of boxes along another dimension: work(tile, place of its first value, place of its first box in its part).
template <class Work>
INLINE void for_tiles(Shape shape, const Part& part, int64_t row_of_boxes, Work work) {
    int64_t fibre = row_of_boxes / part.boxes, box = row_of_boxes % part.boxes;
    for (int64_t column = 0; column < shape.after; column += BOXES) {
        int64_t at = (fibre * shape.length + part.start + box * part.n) * shape.after + column;
        Tile tile{part.n, smaller(BOXES, shape.after - column), shape.after, (uint32_t)at};
        work(tile, at, row_of_boxes * shape.after + column);
    }
}

// A tensor that is one box: work(place of the first value, values).
template <class Work>
INLINE void for_chunks(Shape shape, int threads, Work work) {
    int64_t count = shape.count();
    for_each((count + CHUNK - 1) / CHUNK, threads,
             [&](int64_t chunk) { work(chunk * CHUNK, smaller(CHUNK, count - chunk * CHUNK)); });
}

U exponent_of_all(const float* x, Shape shape, Format format, int threads) {
    int64_t count = shape.count(), shares = threads < 1 ? 1 : threads;
    int64_t share = (count / shares / CHUNK + 1) * CHUNK;
    uint32_t largest = 0;
#pragma omp parallel for num_threads(threads) reduction(max : largest) if (threads > 1)
    for (int64_t start = 0; start < count; start += share) {
        uint32_t found = largest_of(x + start, smaller(share, count - start));
        largest = found > largest ? found : largest;
    }
    return exponent_of(all(largest), format);
}

// `index` is the place of x's first value in the tensor.
template <bool STOCHASTIC, class Out>
void quantize_fibres(const float* x, Out* out, int64_t index, Shape shape, Format format, uint64_t seed, int threads) {
    shape = joined(shape, format);
    for_parts(shape, format, [&](const Part& part) {
        for_runs(shape, part, threads, [&](int64_t at, int64_t, int64_t boxes) {
            quantize_run<STOCHASTIC>(x + at, out + at, boxes, part.n, (uint32_t)(index + at), format, seed);
        });
    });
}

template <bool STOCHASTIC, class Out>
void fake_quantize(const float* x, Out* out, Shape shape, Format format, uint64_t seed, int threads) {
    if (!format.box_size) {
        U exponent = exponent_of_all(x, shape, format, threads);
        Scale down = encode_scale(exponent, format), up = decode_scale(exponent, format);
        for_chunks(shape, threads, [&](int64_t at, int64_t count) {
            quantize_stretch<STOCHASTIC>(x + at, out + at, count, (uint32_t)at, down, up, format, seed);
        });
        return;
    }
    if (shape.after == 1) return quantize_fibres<STOCHASTIC>(x, out, 0, shape, format, seed, threads);
    for_parts(shape, format, [&](const Part& part) {
        for_each(shape.before * part.boxes, threads, [&](int64_t row_of_boxes) {
            for_tiles(shape, part, row_of_boxes, [&](Tile tile, int64_t at, int64_t) {
                quantize_tile<STOCHASTIC>(x + at, out + at, tile, format, seed);
            });
        });
    });
}

template <bool STOCHASTIC>
void pack_row_of_boxes(const float* x, uint8_t* out, Shape shape, const Part& part, int64_t row_of_boxes, Format format,
                       uint64_t seed) {
    for_tiles(shape, part, row_of_boxes, [&](Tile tile, int64_t at, int64_t box) {
        pack_tile<STOCHASTIC>(x + at, out + part.exponents_at + box, out + part.codes_at + box * part.box_bytes, tile,
                              format, seed);
    });
}

// use(T()) with the T that holds a code.
template <class Use>
INLINE void with_code_type(Format format, Use use) {
    if (format.bits <= 8)
        use(uint8_t());
    else if (format.bits <= 16)
        use(uint16_t());
    else
        use(uint32_t());
}

template <bool STOCHASTIC>
void pack(const float* x, uint8_t* out, Shape shape, Format format, uint64_t seed, int threads) {
    if (!format.box_size) {
        U exponent = exponent_of_all(x, shape, format, threads);
        Scale down = encode_scale(exponent, format);
        *out = (uint8_t)exponent[0];
        return with_code_type(format, [&](auto type) {
            for_chunks(shape, threads, [&](int64_t at, int64_t count) {
                uint8_t* codes = out + 1 + at / 8 * format.bits;
                pack_stretch<STOCHASTIC, decltype(type)>(x + at, codes, count, (uint32_t)at, down, format, seed);
            });
        });
    }
    shape = joined(shape, format);
    for_parts(shape, format, [&](const Part& part) {
        if (shape.after > 1)
            return for_each(shape.before * part.boxes, threads, [&](int64_t row_of_boxes) {
                pack_row_of_boxes<STOCHASTIC>(x, out, shape, part, row_of_boxes, format, seed);
            });
        with_code_type(format, [&](auto type) {
            for_runs(shape, part, threads, [&](int64_t at, int64_t box, int64_t boxes) {
                uint8_t *exponents = out + part.exponents_at + box, *codes = out + part.codes_at + box * part.box_bytes;
                pack_run<STOCHASTIC, decltype(type)>(x + at, exponents, codes, boxes, part.n, (uint32_t)at, format,
                                                     seed);
            });
        });
    });
}

template <class Out>
void unpack(const uint8_t* data, Out* out, Shape shape, Format format, int threads) {
    if (!format.box_size) {
        Scale up = decode_scale(all((uint32_t)*data), format);
        return with_code_type(format, [&](auto type) {
            for_chunks(shape, threads, [&](int64_t at, int64_t count) {
                unpack_stretch<decltype(type)>(data + 1 + at / 8 * format.bits, out + at, count, up, format);
            });
        });
    }
    shape = joined(shape, format);
    for_parts(shape, format, [&](const Part& part) {
        const uint8_t *exponents = data + part.exponents_at, *codes = data + part.codes_at;
        if (shape.after > 1)
            return for_each(shape.before * part.boxes, threads, [&](int64_t row_of_boxes) {
                for_tiles(shape, part, row_of_boxes, [&](Tile tile, int64_t at, int64_t box) {
                    unpack_tile(exponents + box, codes + box * part.box_bytes, out + at, tile, format);
                });
            });
        with_code_type(format, [&](auto type) {
            for_runs(shape, part, threads, [&](int64_t at, int64_t box, int64_t boxes) {
                unpack_run<decltype(type)>(exponents + box, codes + box * part.box_bytes, out + at, boxes, part.n,
                                           format);
            });
        });
    });
}

// x as (before, length, after) once for two readers: the operand has its boxes along `after`, the stash along
// `length`. Each row of the stash's boxes is quantized for the operand, and packed while it is in the cache.
template <bool STOCHASTIC, class Out>
void quantize_and_pack(const float* x, Out* operand, uint8_t* stash, Shape shape, Format operand_format,
                       uint64_t operand_seed, Format stash_format, uint64_t stash_seed, int threads) {
    for_parts(shape, stash_format, [&](const Part& part) {
        for_each(shape.before * part.boxes, threads, [&](int64_t row_of_boxes) {
            int64_t fibre = row_of_boxes / part.boxes, box = row_of_boxes % part.boxes;
            int64_t at = (fibre * shape.length + part.start + box * part.n) * shape.after;
            quantize_fibres<STOCHASTIC>(x + at, operand + at, at, {part.n, shape.after, 1}, operand_format,
                                        operand_seed, 1);
            pack_row_of_boxes<STOCHASTIC>(x, stash, shape, part, row_of_boxes, stash_format, stash_seed);
        });
    });
}

// ---- Masks

void dropout(const float* x, float* out, int64_t count, float p, float scale, uint64_t seed, int threads) {
    for_each((count + CHUNK - 1) / CHUNK, threads, [&](int64_t chunk) {
        int64_t end = smaller(count, (chunk + 1) * CHUNK);
        for (int64_t at = chunk * CHUNK; at < end; at += LANES) {
            I keep = noise(lane_numbers() + (uint32_t)at, seed) >= p;
            store(out + at, choose(keep, load<F>(x + at, end - at) * scale, F{}), end - at);
        }
    });
}

// The first value is the lowest bit of the first byte. NaN counts as positive, as in torch's gradient of ReLU.
void pack_positive(const float* x, uint8_t* out, int64_t count, int threads) {
    for_each((count + CHUNK - 1) / CHUNK, threads, [&](int64_t chunk) {
        int64_t start = chunk * CHUNK, part = smaller(CHUNK, count - start);
        uint8_t ones[CHUNK]{};
        for (int64_t at = 0; at < part; at += LANES)
            store_integers(ones + at, (U) ~(load<F>(x + start + at, part - at) <= 0.0f) & 1, part - at);
        for (int64_t byte = 0; byte < bytes_of(part, 1); byte++) {
            uint64_t w;
            memcpy(&w, ones + 8 * byte, 8);
            out[start / 8 + byte] = (uint8_t)close_up(w, 1);
        }
    });
}

void mask(const float* x, const uint8_t* bits_of_x, float* out, int64_t count, int threads) {
    for_each((count + CHUNK - 1) / CHUNK, threads, [&](int64_t chunk) {
        int64_t start = chunk * CHUNK, part = smaller(CHUNK, count - start);
        uint8_t ones[CHUNK];
        for (int64_t byte = 0; byte < bytes_of(part, 1); byte++) {
            uint64_t w = spread_out(bits_of_x[start / 8 + byte], 1);
            memcpy(ones + 8 * byte, &w, 8);
        }
        for (int64_t at = 0; at < part; at += LANES) {
            U one = load_integers(ones + at, part - at), value = load<U>(x + start + at, part - at);
            store(out + start + at, value & -one, part - at);
        }
    });
}

}  // namespace

// ---- Exported: out holds float32, or bfloat16 (uint16_t) where `bfloat16` says so

EXPORT void DSQ_NAME(fake_quantize)(const float* x, void* out, int32_t bfloat16, int64_t before, int64_t length,
                                    int64_t after, const DsqFormat* format, int32_t stochastic, uint64_t seed,
                                    int32_t threads) {
    Shape shape{before, length, after};
    if (stochastic && bfloat16) return fake_quantize<true>(x, (uint16_t*)out, shape, *format, seed, threads);
    if (stochastic) return fake_quantize<true>(x, (float*)out, shape, *format, seed, threads);
    if (bfloat16) return fake_quantize<false>(x, (uint16_t*)out, shape, *format, seed, threads);
    fake_quantize<false>(x, (float*)out, shape, *format, seed, threads);
}

EXPORT void DSQ_NAME(pack)(const float* x, uint8_t* out, int64_t before, int64_t length, int64_t after,
                           const DsqFormat* format, int32_t stochastic, uint64_t seed, int32_t threads) {
    Shape shape{before, length, after};
    if (stochastic) return pack<true>(x, out, shape, *format, seed, threads);
    pack<false>(x, out, shape, *format, seed, threads);
}

EXPORT void DSQ_NAME(unpack)(const uint8_t* data, void* out, int32_t bfloat16, int64_t before, int64_t length,
                             int64_t after, const DsqFormat* format, int32_t threads) {
    Shape shape{before, length, after};
    if (bfloat16) return unpack(data, (uint16_t*)out, shape, *format, threads);
    unpack(data, (float*)out, shape, *format, threads);
}

EXPORT void DSQ_NAME(quantize_and_pack)(const float* x, void* operand, int32_t bfloat16, uint8_t* stash, int64_t before,
                                        int64_t length, int64_t after, const DsqFormat* operand_format,
                                        const DsqFormat* stash_format, int32_t stochastic, uint64_t operand_seed,
                                        uint64_t stash_seed, int32_t threads) {
    Shape shape{before, length, after};
    auto run = [&](auto kernel, auto* out) {
        kernel(x, out, stash, shape, *operand_format, operand_seed, *stash_format, stash_seed, threads);
    };
    if (stochastic && bfloat16) return run(quantize_and_pack<true, uint16_t>, (uint16_t*)operand);
    if (stochastic) return run(quantize_and_pack<true, float>, (float*)operand);
    if (bfloat16) return run(quantize_and_pack<false, uint16_t>, (uint16_t*)operand);
    run(quantize_and_pack<false, float>, (float*)operand);
}

EXPORT void DSQ_NAME(dropout)(const float* x, float* out, int64_t count, float p, float scale, uint64_t seed,
                              int32_t threads) {
    dropout(x, out, count, p, scale, seed, threads);
}

EXPORT void DSQ_NAME(pack_positive)(const float* x, uint8_t* out, int64_t count, int32_t threads) {
    pack_positive(x, out, count, threads);
}

EXPORT void DSQ_NAME(mask)(const float* x, const uint8_t* bits_of_x, float* out, int64_t count, int32_t threads) {
    mask(x, bits_of_x, out, count, threads);
}
