// A vector of LANES float32 numbers, written once in the vector extension of GCC and Clang and compiled per
// instruction set. Operators work lane by lane; comparisons give lanes of all ones or zeros.
//
//   F, U, I    LANES of float, uint32_t, int32_t; bits<V>(v) looks at the same bits as another of them
//   load/store of `count` lanes (fewer than LANES at the edge of a tensor; lanes beyond read as zero)
//
// Everything here has internal linkage: the same name means other instructions in another translation unit.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

template <class T>
struct Vector {
    typedef T type __attribute__((vector_size(LANES * sizeof(T))));
};
using F = Vector<float>::type;
using U = Vector<uint32_t>::type;
using I = Vector<int32_t>::type;

#define INLINE inline __attribute__((always_inline))

template <class V, class W>
INLINE V bits(W w) {
    static_assert(sizeof(V) == sizeof(W), "as many bits");
    V v;
    memcpy(&v, &w, sizeof v);
    return v;
}

INLINE F all(float a) { return a - F{}; }  // minus: a + 0 would lose the sign of -0
INLINE U all(uint32_t a) { return a + U{}; }
INLINE I all(int32_t a) { return a + I{}; }

INLINE U lane_numbers() {
    U v;
    for (int lane = 0; lane < LANES; lane++) v[lane] = lane;
    return v;
}

INLINE U choose(I condition, U yes, U no) {
    U mask = bits<U>(condition);
    return (yes & mask) | (no & ~mask);
}
INLINE F choose(I condition, F yes, F no) { return bits<F>(choose(condition, bits<U>(yes), bits<U>(no))); }

// min and max give b where the two compare equal or one is NaN.
#if defined(__AVX512F__)
INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
INLINE U max(U a, U b) { return (U)_mm512_max_epu32((__m512i)a, (__m512i)b); }
INLINE F round_even(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif defined(__AVX2__)
INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
INLINE U max(U a, U b) { return (U)_mm256_max_epu32((__m256i)a, (__m256i)b); }
INLINE F round_even(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
INLINE F min(F a, F b) { return choose(a < b, a, b); }
INLINE F max(F a, F b) { return choose(a > b, a, b); }
INLINE U max(U a, U b) { return choose((I)(a > b), a, b); }
INLINE F round_even(F v) {
    // Between 2^23 and 2^24 float32 holds integers alone, and the addition rounds to them.
    U sign = bits<U>(v) & 0x80000000u;
    F magnitude = bits<F>(bits<U>(v) ^ sign);
    F rounded = (magnitude + 0x1p23f) - 0x1p23f;
    rounded = choose((I)(magnitude < 0x1p23f), rounded, magnitude);
    return bits<F>(bits<U>(rounded) | sign);
}
#endif

#if defined(__AVX512F__)
INLINE F square_root(F v) { return _mm512_sqrt_ps(v); }
INLINE F multiply_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__) && defined(__FMA__)
INLINE F square_root(F v) { return _mm256_sqrt_ps(v); }
INLINE F multiply_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
#else
INLINE F square_root(F v) {
    for (int lane = 0; lane < LANES; lane++) v[lane] = __builtin_sqrtf(v[lane]);
    return v;
}
// a * b + c, rounded once; the C library's where the instruction set has none.
INLINE F multiply_add(F a, F b, F c) {
    for (int lane = 0; lane < LANES; lane++) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return c;
}
#endif

#if defined(__AVX512F__)
INLINE F floor(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
// The whole part of numbers from 0 to 2^32.
INLINE U whole_part(F v) { return (U)_mm512_cvttps_epu32(v); }
#else
#if defined(__AVX2__)
INLINE F floor(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
#else
INLINE F floor(F v) {
    F rounded = round_even(v);
    return rounded - bits<F>(bits<U>((I)(rounded > v)) & bits<U>(all(1.0f)));
}
#endif
INLINE U whole_part(F v) {  // 16 bits at a time
    F upper = floor(v * 0x1p-16f);
    return (U) __builtin_convertvector(upper, I) << 16 | (U) __builtin_convertvector(v - upper * 0x1p16f, I);
}
#endif

#if defined(__clang__)
#define SHUFFLE2(a, b, mask) shuffle_lanes(a, b, mask)
INLINE U shuffle_lanes(U a, U b, U mask) {
    U v;
    for (int lane = 0; lane < LANES; lane++) v[lane] = mask[lane] < LANES ? a[mask[lane]] : b[mask[lane] - LANES];
    return v;
}
#else
#define SHUFFLE2(a, b, mask) __builtin_shuffle(a, b, mask)
#endif

INLINE uint32_t largest_lane(U v) {
    uint32_t found = 0;
    for (int lane = 0; lane < LANES; lane++) found = v[lane] > found ? v[lane] : found;
    return found;
}

// Whether a comparison holds in any lane.
INLINE bool any(I condition) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)condition, (__m512i)condition) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)condition) != 0;
#else
    int32_t found = 0;
    for (int lane = 0; lane < LANES; lane++) found |= condition[lane];
    return found != 0;
#endif
}

// The largest lane of v[0], of v[1], ...: each round halves the lanes that a vector's maximum is spread over.
INLINE U largest_of_each(U (&v)[LANES]) {
    U lane = lane_numbers();
#pragma GCC unroll 4
    for (uint32_t step = LANES / 2; step; step /= 2) {
        U half = lane & step;  // lanes with this bit: for v[k + step], the others for v[k]
        U here = lane + choose((I)(half != 0), all((uint32_t)LANES), all(0u)), there = here ^ step;
#pragma GCC unroll 8
        for (uint32_t k = 0; k < step; k++) {
            U a = v[k], b = v[k + step];
            v[k] = max(SHUFFLE2(a, b, here), SHUFFLE2(a, b, there));
        }
    }
    return v[0];
}

// K vectors, lane after lane: v[0][0], v[1][0], ... v[K-1][0], v[0][1], ...; K a power of two.
template <int K>
INLINE void interleave(U (&v)[K]) {
    U lane = lane_numbers(), low = (lane >> 1) + (lane & 1) * LANES, high = low + LANES / 2;
#pragma GCC unroll 4
    for (int round = 1; round < K; round *= 2) {
        U w[K];
#pragma GCC unroll 8
        for (int k = 0; k < K / 2; k++) {
            w[2 * k] = SHUFFLE2(v[k], v[k + K / 2], low);
            w[2 * k + 1] = SHUFFLE2(v[k], v[k + K / 2], high);
        }
#pragma GCC unroll 8
        for (int k = 0; k < K; k++) v[k] = w[k];
    }
}

// The inverse of interleave.
template <int K>
INLINE void separate(U (&v)[K]) {
    U even = lane_numbers() * 2, odd = even + 1;
#pragma GCC unroll 4
    for (int round = 1; round < K; round *= 2) {
        U w[K];
#pragma GCC unroll 8
        for (int k = 0; k < K / 2; k++) {
            w[k] = SHUFFLE2(v[2 * k], v[2 * k + 1], even);
            w[k + K / 2] = SHUFFLE2(v[2 * k], v[2 * k + 1], odd);
        }
#pragma GCC unroll 8
        for (int k = 0; k < K; k++) v[k] = w[k];
    }
}

template <class V>
INLINE V load(const void* from, int64_t count = LANES) {
    V v{};
    if (count >= LANES)
        memcpy(&v, from, sizeof v);
    else
        memcpy(&v, from, count * (sizeof v / LANES));
    return v;
}

template <class V>
INLINE void store(void* to, V v, int64_t count = LANES) {
    if (count >= LANES)
        memcpy(to, &v, sizeof v);
    else
        memcpy(to, &v, count * (sizeof v / LANES));
}

// Integers of T, one after the other in memory, to and from lanes (of which the lower bits are stored). The compilers
// take detours to other widths than their own.
template <class T>
INLINE typename Vector<T>::type narrow(U v) {
    return __builtin_convertvector(v, typename Vector<T>::type);
}
template <class T>
INLINE U widen(typename Vector<T>::type v) {
    return __builtin_convertvector(v, U);
}
#if defined(__AVX512F__)
template <>
INLINE Vector<uint8_t>::type narrow<uint8_t>(U v) {
    return (Vector<uint8_t>::type)_mm512_cvtepi32_epi8((__m512i)v);
}
template <>
INLINE Vector<uint16_t>::type narrow<uint16_t>(U v) {
    return (Vector<uint16_t>::type)_mm512_cvtepi32_epi16((__m512i)v);
}
template <>
INLINE U widen<uint8_t>(Vector<uint8_t>::type v) {
    return (U)_mm512_cvtepu8_epi32((__m128i)v);
}
#elif defined(__AVX2__)
template <>
INLINE Vector<uint16_t>::type narrow<uint16_t>(U v) {
    __m256i words = _mm256_shuffle_epi8((__m256i)v, _mm256_set_epi64x(-1, 0x0d0c090805040100, -1, 0x0d0c090805040100));
    return (Vector<uint16_t>::type)_mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 0x08));
}
template <>
INLINE Vector<uint8_t>::type narrow<uint8_t>(U v) {
    __m128i words = (__m128i)narrow<uint16_t>(v & 0xff);
    return bits<Vector<uint8_t>::type>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
}
template <>
INLINE U widen<uint8_t>(Vector<uint8_t>::type v) {
    int64_t bytes;
    memcpy(&bytes, &v, sizeof bytes);
    return (U)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes));
}
template <>
INLINE U widen<uint16_t>(Vector<uint16_t>::type v) {
    return (U)_mm256_cvtepu16_epi32((__m128i)v);
}
#endif

#if defined(__AVX512F__)
#define LOOKUP16
// table[index % 16].
INLINE F lookup16(const float* table, U index) { return _mm512_permutexvar_ps((__m512i)index, load<F>(table)); }
#elif defined(__AVX2__) && defined(__FMA__)
#define LOOKUP16
INLINE F lookup16(const float* table, U index) {
    F low = _mm256_permutevar8x32_ps(load<F>(table), (__m256i)index);
    F high = _mm256_permutevar8x32_ps(load<F>(table + 8), (__m256i)index);
    return _mm256_blendv_ps(low, high, bits<F>(index << 28));
}
#endif

template <class T>
INLINE U load_integers(const T* from, int64_t count = LANES) {
    return widen<T>(load<typename Vector<T>::type>(from, count));
}
template <class T>
INLINE void store_integers(T* to, U v, int64_t count = LANES) {
    store(to, narrow<T>(v), count);
}

}  // namespace
