// The engines of gemm.cpp for AVX512-VNNI and, where the CPU has it, AVX512-BF16.
#pragma once

#include "avx512.h"

namespace {

constexpr int PAIRS = BOX / 2;
constexpr int A_ROWS = 12, B_ROWS = 2 * LANES;  // a tile of 12 x 32: 24 accumulators, 2 vectors of B, 1 of A
constexpr int A_PANELS = 4;                     // three times 16 rows, as many as are packed at once

inline __m512i bits_of(__m512 x) { return _mm512_castps_si512(x); }

// ---------------------------------------- packing
// Everything below works on one box of 16 rows: x[k] holds value k of each row.

// Replaces the box by its integer codes and returns each row's 2^(E - 127 - scale_shift), NaN if it holds Inf or NaN.
// scalef multiplies by a power of two with one rounding, whatever the range; so is a scale below 2^-126 exact.
inline F encode(F (&x)[BOX], int width, int scale_shift) {
    U exponent = exponent_of_rows(x);
    F e = _mm512_cvtepi32_ps((__m512i)exponent), shift = (float)(BIAS + width - 2) - e;
    F max_code = all((float)((1 << (width - 1)) - 1));
    for (int k = 0; k < BOX; k++)
        x[k] = _mm512_range_ps(round_even(_mm512_scalef_ps(x[k], shift)), max_code, SMALLER_MAGNITUDE);
    return nan_where_marked(exponent, _mm512_scalef_ps(all(1.0f), e - (float)(BIAS + scale_shift)));
}

inline __m512i interleave(__m512i low, __m512i high) {  // the low 16 bits of low, the high 16 bits of high
    return _mm512_mask_blend_epi16(0xAAAAAAAA, low, high);
}
inline __m512i bf16_pair(__m512 x, __m512 y) { return interleave(_mm512_srli_epi32(bits_of(x), 16), bits_of(y)); }
inline __m512 truncate_to_bf16(__m512 x) {
    return _mm512_castsi512_ps(_mm512_and_si512(bits_of(x), _mm512_set1_epi32(0xFFFF0000)));
}

// Where the words of 16 rows go: to one panel, or to the end of one and the start of the next.
struct Places {
    uint32_t* out[2];
    __mmask16 lanes[2];
    void store(long at, __m512i words) const {  // a masked store does not touch what it leaves out
        _mm512_mask_storeu_epi32(out[0] + at, lanes[0], words);
        if (lanes[1]) _mm512_mask_storeu_epi32(out[1] + at, lanes[1], words);
    }
};

template <int TERMS, int W>
inline void write_bf16(F (&x)[BOX], int bits, const Places& to) {
    if (bits) {
        __m512 scale = encode(x, bits, bits - 2);
        for (int k = 0; k < BOX; k++) x[k] = _mm512_mul_ps(x[k], scale);  // exact: at most 15 bits, at least 2^-140
    } else {
        for (int k = 0; k < BOX; k++) {  // a NaN must not lose its last set bit to the cut and become Inf
            __mmask16 nan = _mm512_cmp_ps_mask(x[k], x[k], _CMP_UNORD_Q);
            x[k] = _mm512_castsi512_ps(
                _mm512_mask_or_epi32(bits_of(x[k]), nan, bits_of(x[k]), _mm512_set1_epi32(1 << 22)));
        }
    }
    for (int term = 0; term < TERMS; term++) {
        for (int p = 0; p < PAIRS; p++) to.store((term * PAIRS + p) * W, bf16_pair(x[2 * p], x[2 * p + 1]));
        for (int k = 0; term + 1 < TERMS && k < BOX; k++) {  // Inf and NaN stay in the first term: Inf - Inf is NaN
            __mmask16 finite = _knot_mask16(_mm512_fpclass_ps_mask(x[k], NOT_FINITE));
            x[k] = _mm512_maskz_sub_ps(finite, x[k], truncate_to_bf16(x[k]));
        }
    }
}

template <int W>
inline void write_single(F (&x)[BOX], int bits, const Places& to) {
    F scale = bits ? encode(x, bits, bits - 2) : all(1.0f);
    for (int k = 0; k < BOX; k++) to.store(k * W, bits_of(x[k] * scale));
}

template <int W>
inline void write_int16(F (&x)[BOX], int bits, int scale_shift, const Places& to) {
    __m512 scale = encode(x, bits, scale_shift);
    for (int p = 0; p < PAIRS; p++) {
        __m512i low = _mm512_cvtps_epi32(x[2 * p]), high = _mm512_cvtps_epi32(x[2 * p + 1]);
        to.store(p * W, interleave(low, _mm512_slli_epi32(high, 16)));
    }
    to.store(PAIRS * W, bits_of(scale));
}

// Box `box` of PANELS panels of W rows, from `row` on, `panel` words apart, as `write` writes 16 rows of it. Of several
// panels, which are A's, groups of 16 rows that are all missing stay as they are: no tile reads them.
template <int W, int PANELS, class Write>
inline void pack_rows(const Source& s, long row, long box, uint32_t* out, long panel, Write write) {
    static_assert(W * PANELS % LANES == 0);
    long k0 = box * BOX, k = std::min<long>(BOX, s.k - k0);
    for (int g = 0; g < W * PANELS; g += LANES) {
        long rows = s.rows - row - g;  // may be < 1: then all of the group is padding
        if (PANELS > 1 && rows < 1) break;
        F x[BOX];
        const float* from = s.data + (s.k_outer ? k0 * s.stride + row + g : (row + g) * s.stride + k0);
        long vectors = s.k_outer ? k : std::min<long>(rows, LANES);
        __mmask16 mask = s.k_outer ? first(rows) : first(k);
        // Sixteen rows are too many streams for the hardware to prefetch. To L2: rows 2^n apart share few sets of L1.
        for (int i = 0; i < BOX; i++) _mm_prefetch(from + i * s.stride + PREFETCH, _MM_HINT_T1);
        for (int i = 0; i < BOX; i++)  // a masked load does not touch what it leaves out
            x[i] = _mm512_maskz_loadu_ps(i < vectors ? mask : 0, from + i * s.stride);
        if (!s.k_outer) transpose(x);
        int p = g / W, here = W - g % W;  // lanes of the first panel
        uint32_t* to = out + p * panel + g % W;
        write(x, {{to, to + panel - W}, {first(here), (__mmask16)~first(here)}});
    }
}

// ---------------------------------------- kernels

template <int R>
inline void store(__m512 (&acc)[R][2], const Tile& t) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
        __mmask16 mask = first(t.columns - j * LANES);
        __m512 bias = t.bias ? _mm512_maskz_loadu_ps(mask, t.bias + j * LANES) : _mm512_setzero_ps();
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            float* c = t.c + r * t.stride + j * LANES;
            __m512 sum = t.add ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, c), acc[r][j]) : acc[r][j];
            _mm512_mask_storeu_ps(c, mask, t.bias ? _mm512_add_ps(sum, bias) : sum);
        }
    }
}

template <int TERMS>
struct Bf16 {
    static constexpr int A_ROWS = ::A_ROWS, A_PANELS = ::A_PANELS, B_ROWS = ::B_ROWS, TILE_ROWS = A_ROWS;
    static constexpr int A_WORDS = PAIRS * TERMS, B_WORDS = PAIRS;
    template <Side SIDE>
    static void pack_box(const Source& s, long row, long box, uint32_t* out, long panel) {
        constexpr int W = SIDE == A ? A_ROWS : B_ROWS;
        pack_rows<W, SIDE == A ? A_PANELS : 1>(s, row, box, out, panel, [&](F(&x)[BOX], const Places& to) {
            write_bf16<SIDE == A ? TERMS : 1, W>(x, s.bits, to);
        });
    }
    template <int R>
    static void tile(const uint32_t* a, const uint32_t* b, long boxes, const Tile& t) {
        __m512 acc[R][2];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
        for (; boxes > 0; boxes--, a += (TERMS - 1) * PAIRS * A_ROWS)
            for (int p = 0; p < PAIRS; p++, a += A_ROWS, b += B_ROWS) {
                __m512bh b0 = (__m512bh)_mm512_load_si512(b), b1 = (__m512bh)_mm512_load_si512(b + LANES);
#pragma GCC unroll 2
                for (int term = 0; term < TERMS; term++)
#pragma GCC unroll 16
                    for (int r = 0; r < R; r++) {
                        __m512bh v = (__m512bh)_mm512_set1_epi32(a[term * PAIRS * A_ROWS + r]);
                        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], v, b0);
                        acc[r][1] = _mm512_dpbf16_ps(acc[r][1], v, b1);
                    }
            }
        store<R>(acc, t);
    }
};

struct Int16 {
    static constexpr int A_ROWS = ::A_ROWS, A_PANELS = ::A_PANELS, B_ROWS = ::B_ROWS, TILE_ROWS = A_ROWS / 2;  // two accumulators per value
    static constexpr int A_WORDS = PAIRS + 1, B_WORDS = PAIRS + 1;                      // codes, scale
    template <Side SIDE>
    static void pack_box(const Source& s, long row, long box, uint32_t* out, long panel) {
        constexpr int W = SIDE == A ? A_ROWS : B_ROWS;
        pack_rows<W, SIDE == A ? A_PANELS : 1>(s, row, box, out, panel, [&](F(&x)[BOX], const Places& to) {
            write_int16<W>(x, s.bits, s.scale_shift(SIDE), to);
        });
    }
    template <int R>
    static void tile(const uint32_t* a, const uint32_t* b, long boxes, const Tile& t) {
        __m512 acc[R][2];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
        for (; boxes > 0; boxes--, a += A_ROWS, b += B_ROWS) {
            __m512i sum[R][2];
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
            for (int p = 0; p < PAIRS; p++, a += A_ROWS, b += B_ROWS) {
                __m512i b0 = _mm512_load_si512(b), b1 = _mm512_load_si512(b + LANES);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) {
                    __m512i v = _mm512_set1_epi32(a[r]);
                    sum[r][0] = _mm512_dpwssd_epi32(sum[r][0], v, b0);
                    sum[r][1] = _mm512_dpwssd_epi32(sum[r][1], v, b1);
                }
            }
            __m512 s0 = _mm512_load_ps(b), s1 = _mm512_load_ps(b + LANES);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                __m512 v = _mm512_castsi512_ps(_mm512_set1_epi32(a[r]));
                acc[r][0] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][0]), s0), v, acc[r][0]);
                acc[r][1] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][1]), s1), v, acc[r][1]);
            }
        }
        store<R>(acc, t);
    }
};

struct Single {
    static constexpr int A_ROWS = ::A_ROWS, A_PANELS = ::A_PANELS, B_ROWS = ::B_ROWS, TILE_ROWS = A_ROWS, A_WORDS = BOX, B_WORDS = BOX;
    template <Side SIDE>
    static void pack_box(const Source& s, long row, long box, uint32_t* out, long panel) {
        constexpr int W = SIDE == A ? A_ROWS : B_ROWS;
        pack_rows<W, SIDE == A ? A_PANELS : 1>(s, row, box, out, panel, [&](F(&x)[BOX], const Places& to) {
            write_single<W>(x, s.bits, to);
        });
    }
    template <int R>
    static void tile(const uint32_t* a, const uint32_t* b, long boxes, const Tile& t) {
        __m512 acc[R][2];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
        for (long k = boxes * BOX; k > 0; k--, a += A_ROWS, b += B_ROWS) {
            __m512 b0 = _mm512_load_ps(b), b1 = _mm512_load_ps(b + LANES);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                __m512 v = _mm512_castsi512_ps(_mm512_set1_epi32(a[r]));
                acc[r][0] = _mm512_fmadd_ps(v, b0, acc[r][0]);
                acc[r][1] = _mm512_fmadd_ps(v, b1, acc[r][1]);
            }
        }
        store<R>(acc, t);
    }
};

inline bool cpu_runs() {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Whether operands may be values that need no rounding, in whatever format.
inline bool cpu_takes_values() { return __builtin_cpu_supports("avx512bf16"); }

template <class Run>
inline int with_engine(const DsqOperand& a, const DsqOperand& b, Run run) {
    bool coded = a.bits && b.bits;
    int a_terms = terms_of(a), b_terms = terms_of(b);
    if (b_terms == 2 && (a_terms == 2 || !coded)) return run(Single());
    if (coded && (a_terms == 2 || b_terms == 2 || !cpu_takes_values())) return run(Int16());
    return a_terms == 2 ? run(Bf16<2>()) : run(Bf16<1>());
}

}  // namespace
