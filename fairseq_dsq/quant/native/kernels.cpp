// Quantize, pack and unpack float32 tensors on the CPU: quant/reference.py and quant/packing.py, bit for bit.
//
// A contiguous tensor is seen as (before, length, after) with boxes of n values along `length`, or the whole tensor
// is one box. Values of a box share a biased exponent e (float32's own; 255 marks a box with Inf or NaN):
//
//   code  = clamp(round(x * 2^(bits - 2 + 127 - e)))       value = code * 2^(e - (bits - 2 + 127))
//
// Packed bytes: a part of all full boxes, then a part of the short last ones; each part is one byte e per box in the
// order (before, boxes, after), then the boxes' codes in the same order, `bits` bits each, little-endian, a box
// starting on a whole byte.
//
// Work is done in tiles of rows of LANES values. Boxes along the last dimension: the rows are a stretch of one box
// (LAST). Boxes along another one: each lane is a box of its own, and a row is a step along it. Tensors are read where
// they lie; nothing is transposed.
//
// This file is compiled once per instruction set: DSQ_NAME(f) is the exported name. No fused multiply-add and no fast
// math: each operation is rounded as PyTorch rounds it.

#include "lanes.h"

#define JOIN2(a, b, c) a##b##_##c
#define JOIN(a, b, c) JOIN2(a, b, c)
#define DSQ_NAME(name) JOIN(dsq_, DSQ_ISA, name)
#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {
// What fairseq_dsq.formats says of a format; native/__init__.py has the same fields.
struct DsqFormat {
    int32_t bits;
    int32_t signed_zero;
    int64_t box_size;        // 0: the whole tensor is one box
    int32_t fixed_exponent;  // biased; 0: it follows from the box
    float min_code, max_code;
};
}

namespace {

using Format = DsqFormat;
constexpr int BIAS = 127;
constexpr uint32_t NAN_EXPONENT = 255;
constexpr uint32_t SIGN = 0x80000000u;
// Values that are worked on together, in the first-level cache; a multiple of 8: whole bytes at every width.
constexpr int CHUNK = 1024;

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

INLINE F power_of_two(I exponent) { return bits<F>((exponent + BIAS) << 23); }

// A power of two as the product of two, so that neither over- nor underflows.
struct Scale {
    F first, second;
};

INLINE U box_exponent(U largest, const Format& format) {
    U exponent = largest >> 23;
    if (!format.fixed_exponent) return max(exponent, all(1u));
    return choose((I)(exponent == NAN_EXPONENT), exponent, all((uint32_t)format.fixed_exponent));
}

INLINE Scale encode_scale(U exponent, const Format& format) {
    I shift = (format.bits - 2 + BIAS) - (I)exponent, half = shift >> 1;
    return {power_of_two(half), power_of_two(shift - half)};
}

INLINE Scale decode_scale(U exponent, const Format& format) {
    I shift = (I)exponent - (format.bits - 2 + BIAS), half = shift >> 1;
    U nan = all(0x7fc00000u);
    // NaN times anything is NaN: the mark needs no pass of its own.
    return {choose((I)(exponent == NAN_EXPONENT), bits<F>(nan), power_of_two(half)), power_of_two(shift - half)};
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
INLINE F encode(F x, Scale scale, const Format& format, uint32_t index, uint64_t seed) {
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
INLINE U to_field(F code, const Format& format) {
    code = bits<F>(bits<U>(code) & bits<U>((I)(code == code)));  // a NaN is stored as 0
    if (!format.signed_zero) return (U)__builtin_convertvector(code, I) & (~0u >> (32 - format.bits));
    U sign = bits<U>(code) & SIGN;
    return (U)__builtin_convertvector(bits<F>(bits<U>(code) ^ sign), I) | sign >> (32 - format.bits);
}

INLINE F from_field(U field, const Format& format) {
    U top = field << (32 - format.bits);
    if (!format.signed_zero) return __builtin_convertvector((I)top >> (32 - format.bits), F);
    U magnitude = (top & ~SIGN) >> (32 - format.bits);
    return bits<F>(bits<U>(__builtin_convertvector((I)magnitude, F)) | (top & SIGN));
}

INLINE void put(float* to, F value, int64_t count) { store(to, value, count); }
// bfloat16 is float32's upper half; exact for formats of up to 9 bits.
INLINE void put(uint16_t* to, F value, int64_t count) { store_integers(to, bits<U>(value) >> 16, count); }

// ---- Tiles

struct Tile {
    int64_t rows;     // of LANES values, or less:
    int64_t stride;   // from row to row
    int64_t values;   // LAST: of the box; else columns: of each row
    uint32_t index;   // the first value's place in the tensor, modulo 2^32
};

// One box, or a stretch of one, along the last dimension.
INLINE Tile stretch(int64_t values, int64_t index) {
    return {(values + LANES - 1) / LANES, LANES, values, (uint32_t)index};
}

template <bool LAST>
INLINE int64_t row_count(const Tile& tile, int64_t row) {
    return smaller(LANES, LAST ? tile.values - row * LANES : tile.values);
}

// The magnitude bits of the largest value of each lane's box.
template <bool LAST>
INLINE U largest(const float* x, const Tile& tile) {
    U found{};
    for (int64_t row = 0; row < tile.rows; row++)
        found = max(found, load<U>(x + row * tile.stride, row_count<LAST>(tile, row)) & ~SIGN);
    return LAST ? largest_lane(found) : found;
}

// emit(row, count, code) for each row.
template <bool LAST, bool STOCHASTIC, class Emit>
INLINE void encode_tile(const float* x, const Tile& tile, U exponent, const Format& format, uint64_t seed, Emit emit) {
    Scale scale = encode_scale(exponent, format);
    for (int64_t row = 0; row < tile.rows; row++) {
        int64_t count = row_count<LAST>(tile, row), offset = row * tile.stride;
        emit(row, count, encode<STOCHASTIC>(load<F>(x + offset, count), scale, format, tile.index + offset, seed));
    }
}

template <bool LAST, bool STOCHASTIC, class Out>
INLINE void quantize_tile(const float* x, Out* out, const Tile& tile, U exponent, const Format& format, uint64_t seed) {
    Scale scale = decode_scale(exponent, format);
    encode_tile<LAST, STOCHASTIC>(x, tile, exponent, format, seed, [&](int64_t row, int64_t count, F code) __attribute__((always_inline)) {
        put(out + row * tile.stride, value_of(code, scale), count);
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

// ---- Boxes along the last dimension, packed

// The T that holds a code: use(T()) for it.
template <class Use>
INLINE void with_code_type(int width, Use use) {
    if (width <= 8)
        use(uint8_t());
    else if (width <= 16)
        use(uint16_t());
    else
        use(uint32_t());
}

// A stretch of one box of any size, beginning on a whole byte.
template <bool STOCHASTIC, class T>
void pack_stretch(const float* x, int64_t count, int64_t index, U exponent, const Format& format, uint64_t seed,
                  uint8_t* out) {
    T codes[CHUNK];
    for (int64_t start = 0; start < count; start += CHUNK) {
        int64_t part = smaller(CHUNK, count - start);
        encode_tile<true, STOCHASTIC>(x + start, stretch(part, index + start), exponent, format, seed,
                                      [&](int64_t row, int64_t lanes, F code) __attribute__((always_inline)) {
                                          store_integers(codes + row * LANES, to_field(code, format), lanes);
                                      });
        write_bits(codes, part, format.bits, out + start / 8 * format.bits);
    }
}

template <class T, class Out>
void unpack_stretch(const uint8_t* from, int64_t count, U exponent, const Format& format, Out* out) {
    T codes[CHUNK];
    Scale scale = decode_scale(exponent, format);
    for (int64_t start = 0; start < count; start += CHUNK) {
        int64_t part = smaller(CHUNK, count - start);
        read_bits(from + start / 8 * format.bits, part, format.bits, codes);
        for (int64_t i = 0; i < part; i += LANES) {
            int64_t lanes = smaller(LANES, part - i);
            put(out + start + i, value_of(from_field(load_integers(codes + i, lanes), format), scale), lanes);
        }
    }
}

// Boxes of 16, up to CHUNK values.
template <bool STOCHASTIC, class T>
void pack_sixteens(const float* x, int64_t boxes, int64_t index, const Format& format, uint64_t seed,
                   uint8_t* exponents, uint8_t* out) {
    T codes[CHUNK];
    for (int64_t box = 0; box < boxes; box++) {
        const float* values = x + 16 * box;
        T* box_codes = codes + 16 * box;
        Tile tile = stretch(16, index + 16 * box);
        U exponent = box_exponent(largest<true>(values, tile), format);
        exponents[box] = (uint8_t)exponent[0];
        encode_tile<true, STOCHASTIC>(values, tile, exponent, format, seed,
                                      [&](int64_t row, int64_t lanes, F code) __attribute__((always_inline)) {
                                          store_integers(box_codes + row * LANES, to_field(code, format), lanes);
                                      });
    }
    write_bits(codes, 16 * boxes, format.bits, out);
}

template <class T, class Out>
void unpack_sixteens(const uint8_t* exponents, const uint8_t* from, int64_t boxes, const Format& format, Out* out) {
    T codes[CHUNK];
    read_bits(from, 16 * boxes, format.bits, codes);
    for (int64_t box = 0; box < boxes; box++) {
        Scale scale = decode_scale(all((uint32_t)exponents[box]), format);
#pragma GCC unroll 4
        for (int i = 16 * box; i < 16 * box + 16; i += LANES)
            put(out + i, value_of(from_field(load_integers(codes + i), format), scale), LANES);
    }
}

// ---- Boxes along another dimension, packed: up to LANES columns

// Codes of a width that divides 16, in boxes of 16: the codes of a column are WIDTH / 2 whole words of 32 bits.
template <int WIDTH, bool STOCHASTIC>
INLINE void pack_column_words(const float* x, const Tile& tile, U exponent, const Format& format, uint64_t seed,
                              uint8_t* out) {
    constexpr int WORDS = WIDTH / 2;
    U words[WORDS]{};
    Scale scale = encode_scale(exponent, format);
#pragma GCC unroll 16
    for (int row = 0; row < 16; row++) {
        int64_t offset = row * tile.stride;
        F code = encode<STOCHASTIC>(load<F>(x + offset, tile.values), scale, format, tile.index + offset, seed);
        words[row * WIDTH / 32] |= to_field(code, format) << (row * WIDTH % 32);
    }
    interleave<WORDS>(words);
    if (tile.values >= LANES) {
#pragma GCC unroll 8
        for (int k = 0; k < WORDS; k++) store(out + k * LANES * 4, words[k]);
    } else {
        memcpy(out, words, tile.values * WORDS * 4);
    }
}

template <int WIDTH, class Out>
INLINE void unpack_column_words(const uint8_t* from, const Tile& tile, U exponent, const Format& format, Out* out) {
    constexpr int WORDS = WIDTH / 2;
    U words[WORDS]{};
    if (tile.values >= LANES) {
#pragma GCC unroll 8
        for (int k = 0; k < WORDS; k++) words[k] = load<U>(from + k * LANES * 4);
    } else {
        memcpy(words, from, tile.values * WORDS * 4);
    }
    separate<WORDS>(words);
    Scale scale = decode_scale(exponent, format);
#pragma GCC unroll 16
    for (int row = 0; row < 16; row++) {
        U field = words[row * WIDTH / 32] >> (row * WIDTH % 32) & (~0u >> (32 - WIDTH));
        put(out + row * tile.stride, value_of(from_field(field, format), scale), tile.values);
    }
}

// Any width and box size: through codes in memory, column by column.
template <bool STOCHASTIC>
void pack_columns_slowly(const float* x, const Tile& tile, U exponent, const Format& format, uint64_t seed,
                         uint8_t* out) {
    constexpr int ROWS = 64;  // a multiple of 8: whole bytes at every width
    uint32_t codes[LANES][ROWS];
    int64_t box_bytes = bytes_of(tile.rows, format.bits);
    for (int64_t start = 0; start < tile.rows; start += ROWS) {
        int64_t offset = start * tile.stride;
        Tile part{smaller(ROWS, tile.rows - start), tile.stride, tile.values, (uint32_t)(tile.index + offset)};
        encode_tile<false, STOCHASTIC>(x + offset, part, exponent, format, seed, [&](int64_t row, int64_t, F code) {
            U field = to_field(code, format);
            for (int lane = 0; lane < LANES; lane++) codes[lane][row] = field[lane];
        });
        for (int64_t column = 0; column < tile.values; column++)
            write_bits(codes[column], part.rows, format.bits, out + column * box_bytes + start / 8 * format.bits);
    }
}

template <class Out>
void unpack_columns_slowly(const uint8_t* from, const Tile& tile, U exponent, const Format& format, Out* out) {
    constexpr int ROWS = 64;
    uint32_t codes[LANES][ROWS]{};
    int64_t box_bytes = bytes_of(tile.rows, format.bits);
    Scale scale = decode_scale(exponent, format);
    for (int64_t start = 0; start < tile.rows; start += ROWS) {
        int64_t rows = smaller(ROWS, tile.rows - start);
        for (int64_t column = 0; column < tile.values; column++)
            read_bits(from + column * box_bytes + start / 8 * format.bits, rows, format.bits, codes[column]);
        for (int64_t row = 0; row < rows; row++) {
            U field;
            for (int lane = 0; lane < LANES; lane++) field[lane] = codes[lane][row];
            put(out + (start + row) * tile.stride, value_of(from_field(field, format), scale), tile.values);
        }
    }
}

template <bool STOCHASTIC>
INLINE void pack_columns(const float* x, const Tile& tile, U exponent, const Format& format, uint64_t seed,
                         uint8_t* out) {
    if (tile.rows == 16 && format.bits == 2) return pack_column_words<2, STOCHASTIC>(x, tile, exponent, format, seed, out);
    if (tile.rows == 16 && format.bits == 4) return pack_column_words<4, STOCHASTIC>(x, tile, exponent, format, seed, out);
    if (tile.rows == 16 && format.bits == 8) return pack_column_words<8, STOCHASTIC>(x, tile, exponent, format, seed, out);
    if (tile.rows == 16 && format.bits == 16)
        return pack_column_words<16, STOCHASTIC>(x, tile, exponent, format, seed, out);
    pack_columns_slowly<STOCHASTIC>(x, tile, exponent, format, seed, out);
}

template <class Out>
INLINE void unpack_columns(const uint8_t* from, const Tile& tile, U exponent, const Format& format, Out* out) {
    if (tile.rows == 16 && format.bits == 2) return unpack_column_words<2>(from, tile, exponent, format, out);
    if (tile.rows == 16 && format.bits == 4) return unpack_column_words<4>(from, tile, exponent, format, out);
    if (tile.rows == 16 && format.bits == 8) return unpack_column_words<8>(from, tile, exponent, format, out);
    if (tile.rows == 16 && format.bits == 16) return unpack_column_words<16>(from, tile, exponent, format, out);
    unpack_columns_slowly(from, tile, exponent, format, out);
}

// ---- Tensors

struct Shape {
    int64_t before, length, after;
};

// Boxes of equal size: all full ones, or all short ones.
struct Part {
    int64_t start;      // of the first box along the length
    int64_t boxes, n;   // per fibre
    int64_t exponents;  // where they lie in the packed bytes
    int64_t codes;
    int64_t box_bytes;
};

struct Parts {
    Part part[2];
    int count = 0;
};

// Fibres without a short box follow on one another: they are one long one.
INLINE Shape joined(Shape shape, const Format& format) {
    if (shape.after == 1 && shape.length % format.box_size == 0) return {1, shape.before * shape.length, 1};
    return shape;
}

Parts parts_of(Shape shape, const Format& format) {
    Parts parts;
    int64_t n = format.box_size, full = shape.length / n, bytes = 0;
    auto add = [&](int64_t start, int64_t boxes, int64_t values) {
        int64_t all_boxes = shape.before * boxes * shape.after, box_bytes = bytes_of(values, format.bits);
        parts.part[parts.count++] = {start, boxes, values, bytes, bytes + all_boxes, box_bytes};
        bytes += all_boxes * (1 + box_bytes);
    };
    if (full) add(0, full, n);
    if (shape.length % n) add(full * n, 1, shape.length % n);
    return parts;
}

// Boxes along the last dimension, in runs of whole boxes of up to CHUNK values (or of one box, if larger):
// work(first value, place of the first box among the part's, boxes).
template <class Work>
void for_runs(Shape shape, const Part& part, int threads, Work work) {
    int64_t per_run = part.n < CHUNK ? CHUNK / part.n : 1, runs = (part.boxes + per_run - 1) / per_run;
    for_each(shape.before * runs, threads, [&](int64_t item) {
        int64_t fibre = item / runs, box = item % runs * per_run;
        work(fibre * shape.length + part.start + box * part.n, fibre * part.boxes + box,
             smaller(per_run, part.boxes - box));
    });
}

// Boxes along another dimension, in tiles of LANES neighbours: work(tile, place of its first box among the part's).
template <class Work>
INLINE void for_tiles(Shape shape, const Part& part, int64_t row_of_boxes, Work work) {
    int64_t fibre = row_of_boxes / part.boxes, box = row_of_boxes % part.boxes;
    int64_t first = (fibre * shape.length + part.start + box * part.n) * shape.after;
    for (int64_t column = 0; column < shape.after; column += LANES) {
        int64_t columns = smaller(LANES, shape.after - column);
        work(Tile{part.n, shape.after, columns, (uint32_t)(first + column)}, first + column,
             row_of_boxes * shape.after + column);
    }
}

// The largest magnitude bits of a contiguous tensor.
uint32_t largest_of_all(const float* x, int64_t count, int threads) {
    int64_t runs = (count + CHUNK - 1) / CHUNK, shares = smaller(runs, threads < 1 ? 1 : threads);
    uint32_t found = 0;
    auto share_of = [&](int64_t share) {
        U v{};
        int64_t end = smaller(count, runs * (share + 1) / shares * CHUNK);
        for (int64_t i = runs * share / shares * CHUNK; i < end; i += LANES)
            v = max(v, load<U>(x + i, end - i) & ~SIGN);
        return largest_lane(v)[0];
    };
    if (shares == 1) return share_of(0);
#pragma omp parallel for num_threads(threads) reduction(max : found)
    for (int64_t share = 0; share < shares; share++) {
        uint32_t its = share_of(share);
        found = its > found ? its : found;
    }
    return found;
}

template <bool STOCHASTIC, class Out>
INLINE void quantize_run(const float* x, Out* out, int64_t first, int64_t boxes, int64_t n, const Format& format,
                         uint64_t seed) {
    for (int64_t at = first; at < first + boxes * n; at += n) {
        Tile tile = stretch(n, at);
        U exponent = box_exponent(largest<true>(x + at, tile), format);
        quantize_tile<true, STOCHASTIC>(x + at, out + at, tile, exponent, format, seed);
    }
}

// Boxes along the last dimension of fibres that begin at `start`.
template <bool STOCHASTIC, class Out>
void quantize_fibres(const float* x, Out* out, int64_t start, Shape shape, const Format& format, uint64_t seed,
                     int threads) {
    shape = joined(shape, format);
    Parts parts = parts_of(shape, format);
    for (int p = 0; p < parts.count; p++) {
        int64_t n = parts.part[p].n;
        for_runs(shape, parts.part[p], threads, [&](int64_t first, int64_t, int64_t boxes) {
            if (n == 16)
                quantize_run<STOCHASTIC>(x, out, start + first, boxes, 16, format, seed);
            else
                quantize_run<STOCHASTIC>(x, out, start + first, boxes, n, format, seed);
        });
    }
}

template <bool STOCHASTIC, class Out>
void fake_quantize(const float* x, Out* out, Shape shape, const Format& format, uint64_t seed, int threads) {
    if (!format.box_size) {
        int64_t count = shape.before * shape.length * shape.after, runs = (count + CHUNK - 1) / CHUNK;
        U exponent = box_exponent(all(largest_of_all(x, count, threads)), format);
        for_each(runs, threads, [&](int64_t run) {
            int64_t at = run * CHUNK;
            Tile tile = stretch(smaller(CHUNK, count - at), at);
            quantize_tile<true, STOCHASTIC>(x + at, out + at, tile, exponent, format, seed);
        });
        return;
    }
    if (shape.after == 1) return quantize_fibres<STOCHASTIC>(x, out, 0, shape, format, seed, threads);
    Parts parts = parts_of(shape, format);
    for (int p = 0; p < parts.count; p++) {
        const Part& part = parts.part[p];
        for_each(shape.before * part.boxes, threads, [&](int64_t row_of_boxes) {
            for_tiles(shape, part, row_of_boxes, [&](const Tile& tile, int64_t at, int64_t) {
                U exponent = box_exponent(largest<false>(x + at, tile), format);
                quantize_tile<false, STOCHASTIC>(x + at, out + at, tile, exponent, format, seed);
            });
        });
    }
}

// One row of boxes along another dimension than the last.
template <bool STOCHASTIC>
void pack_row_of_boxes(const float* x, uint8_t* out, Shape shape, const Part& part, int64_t row_of_boxes,
                       const Format& format, uint64_t seed) {
    for_tiles(shape, part, row_of_boxes, [&](const Tile& tile, int64_t at, int64_t box) {
        U exponent = box_exponent(largest<false>(x + at, tile), format);
        store_integers(out + part.exponents + box, exponent, tile.values);
        pack_columns<STOCHASTIC>(x + at, tile, exponent, format, seed, out + part.codes + box * part.box_bytes);
    });
}

template <bool STOCHASTIC>
void pack(const float* x, uint8_t* out, Shape shape, const Format& format, uint64_t seed, int threads) {
    if (!format.box_size) {
        int64_t count = shape.before * shape.length * shape.after, runs = (count + CHUNK - 1) / CHUNK;
        U exponent = box_exponent(all(largest_of_all(x, count, threads)), format);
        out[0] = (uint8_t)exponent[0];
        with_code_type(format.bits, [&](auto type) {
            for_each(runs, threads, [&](int64_t run) {
                int64_t at = run * CHUNK;
                pack_stretch<STOCHASTIC, decltype(type)>(x + at, smaller(CHUNK, count - at), at, exponent, format, seed,
                                                         out + 1 + at / 8 * format.bits);
            });
        });
        return;
    }
    shape = joined(shape, format);
    Parts parts = parts_of(shape, format);
    for (int p = 0; p < parts.count; p++) {
        const Part& part = parts.part[p];
        if (shape.after > 1) {
            for_each(shape.before * part.boxes, threads, [&](int64_t row_of_boxes) {
                pack_row_of_boxes<STOCHASTIC>(x, out, shape, part, row_of_boxes, format, seed);
            });
            continue;
        }
        with_code_type(format.bits, [&](auto type) {
            using T = decltype(type);
            for_runs(shape, part, threads, [&](int64_t first, int64_t box, int64_t boxes) {
                uint8_t *exponents = out + part.exponents + box, *codes = out + part.codes + box * part.box_bytes;
                if (part.n == 16) return pack_sixteens<STOCHASTIC, T>(x + first, boxes, first, format, seed, exponents, codes);
                for (int64_t i = 0; i < boxes; i++) {
                    int64_t at = first + i * part.n;
                    U exponent = box_exponent(largest<true>(x + at, stretch(part.n, at)), format);
                    exponents[i] = (uint8_t)exponent[0];
                    pack_stretch<STOCHASTIC, T>(x + at, part.n, at, exponent, format, seed, codes + i * part.box_bytes);
                }
            });
        });
    }
}

template <class Out>
void unpack(const uint8_t* data, Out* out, Shape shape, const Format& format, int threads) {
    if (!format.box_size) {
        int64_t count = shape.before * shape.length * shape.after, runs = (count + CHUNK - 1) / CHUNK;
        with_code_type(format.bits, [&](auto type) {
            for_each(runs, threads, [&](int64_t run) {
                int64_t at = run * CHUNK;
                unpack_stretch<decltype(type)>(data + 1 + at / 8 * format.bits, smaller(CHUNK, count - at),
                                               all((uint32_t)data[0]), format, out + at);
            });
        });
        return;
    }
    shape = joined(shape, format);
    Parts parts = parts_of(shape, format);
    for (int p = 0; p < parts.count; p++) {
        const Part& part = parts.part[p];
        const uint8_t *exponents = data + part.exponents, *codes = data + part.codes;
        if (shape.after > 1) {
            for_each(shape.before * part.boxes, threads, [&](int64_t row_of_boxes) {
                for_tiles(shape, part, row_of_boxes, [&](const Tile& tile, int64_t at, int64_t box) {
                    U exponent = load_integers(exponents + box, tile.values);
                    unpack_columns(codes + box * part.box_bytes, tile, exponent, format, out + at);
                });
            });
            continue;
        }
        with_code_type(format.bits, [&](auto type) {
            using T = decltype(type);
            for_runs(shape, part, threads, [&](int64_t first, int64_t box, int64_t boxes) {
                const uint8_t* from = codes + box * part.box_bytes;
                if (part.n == 16) return unpack_sixteens<T>(exponents + box, from, boxes, format, out + first);
                for (int64_t i = 0; i < boxes; i++)
                    unpack_stretch<T>(from + i * part.box_bytes, part.n, all((uint32_t)exponents[box + i]), format,
                                      out + first + i * part.n);
            });
        });
    }
}

// x as (before, length, after) once for two readers: the operand has its boxes along `after`, the stash along
// `length`. A row of the stash's boxes is quantized for the operand first and packed while it is in the cache.
template <bool STOCHASTIC, class Out>
void quantize_and_pack(const float* x, Out* operand, uint8_t* stash, Shape shape, const Format& operand_format,
                       uint64_t operand_seed, const Format& stash_format, uint64_t stash_seed, int threads) {
    Parts parts = parts_of(shape, stash_format);
    for (int p = 0; p < parts.count; p++) {
        const Part& part = parts.part[p];
        for_each(shape.before * part.boxes, threads, [&](int64_t row_of_boxes) {
            int64_t fibre = row_of_boxes / part.boxes, box = row_of_boxes % part.boxes;
            int64_t first = (fibre * shape.length + part.start + box * part.n) * shape.after;
            quantize_fibres<STOCHASTIC>(x, operand, first, {part.n, shape.after, 1}, operand_format, operand_seed, 1);
            pack_row_of_boxes<STOCHASTIC>(x, stash, shape, part, row_of_boxes, stash_format, stash_seed);
        });
    }
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
