// Dropout whose mask is a function of a seed, and masks of one bit per value: kernels/masks.py, bit for bit. Compiled
// once per instruction set.

#include "bits.h"
#include "encode.h"
#include "names.h"

namespace {

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
