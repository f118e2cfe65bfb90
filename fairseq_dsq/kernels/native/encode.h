// The codes of a format and their scales, a vector at a time. Values of a box share a biased exponent e (float32's own;
// 255 marks a box with Inf or NaN):
//
//   code  = clamp(round(x * 2^(fraction_bits + 127 - e)))       value = code * 2^(e - (fraction_bits + 127))
//
// Codes are integers, with bits - 2 fraction bits, or minifloats, with none: those round on a grid whose step depends
// on the value's exponent. fairseq_dsq/formats/scaled_integer.py and minifloat.py are the definition. NVFP4's scales are
// minifloats too, under one number for the tensor: formats/nvfp4.py.
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
    int32_t exponent_bits;
    uint32_t element_exponent, least_exponent;
    int32_t scale;
    // Of a call, where scales are E4M3: the scale of the tensor, and whether values go without it.
    float tensor_scale;
    int32_t elements;
};
}

namespace {

constexpr int BIAS = 127;
constexpr uint32_t NAN_EXPONENT = 255;
constexpr uint32_t SIGN = 0x80000000u, EXPONENT = 0x7f800000u, ONE_EXPONENT = 0x00800000u;

// A format by the kind of its elements: kernels are compiled for each.
struct Integers : DsqFormat {
    int fraction_bits() const { return bits - 2; }
};

struct Minifloats : DsqFormat {
    int mantissa_bits, unused_bits;  // of a code; of a float32's mantissa
    uint32_t least;                  // the bits of the smallest normal number, a float32

    explicit Minifloats(const DsqFormat& format)
        : DsqFormat(format),
          mantissa_bits(bits - 1 - exponent_bits),
          unused_bits(23 - mantissa_bits),
          least((uint32_t)(BIAS + 2 - (1 << (exponent_bits - 1))) << 23) {}
    int fraction_bits() const { return 0; }
    uint32_t to_above() const { return (uint32_t)unused_bits * ONE_EXPONENT; }
};

// NVFP4: what is stored of a box is the E4M3 code of its scale.
struct NVFP4 : Minifloats {
    static constexpr int32_t SCALE = 2;  // E4M3_SCALE of fairseq_dsq.formats
    static constexpr float MOST_OF_SCALE = 448.0f, LEAST_OF_SCALE = 0x1p-9f;
    static constexpr float LEAST_OF_TENSOR = 0x1p-110f;
    static constexpr uint32_t NAN_SCALE = 0x7f;
    Minifloats e4m3;

    explicit NVFP4(const DsqFormat& format) : Minifloats(format), e4m3(format_of_scales()) {}
    static DsqFormat format_of_scales() {
        DsqFormat format{};
        format.bits = 8;
        format.exponent_bits = 4;
        format.max_code = MOST_OF_SCALE;
        return format;
    }
    float outer_scale() const { return elements ? 1.0f : tensor_scale; }
    // The scale of the tensor lies in front of all else.
    uint8_t* put_tensor_scale(uint8_t* out) const {
        memcpy(out, &tensor_scale, sizeof tensor_scale);
        return out + sizeof tensor_scale;
    }
    const uint8_t* get_tensor_scale(const uint8_t* data) {
        memcpy(&tensor_scale, data, sizeof tensor_scale);
        return data + sizeof tensor_scale;
    }
};

// work(format) for the kind of its elements, under powers of two.
template <class Work>
INLINE void with_elements(const DsqFormat& format, Work work) {
    if (format.exponent_bits)
        work(Minifloats(format));
    else
        work(Integers{format});
}

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

// The float32 under which `largest_element` stands for a magnitude with these bits; NaN for Inf and NaN. Their product is
// finite.
INLINE float scale_of(uint32_t largest, float largest_element) {
    float value;
    memcpy(&value, &largest, sizeof value);
    if (largest >= EXPONENT) return __builtin_nanf("");
    float scale = value / largest_element;
    if (!__builtin_isinf(scale * largest_element)) return scale;
    uint32_t below;
    memcpy(&below, &scale, sizeof below);
    below--;
    memcpy(&scale, &below, sizeof scale);
    return scale;
}

INLINE F power_of_two(I exponent) { return bits<F>((exponent + BIAS) << 23); }

// The biased exponent of boxes, given the magnitude bits of their largest values: floor(log2) of these, or what the
// format makes of it.
INLINE U exponent_of(U largest) { return max(largest >> 23, all(1u)); }
INLINE U exponent_of(U largest, const DsqFormat& format) {
    U exponent = largest >> 23, raised = (largest + format.headroom) >> 23;
    raised += (U)(raised == NAN_EXPONENT);  // a comparison is -1: float32's largest exponent stays
    raised = max(raised, all(format.element_exponent + format.least_exponent)) - format.element_exponent;
    if (format.fixed_exponent) raised = all((uint32_t)format.fixed_exponent);
    return choose((I)(exponent == NAN_EXPONENT), exponent, raised);
}

INLINE Scale encode_scale(U exponent, int fraction_bits) {
    I shift = (fraction_bits + BIAS) - (I)exponent, half = shift >> 1;
    return {power_of_two(half), power_of_two(shift - half)};
}

// NaN times anything is NaN: a box's mark needs no pass of its own.
INLINE F nan_where_marked(U exponent, F scale) {
    return choose((I)(exponent == NAN_EXPONENT), bits<F>(all(0x7fc00000u)), scale);
}
INLINE Scale decode_scale(U exponent, int fraction_bits) {
    I shift = (I)exponent - (fraction_bits + BIAS), half = shift >> 1;
    return {nan_where_marked(exponent, power_of_two(half)), power_of_two(shift - half)};
}

// What values are multiplied with to be encoded, and codes to be decoded, under stored scales.
template <class Format>
INLINE Scale scale_down(U stored, const Format& format) {
    return encode_scale(stored, format.fraction_bits());
}
template <class Format>
INLINE Scale scale_up(U stored, const Format& format) {
    return decode_scale(stored, format.fraction_bits());
}

// The arrays have room for whole vectors; lanes that no box has are computed with too, and hold 0.
INLINE void clear_rest(Exponents& exponents, int64_t boxes) {
    for (; boxes % LANES; boxes++) exponents[boxes] = 0;
}
INLINE void read_exponents(const uint8_t* from, int64_t boxes, Exponents& exponents) {
    for (int64_t box = 0; box < boxes; box++) exponents[box] = from[box];
    clear_rest(exponents, boxes);
}
template <class Format>
INLINE void exponents_of(Exponents& largest, int64_t boxes, const Format& format) {
    for (int64_t i = 0; i < boxes; i += LANES) store(largest + i, exponent_of(load<U>(largest + i), format));
}
template <class ScaleOf>
INLINE void fill(Scales& scales, const Exponents& exponents, int64_t boxes, ScaleOf scale_of) {
    for (int64_t i = 0; i < boxes; i += LANES) {
        Scale scale = scale_of(load<U>(exponents + i));
        store(scales.first + i, scale.first);
        store(scales.second + i, scale.second);
    }
}
template <class Format>
INLINE void fill_down(Scales& scales, const Exponents& exponents, int64_t boxes, const Format& format) {
    fill(scales, exponents, boxes, [&](U stored) __attribute__((always_inline)) { return scale_down(stored, format); });
}
template <class Format>
INLINE void fill_up(Scales& scales, const Exponents& exponents, int64_t boxes, const Format& format) {
    fill(scales, exponents, boxes, [&](U stored) __attribute__((always_inline)) { return scale_up(stored, format); });
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
INLINE F encode(F x, Scale scale, Integers format, uint32_t index, uint64_t seed) {
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

// The grid that magnitudes up to `limit` are rounded on. `above` are the bits of a float32 so far above them that a
// step of the grid is its last bit: a sum with it rounds to a whole number of steps. Of minifloats, whose steps grow
// with the values, it is that of the smallest.
struct Grid {
    F limit;
    U above;
};

// A magnitude before it is rounded, and what is above it.
struct Unrounded {
    F magnitude, above;
    U sign;

    INLINE Unrounded(F value, Grid grid, const Integers&) {
        clip(value, grid.limit);
        above = bits<F>(grid.above);
    }
    INLINE Unrounded(F value, Grid grid, const Minifloats& format) {
        clip(value, grid.limit);
        above = bits<F>(max((bits<U>(magnitude) & EXPONENT) + format.to_above(), grid.above));
    }
    INLINE void clip(F value, F limit) {
        sign = bits<U>(value) & SIGN;
        magnitude = min(limit, bits<F>(bits<U>(value) & ~SIGN));  // a NaN stays
    }
    INLINE F rounded() const { return bits<F>(bits<U>((magnitude + above) - above) | sign); }
    // The code as it is stored, sign and magnitude.
    INLINE U field(Grid, const Integers& format) const { return steps() | sign >> (32 - format.bits); }
    INLINE U field(Grid grid, const Minifloats& format) const {
        return (steps() + ((bits<U>(above) - grid.above) >> format.unused_bits)) | sign >> (32 - format.bits);
    }
    INLINE U steps() const { return bits<U>(magnitude + above) - bits<U>(above); }
};

// Of codes that are minifloats.
INLINE Grid grid_of_codes(const Minifloats& format) {
    return {all(format.max_code), all(format.least + format.to_above())};
}

// Of values: nothing has to be scaled to be rounded to nearest. Boxes of exponents LEAST to MOST have one, all of whose
// numbers are normal, and boxes of zeros; not in two's complement, whose zero has no sign.
constexpr uint32_t LEAST_OF_GRID = 32, MOST_OF_GRID = 192;
INLINE bool has_grid(const Integers& format) {
    return format.signed_zero && format.bits <= 24 && format.min_code == -format.max_code;
}
INLINE bool has_grid(const Minifloats&) { return true; }
INLINE bool has_grid(const NVFP4&) { return false; }
INLINE I off_grid(U largest, U exponent) {
    return (I)((exponent - LEAST_OF_GRID > MOST_OF_GRID - LEAST_OF_GRID) & (U)(largest != 0));
}
INLINE Grid grid_of(U exponent, const Integers& format) {
    exponent = max(exponent, all(LEAST_OF_GRID));
    return {times(all(format.max_code), decode_scale(exponent, format.fraction_bits())),
            (exponent + (uint32_t)(23 - format.fraction_bits())) << 23};
}
INLINE Grid grid_of(U exponent, const Minifloats& format) {
    exponent = max(exponent, all(LEAST_OF_GRID));
    Grid codes = grid_of_codes(format);
    return {times(codes.limit, decode_scale(exponent, 0)), codes.above + ((exponent - (uint32_t)BIAS) << 23)};
}

template <bool STOCHASTIC>
INLINE F encode(F x, Scale scale, Minifloats format, uint32_t index, uint64_t seed) {
    Unrounded value(times(x, scale), grid_of_codes(format), format);
    if (!STOCHASTIC) return value.rounded();
    U exponent = bits<U>(value.above) - format.to_above();
    F steps = bits<F>((uint32_t)(2 * BIAS + format.mantissa_bits) * ONE_EXPONENT - exponent);
    F code = bits<F>(bits<U>(value.magnitude * steps) | value.sign), below = floor(code);
    I up = noise(lane_numbers() + index, seed) < code - below;
    code = below + bits<F>(bits<U>(up) & bits<U>(all(1.0f)));
    F step = bits<F>(exponent - (uint32_t)format.mantissa_bits * ONE_EXPONENT);
    return bits<F>((bits<U>(code * step) & ~SIGN) | value.sign);
}

// Codes as they are stored: sign and magnitude, or two's complement.
INLINE U to_field(F code, Integers format) {
    code = bits<F>(bits<U>(code) & bits<U>((I)(code == code)));  // a NaN is stored as 0
    if (!format.signed_zero) return (U) __builtin_convertvector(code, I) & (~0u >> (32 - format.bits));
    U sign = bits<U>(code) & SIGN;
    return (U) __builtin_convertvector(bits<F>(bits<U>(code) ^ sign), I) | sign >> (32 - format.bits);
}

INLINE U to_field(F code, Minifloats format) {
    code = bits<F>(bits<U>(code) & bits<U>((I)(code == code)));  // a NaN is stored as 0
    U sign = bits<U>(code) & SIGN, magnitude = bits<U>(code) ^ sign, least = all(format.least);
    // With the smallest normal number added, a subnormal one has its mantissa where it belongs, and no exponent.
    U subnormal = bits<U>(bits<F>(magnitude) + bits<F>(least));
    U code_bits = choose((I)(magnitude < least), subnormal, magnitude + ONE_EXPONENT) - least;
    return code_bits >> format.unused_bits | sign >> (32 - format.bits);
}

INLINE F from_field(U field, Integers format) {
    U top = field << (32 - format.bits);
    if (!format.signed_zero) return __builtin_convertvector((I)top >> (32 - format.bits), F);
    U magnitude = (top & ~SIGN) >> (32 - format.bits);
    return bits<F>(bits<U>(__builtin_convertvector((I)magnitude, F)) | (top & SIGN));
}

INLINE F from_field(U field, Minifloats format) {
    U top = field << (32 - format.bits), sign = top & SIGN, magnitude = (top ^ sign) >> (8 - format.exponent_bits);
    // A subnormal number is a normal one of the smallest exponent, without its leading one.
    U subnormal = (U)((I)magnitude < (int32_t)ONE_EXPONENT), base = all(format.least - ONE_EXPONENT);
    F value = bits<F>(magnitude + base + (subnormal & ONE_EXPONENT)) - bits<F>(subnormal & format.least);
    U special = bits<U>((I)(value > format.max_code)) & EXPONENT;  // Inf where the mantissa is zero, else NaN
    return bits<F>(bits<U>(value) | special | sign);
}

// Values to codes as they are stored.
template <bool STOCHASTIC>
INLINE U encode_field(F x, Scale scale, Integers format, uint32_t index, uint64_t seed) {
    return to_field(encode<STOCHASTIC>(x, scale, format, index, seed), format);
}
template <bool STOCHASTIC>
INLINE U encode_field(F x, Scale scale, Minifloats format, uint32_t index, uint64_t seed) {
    if (STOCHASTIC) return to_field(encode<true>(x, scale, format, index, seed), format);
    F value = times(x, scale);
    Grid grid = grid_of_codes(format);
    value = bits<F>(bits<U>(value) & bits<U>((I)(value == value)));  // a NaN is stored as 0
    return Unrounded(value, grid, format).field(grid, format);
}

// NVFP4's scales; two-phase lookup finds these overloads where a format is a template's parameter.
INLINE U exponent_of(U largest, const NVFP4& format) {
    F scale = bits<F>(largest) / all(format.max_code) / all(format.tensor_scale);
    scale = max(all(NVFP4::LEAST_OF_SCALE), min(all(NVFP4::MOST_OF_SCALE), scale));
    U code = Unrounded(scale, grid_of_codes(format.e4m3), format.e4m3).field(grid_of_codes(format.e4m3), format.e4m3);
    return choose((I)(largest < EXPONENT), code, all(NVFP4::NAN_SCALE));
}
INLINE Scale scale_down(U stored, const NVFP4& format) {
    return {all(1.0f / format.tensor_scale) / from_field(stored, format.e4m3), all(1.0f)};
}
INLINE Scale scale_up(U stored, const NVFP4& format) {
    return {from_field(stored, format.e4m3), all(format.outer_scale())};
}

INLINE void put(float* to, F value, int64_t count) { store(to, value, count); }
// bfloat16 is float32's upper half; exact for formats of up to 9 bits.
INLINE void put(uint16_t* to, F value, int64_t count) { store_integers(to, bits<U>(value) >> 16, count); }

INLINE U magnitude(const float* x, int64_t count = LANES) { return load<U>(x, count) & ~SIGN; }

}  // namespace
