// int8/row and log8/row, packed and unpacked. Compiled once per instruction set.

#include "names.h"
#include "rows.h"

namespace {

template <class Seen>
uint32_t largest_of(const float* x, int64_t length) {
    Seen largest;
    for (int64_t at = 0; at < length; at += LANES) largest.see(load<F>(x + at, length - at));
    return largest.found();
}

// encode(values in units of the scale, code of the first, how many, their places)
template <class Seen, class Encode>
void pack(const float* x, Rows out, float divisor, int threads, Encode encode) {
    for_each(out.rows, threads, [&](int64_t row) {
        const float* from = x + row * out.length;
        uint8_t* codes = out.codes(row);
        float scale = scale_of(largest_of<Seen>(from, out.length), divisor);
        out.set_scale(row, scale);
        if (!(scale > 0)) {
            memset(codes, 0, out.length);
            return;
        }
        for (int64_t at = 0; at < out.length; at += LANES) {
            int64_t count = out.length - at;
            encode(load<F>(from + at, count) / scale, codes + at, count,
                   lane_numbers() + (uint32_t)(row * out.length + at));
        }
    });
}

template <bool STOCHASTIC>
void pack_int8(const float* x, Rows out, uint64_t seed, int threads) {
    pack<Largest>(x, out, LARGEST_INT8, threads, [&](F value, uint8_t* codes, int64_t count, U place) {
        store_int8(codes, int8_element<STOCHASTIC>(value, place, seed), count);
    });
}

template <bool STOCHASTIC>
void pack_log8(const float* x, Rows out, const Log8* log8, uint64_t seed, int threads) {
    pack<LargestPositive>(x, out, 1.0f, threads, [&](F value, uint8_t* codes, int64_t count, U place) {
        store_log8(codes, round_to_log8<STOCHASTIC>(value, *log8, place, seed), count);
    });
}

}  // namespace

EXPORT void DSQ_NAME(pack_int8)(const float* x, uint8_t* out, int64_t rows, int64_t length, int32_t stochastic,
                                uint64_t seed, int32_t threads) {
    (stochastic ? pack_int8<true> : pack_int8<false>)(x, {out, rows, length}, seed, threads);
}

EXPORT void DSQ_NAME(pack_log8)(const float* x, uint8_t* out, int64_t rows, int64_t length, const Log8* log8,
                                int32_t stochastic, uint64_t seed, int32_t threads) {
    (stochastic ? pack_log8<true> : pack_log8<false>)(x, {out, rows, length}, log8, seed, threads);
}

// elements: of every byte.
EXPORT void DSQ_NAME(unpack_bytes)(uint8_t* data, float* out, int64_t rows, int64_t length, const float* elements,
                                   int32_t threads) {
    Rows held{data, rows, length};
    for_each(rows, threads, [&](int64_t row) {
        const uint8_t* codes = held.codes(row);
        float scale = held.scale(row);
        for (int64_t at = 0; at < length; at++) out[row * length + at] = elements[codes[at]] * scale;
    });
}
