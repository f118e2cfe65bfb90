// What the GEMM kernels of AVX-512 have in common.
#pragma once

#include "lanes.h"

namespace {

constexpr int SMALLER_MAGNITUDE = 2;  // range: of two operands, with the sign of the first
constexpr int NOT_FINITE = 0x99;      // fpclass: quiet NaN, +Inf, -Inf, signalling NaN

inline __mmask16 first(long lanes) { return lanes >= LANES ? 0xFFFF : lanes > 0 ? (1u << lanes) - 1 : 0; }

// Of 16 x 16 lanes.
inline void transpose(F (&x)[16]) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    auto pd = [&](int i) { return _mm512_castps_pd(t[i]); };
    auto lo = [&](int i, int j) { return _mm512_castpd_ps(_mm512_unpacklo_pd(pd(i), pd(j))); };
    auto hi = [&](int i, int j) { return _mm512_castpd_ps(_mm512_unpackhi_pd(pd(i), pd(j))); };
    __m512 s[16];
    for (int i = 0; i < 16; i += 4) {  // block b (of 4 lanes) of s[i + j]: column 4 b + j of rows i to i + 3
        s[i] = lo(i, i + 2);
        s[i + 1] = hi(i, i + 2);
        s[i + 2] = lo(i + 1, i + 3);
        s[i + 3] = hi(i + 1, i + 3);
    }
    constexpr int EVEN = 0x88, ODD = 0xDD;  // blocks 0 and 2, or 1 and 3, of either operand
    for (int j = 0; j < 4; j++) {
        __m512 top02 = _mm512_shuffle_f32x4(s[j], s[4 + j], EVEN), top13 = _mm512_shuffle_f32x4(s[j], s[4 + j], ODD);
        __m512 end02 = _mm512_shuffle_f32x4(s[8 + j], s[12 + j], EVEN);
        __m512 end13 = _mm512_shuffle_f32x4(s[8 + j], s[12 + j], ODD);
        x[j] = _mm512_shuffle_f32x4(top02, end02, EVEN);
        x[4 + j] = _mm512_shuffle_f32x4(top13, end13, EVEN);
        x[8 + j] = _mm512_shuffle_f32x4(top02, end02, ODD);
        x[12 + j] = _mm512_shuffle_f32x4(top13, end13, ODD);
    }
}

}  // namespace
