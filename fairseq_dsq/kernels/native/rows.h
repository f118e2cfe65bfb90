// Rows of 8-bit codes under a float32 scale, a vector at a time: int8/row and log8/row. formats/integer.py and
// formats/logarithmic.py are the definition, bit for bit.
//
// Layout of a matrix: the scales of all rows, then all codes. value = element * scale.
#pragma once

#include "encode.h"

namespace {

constexpr uint32_t INFINITE = 0x7f800000u;

// A packed matrix.
struct Rows {
    uint8_t* data;
    int64_t rows, length;

    INLINE uint8_t* codes(int64_t row) const { return data + rows * sizeof(float) + row * length; }
    INLINE float scale(int64_t row) const {
        float scale;
        memcpy(&scale, data + row * sizeof scale, sizeof scale);
        return scale;
    }
    INLINE void set_scale(int64_t row, float scale) const { memcpy(data + row * sizeof scale, &scale, sizeof scale); }
};

INLINE F one_where(I condition) { return bits<F>(bits<U>(condition) & bits<U>(all(1.0f))); }

// ---- int8

constexpr float LARGEST_INT8 = 127.0f;

// The bits of a row's largest magnitude.
struct Largest {
    U magnitudes{};

    INLINE void see(F values) { magnitudes = max(magnitudes, bits<U>(values) & ~SIGN); }
    INLINE uint32_t found() const { return largest_lane(magnitudes); }
};

// The element of a value in units of its row's scale; `place` is its place in the matrix.
template <bool STOCHASTIC>
INLINE F int8_element(F value, U place, uint64_t seed) {
    F element;
    if (STOCHASTIC) {
        F below = floor(value);
        I up = noise(place, seed) < value - below;
        element = below + one_where(up);
    } else {
        element = round_even(value);
    }
    return min(all(LARGEST_INT8), max(all(-LARGEST_INT8), element));
}

INLINE F load_int8(const uint8_t* codes, int64_t count) {
    return __builtin_convertvector((I)(load_integers(codes, count) << 24) >> 24, F);
}
INLINE void store_int8(uint8_t* codes, F elements, int64_t count) {
    store_integers(codes, (U) __builtin_convertvector(elements, I) & 0xff, count);
}

// ---- log8

// As Largest; Inf's bits of a row with a negative value, where there must be none.
struct LargestPositive {
    U magnitudes{}, below_zero{};

    INLINE void see(F values) {
        magnitudes = max(magnitudes, bits<U>(values) & ~SIGN);
        below_zero |= bits<U>((I)(values < 0.0f));
    }
    INLINE uint32_t found() const { return largest_lane(below_zero) ? INFINITE : largest_lane(magnitudes); }
};

// log8's elements, rising; code k stands for element 255 - k. Also factors of them, which a vector looks up faster than
// 256 numbers: element i = coarse[i / 16] * fine[i % 16], each the sum of two floats. native/__init__.py fills them.
struct Log8 {
    float elements[256];
    float coarse[2][16], fine[2][18];
};
constexpr int LAST_ELEMENT = 255;
constexpr float ELEMENTS_PER_OCTAVE = 255 / 32.0f;
constexpr uint32_t SMALLEST_ELEMENT = (uint32_t)(BIAS - 32) << 23;  // its bits

// The elements from number `i` on.
struct Elements {
    const Log8& log8;
    U i;
#if defined(LOOKUP16)
    F coarse, coarse_rest;

    INLINE Elements(const Log8& log8, U i)
        : log8(log8), i(i), coarse(lookup16(log8.coarse[0], i >> 4)), coarse_rest(lookup16(log8.coarse[1], i >> 4)) {}

    // The product is off by some 2^-46, and rounded to a float is the element.
    INLINE F at(int further) const {
        F fine = lookup16(log8.fine[0] + further, i), fine_rest = lookup16(log8.fine[1] + further, i);
        return multiply_add(coarse, fine, multiply_add(coarse, fine_rest, coarse_rest * fine));
    }
#else
    INLINE Elements(const Log8& log8, U i) : log8(log8), i(i) {}

    INLINE F at(int further) const {
        F found;
        for (int lane = 0; lane < LANES; lane++) found[lane] = log8.elements[i[lane] + further];
        return found;
    }
#endif
};

INLINE F load_log8(const uint8_t* codes, const Log8& log8, int64_t count) {
    return Elements(log8, LAST_ELEMENT - load_integers(codes, count)).at(0);
}
INLINE void store_log8(uint8_t* codes, U elements, int64_t count) {
    store_integers(codes, LAST_ELEMENT - elements, count);
}

// Which elements stand for values in units of their row's scale; `value` becomes the elements.
template <bool STOCHASTIC>
INLINE U round_to_log8(F& value, const Log8& log8, U place, uint64_t seed) {
    // A float's bits, seen as an integer, rise with its logarithm and at most 0.087 octaves behind it: the largest
    // element that is not above the value is the one found here or the next.
    I size = (I)(bits<U>(value) & ~SIGN) - (I)all(SMALLEST_ELEMENT);
    F number = __builtin_convertvector(size, F) * (ELEMENTS_PER_OCTAVE * 0x1p-23f);
    number = min(max(number, F{}), all(LAST_ELEMENT - 2.0f));
    U below = (U) __builtin_convertvector(number, I);
    Elements elements(log8, below);
    F next = elements.at(1);
    I further = (I)(value >= next);
    F lower = choose(further, next, elements.at(0)), upper = choose(further, elements.at(2), next);
    F share = (value - lower) / (upper - lower);
    I up = STOCHASTIC ? (I)(noise(place, seed) < share) : (I)(share >= 0.5f);
    value = choose(up, upper, lower);
    return below - (U)(further + up);  // a comparison is -1
}

}  // namespace
