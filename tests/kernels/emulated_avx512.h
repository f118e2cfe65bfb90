// AVX-512 on any x86 CPU with AVX2, by SIMDe's functions (https://github.com/simd-everywhere/simde), for scripts/avx512.sh.
// Included before a source of fairseq_dsq/kernels/native, which is then compiled for -mavx2.
#pragma once

// First, so that no later #include brings the compiler's own functions back.
#include <immintrin.h>
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cmath>
#include <cstring>

// Lane by lane: what SIMDe 0.7.4 lacks, and what it has without the instruction's treatment of small numbers.
namespace emulated {

template <class To, class From>
inline To to(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To value;
    memcpy(&value, &from, sizeof value);
    return value;
}

template <class T, int N>
struct Lanes {
    T lane[N];
};
using Floats = Lanes<float, 16>;
using Ints = Lanes<int32_t, 16>;

inline __m512 shuffle_f32x4(__m512 a, __m512 b, int which) {
    Floats x = to<Floats>(a), y = to<Floats>(b), out;
    for (int i = 0; i < 16; i++) {
        int block = which >> (i / 4 * 2) & 3;
        out.lane[i] = (i < 8 ? x : y).lane[4 * block + i % 4];
    }
    return to<__m512>(out);
}

template <class T>
inline void mask_store(T* at, __mmask16 mask, const Lanes<T, 16>& from) {
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) at[i] = from.lane[i];
}
inline void mask_storeu_ps(void* at, __mmask16 mask, __m512 v) { mask_store((float*)at, mask, to<Floats>(v)); }
inline void mask_storeu_epi32(void* at, __mmask16 mask, __m512i v) { mask_store((int32_t*)at, mask, to<Ints>(v)); }

inline void stream_ps(void* at, __m512 v) { mask_storeu_ps(at, 0xFFFF, v); }

inline __m512 maskz_loadu_ps(__mmask16 mask, const void* from) {
    Floats out = {};
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) out.lane[i] = ((const float*)from)[i];
    return to<__m512>(out);
}

inline __mmask16 fpclass_ps_mask(__m512 v, int classes) {
    if (classes != 0x99) __builtin_trap();  // NaN and infinities alone
    Floats x = to<Floats>(v);
    __mmask16 found = 0;
    for (int i = 0; i < 16; i++) found |= !std::isfinite(x.lane[i]) << i;
    return found;
}

inline __m512i cvtps_epi32(__m512 v) {
    Floats x = to<Floats>(v);
    Ints out;
    for (int i = 0; i < 16; i++) out.lane[i] = _mm_cvtss_si32(_mm_set_ss(x.lane[i]));
    return to<__m512i>(out);
}

inline __m512 cvtepi32_ps(__m512i v) {
    Ints x = to<Ints>(v);
    Floats out;
    for (int i = 0; i < 16; i++) out.lane[i] = (float)x.lane[i];
    return to<__m512>(out);
}

template <class T>
inline Lanes<T, 16> narrow(__m512i v) {
    Ints x = to<Ints>(v);
    Lanes<T, 16> out;
    for (int i = 0; i < 16; i++) out.lane[i] = (T)x.lane[i];
    return out;
}
inline __m128i cvtepi32_epi8(__m512i v) { return to<__m128i>(narrow<uint8_t>(v)); }
inline __m256i cvtepi32_epi16(__m512i v) { return to<__m256i>(narrow<uint16_t>(v)); }
inline __m512i cvtepu8_epi32(__m128i v) {
    auto x = to<Lanes<uint8_t, 16>>(v);
    Ints out;
    for (int i = 0; i < 16; i++) out.lane[i] = x.lane[i];
    return to<__m512i>(out);
}

// One rounding, whatever the range.
inline __m512 scalef_ps(__m512 v, __m512 powers) {
    Floats x = to<Floats>(v), y = to<Floats>(powers);
    for (int i = 0; i < 16; i++) x.lane[i] = std::ldexp(x.lane[i], (int)std::floor(y.lane[i]));
    return to<__m512>(x);
}

// Intel's Software Developer's Manual, VDPBF16PS: two fused multiply-adds, the odd element first; subnormal numbers are
// read as zero and results that would be subnormal are zero.
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
template <class V>
inline __m512 dpbf16_ps(__m512 sums, V a, V b) {
    Floats sum = to<Floats>(sums);
    auto x = to<Lanes<uint16_t, 32>>(a), y = to<Lanes<uint16_t, 32>>(b);
    auto value = [](uint16_t bfloat16) { return flushed(to<float>((uint32_t)bfloat16 << 16)); };
    for (int i = 0; i < 32; i++) {
        int k = i ^ 1;
        sum.lane[k / 2] = flushed(std::fma(value(x.lane[k]), value(y.lane[k]), flushed(sum.lane[k / 2])));
    }
    return to<__m512>(sum);
}

inline __mmask16 knot_mask16(__mmask16 mask) { return ~mask; }

// The CPU that is emulated has all that is asked for; EMULATED_WITHOUT names what it lacks.
constexpr bool has(const char* feature) { return std::strcmp(feature, EMULATED_WITHOUT) != 0; }

}  // namespace emulated

#undef _mm512_scalef_ps
#undef _mm512_dpbf16_ps
#undef _knot_mask16
#define _mm512_scalef_ps emulated::scalef_ps
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_shuffle_f32x4 emulated::shuffle_f32x4
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm512_mask_storeu_epi32 emulated::mask_storeu_epi32
#define _mm512_stream_ps emulated::stream_ps
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_fpclass_ps_mask emulated::fpclass_ps_mask
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _knot_mask16 emulated::knot_mask16
#define __builtin_cpu_supports(feature) emulated::has(feature)

// What the sources ask of the compiler.
#define __AVX512F__ 1
#define __AVX512VNNI__ 1
#define __AVX512BF16__ 1
