// Rows of 8-bit codes under a float32 scale: int8/row and log8/row, packed and unpacked. Compiled once per instruction
// set; formats/integer.py and formats/logarithmic.py are the definition, bit for bit.
//
// Layout: the scales of all rows, then all codes. value = elements[code] * scale.

#include "encode.h"
#include "names.h"

namespace {

constexpr uint32_t INFINITE = 0x7f800000u;

// The bits of a row's largest magnitude; Inf's for a row with a negative value, where there must be none.
INLINE uint32_t largest_of(const float* x, int64_t length, bool negatives) {
    U largest{}, below_zero{};
    for (int64_t at = 0; at < length; at += LANES) {
        largest = max(largest, magnitude(x + at, smaller(length - at, LANES)));
        below_zero |= bits<U>((I)(load<F>(x + at, length - at) < 0.0f));
    }
    return negatives || !largest_lane(below_zero) ? largest_lane(largest) : INFINITE;
}

// NaN stands for a row that cannot be encoded.
INLINE float scale_of(uint32_t largest, float divisor) {
    float value;
    memcpy(&value, &largest, sizeof value);
    return largest < INFINITE ? value / divisor : __builtin_nanf("");
}

template <bool STOCHASTIC>
void encode_int8(const float* x, uint8_t* codes, int64_t length, float scale, uint32_t index, uint64_t seed) {
    for (int64_t at = 0; at < length; at += LANES) {
        F code = load<F>(x + at, length - at) / scale;
        if (STOCHASTIC) {
            F below = floor(code);
            I up = noise(lane_numbers() + (index + (uint32_t)at), seed) < code - below;
            code = below + bits<F>(bits<U>(up) & bits<U>(all(1.0f)));
        } else {
            code = round_even(code);
        }
        code = min(all(127.0f), max(all(-127.0f), code));
        store_integers(codes + at, (U) __builtin_convertvector(code, I) & 0xff, length - at);
    }
}

// elements: of log8, rising. starts: the element at or below the smallest float of a bucket of 2^shift, of which the
// first has the number `base`; a bucket holds one element at most.
struct Search {
    const float* elements;
    const uint8_t* starts;
    int32_t shift, base;
};

template <bool STOCHASTIC>
void encode_log8(const float* x, uint8_t* codes, int64_t length, float scale, uint32_t index, uint64_t seed,
                 Search search) {
    for (int64_t start = 0; start < length; start += CHUNK) {
        int64_t count = smaller(CHUNK, length - start);
        alignas(64) float values[CHUNK], random[CHUNK];
        alignas(64) int32_t buckets[CHUNK];
        for (int64_t at = 0; at < count; at += LANES) {
            F value = load<F>(x + start + at, count - at) / scale;
            I bucket = (I)((bits<U>(value) & ~SIGN) >> search.shift) - search.base;
            store(values + at, value);
            store(buckets + at, (I)choose((I)(bucket > 0), (U)bucket, U{}));
            store(random + at, STOCHASTIC ? noise(lane_numbers() + (index + (uint32_t)(start + at)), seed) : all(0.5f));
        }
        for (int64_t at = 0; at < count; at++) {
            int32_t below = search.starts[buckets[at]];
            below += (below < 254) & (values[at] >= search.elements[below + 1]);
            float lower = search.elements[below], upper = search.elements[below + 1];
            float share = (values[at] - lower) / (upper - lower);
            codes[start + at] = (uint8_t)(255 - below - (STOCHASTIC ? random[at] < share : 0.5f <= share));
        }
    }
}

template <class Encode>
void pack(const float* x, uint8_t* out, int64_t rows, int64_t length, bool negatives, float divisor, int threads,
          Encode encode) {
    for_each(rows, threads, [&](int64_t row) {
        const float* from = x + row * length;
        uint8_t* codes = out + rows * sizeof(float) + row * length;
        float scale = scale_of(largest_of(from, length, negatives), divisor);
        memcpy(out + row * sizeof(float), &scale, sizeof scale);
        if (scale > 0)
            encode(from, codes, scale, (uint32_t)(row * length));
        else
            memset(codes, 0, length);
    });
}

void unpack(const uint8_t* data, float* out, int64_t rows, int64_t length, const float* elements, int threads) {
    for_each(rows, threads, [&](int64_t row) {
        const uint8_t* codes = data + rows * sizeof(float) + row * length;
        float scale;
        memcpy(&scale, data + row * sizeof(float), sizeof scale);
        for (int64_t at = 0; at < length; at++) out[row * length + at] = elements[codes[at]] * scale;
    });
}

}  // namespace

EXPORT void DSQ_NAME(pack_int8)(const float* x, uint8_t* out, int64_t rows, int64_t length, int32_t stochastic,
                                uint64_t seed, int32_t threads) {
    auto encode = stochastic ? encode_int8<true> : encode_int8<false>;
    pack(x, out, rows, length, true, 127.0f, threads, [&](auto from, auto codes, float scale, uint32_t index) {
        encode(from, codes, length, scale, index, seed);
    });
}

EXPORT void DSQ_NAME(pack_log8)(const float* x, uint8_t* out, int64_t rows, int64_t length, const float* elements,
                                const uint8_t* starts, int32_t shift, int32_t base, int32_t stochastic, uint64_t seed,
                                int32_t threads) {
    auto encode = stochastic ? encode_log8<true> : encode_log8<false>;
    pack(x, out, rows, length, false, 1.0f, threads, [&](auto from, auto codes, float scale, uint32_t index) {
        encode(from, codes, length, scale, index, seed, {elements, starts, shift, base});
    });
}

EXPORT void DSQ_NAME(unpack_bytes)(const uint8_t* data, float* out, int64_t rows, int64_t length,
                                   const float* elements, int32_t threads) {
    unpack(data, out, rows, length, elements, threads);
}
