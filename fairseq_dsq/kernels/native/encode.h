// The codes of a format and their scales, a vector at a time. Values of a box share a biased exponent e (float32's own;
// 255 marks a box with Inf or NaN):
//
//   code  = clamp(round(x * 2^(bits - 2 + 127 - e)))       value = code * 2^(e - (bits - 2 + 127))
//
// fairseq_dsq/formats/scaled_integer.py is the definition.
#pragma once

#include "loops.h"

extern "C" {
// fairseq_dsq.formats.KernelSpec, which says what each field means.
struct DsqFormat {
    int32_t bits;
    int32_t signed_zero;
    int64_t box_size;
    int32_t fixed_exponent;
    float min_code, max_code;
    uint32_t headroom;
};
}

namespace {

using Format = DsqFormat;
constexpr int BIAS = 127;
constexpr uint32_t NAN_EXPONENT = 255;
constexpr uint32_t SIGN = 0x80000000u;

// ---- Scales

// A power of two as the product of two, so that neither over- nor underflows.
struct Scale {
    F first, second;
};

INLINE F times(F x, Scale scale) { return x * scale.first * scale.second; }

// The scales of a run's or tile's boxes.
struct Scales {
    alignas(64) float first[BOXES], second[BOXES];

    INLINE Scale of_box(int64_t box) const { return {all(first[box]), all(second[box])}; }
    INLINE Scale of_columns(int64_t column) const { return {load<F>(first + column), load<F>(second + column)}; }
};

using Exponents = uint32_t[BOXES];

INLINE F power_of_two(I exponent) { return bits<F>((exponent + BIAS) << 23); }

// The biased exponent of boxes, given the magnitude bits of their largest values: floor(log2) of these, or what the
// format makes of it.
INLINE U exponent_of(U largest) { return max(largest >> 23, all(1u)); }
INLINE U exponent_of(U largest, Format format) {
    U exponent = largest >> 23, raised = (largest + format.headroom) >> 23;
    raised += (U)(raised == NAN_EXPONENT);  // a comparison is -1: float32's largest exponent stays
    if (format.fixed_exponent) raised = all((uint32_t)format.fixed_exponent);
    return choose((I)(exponent == NAN_EXPONENT), exponent, max(raised, all(1u)));
}

INLINE Scale encode_scale(U exponent, int width) {
    I shift = (width - 2 + BIAS) - (I)exponent, half = shift >> 1;
    return {power_of_two(half), power_of_two(shift - half)};
}

// NaN times anything is NaN: a box's mark needs no pass of its own.
INLINE F nan_where_marked(U exponent, F scale) {
    return choose((I)(exponent == NAN_EXPONENT), bits<F>(all(0x7fc00000u)), scale);
}
INLINE Scale decode_scale(U exponent, int width) {
    I shift = (I)exponent - (width - 2 + BIAS), half = shift >> 1;
    return {nan_where_marked(exponent, power_of_two(half)), power_of_two(shift - half)};
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
INLINE void fill(Scales& scales, const Exponents& exponents, int64_t boxes, int width, ScaleOf scale_of) {
    for (int64_t i = 0; i < boxes; i += LANES) {
        Scale scale = scale_of(load<U>(exponents + i), width);
        store(scales.first + i, scale.first);
        store(scales.second + i, scale.second);
    }
}

// ---- Rounding

INLINE U mix(U h) {
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = (h ^ (h >> 15)) * 0x846ca68bu;
    return h ^ (h >> 16);
}
// Uniform integers of an element below 2^32: definition.random_bits is the definition.
INLINE U random_bits(U index, uint64_t seed) {
    return mix(mix(index + (uint32_t)seed) ^ (uint32_t)(seed >> 32));
}
// The noise of an element: uniform multiples of 2^-24 in [0, 1). definition.noise is the definition.
INLINE F noise(U index, uint64_t seed) {
    return __builtin_convertvector((I)(random_bits(index, seed) >> 8), F) * 0x1p-24f;
}

// Codes, as float. `index` is the first lane's place in the tensor.
template <bool STOCHASTIC>
INLINE F encode(F x, Scale scale, Format format, uint32_t index, uint64_t seed) {
    F code = times(x, scale);
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

// Codes as they are stored: sign and magnitude, or two's complement.
INLINE U to_field(F code, Format format) {
    code = bits<F>(bits<U>(code) & bits<U>((I)(code == code)));  // a NaN is stored as 0
    if (!format.signed_zero) return (U) __builtin_convertvector(code, I) & (~0u >> (32 - format.bits));
    U sign = bits<U>(code) & SIGN;
    return (U) __builtin_convertvector(bits<F>(bits<U>(code) ^ sign), I) | sign >> (32 - format.bits);
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

INLINE U magnitude(const float* x, int64_t count = LANES) { return load<U>(x, count) & ~SIGN; }

}  // namespace
