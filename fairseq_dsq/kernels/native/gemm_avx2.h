// The engines of gemm.cpp for AVX2, whose integer multipliers do two (16 bits) and four times (8 bits) what its float32
// ones do.
#pragma once

namespace {

// A tile of 4 x 16: 8 sums, 2 vectors of B, 1 of A. A panel of A has as many rows as are packed at once.
constexpr int TILE_ROWS = 4, TILE_VECTORS = 2, PANEL_ROWS = LANES;

inline __m256i bits_of(__m256 x) { return _mm256_castps_si256(x); }
inline __m256i load_words(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }

// The first `count` lanes, which may be any number; memory of the others is not touched.
inline __m256 load(const float* from, long count) {
    if (count >= LANES) return _mm256_loadu_ps(from);
    if (count <= 0) return _mm256_setzero_ps();
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
}

// ---------------------------------------- packing
// Everything below works on one box of 8 rows: x[k] holds value k of each row.

inline void transpose(F* x) {  // 8 x 8
    __m256 t[8], s[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    auto pd = [&](int i) { return _mm256_castps_pd(t[i]); };
    for (int i = 0; i < 8; i += 4) {  // half h (of 4 lanes) of s[i + j]: column 4 h + j of rows i to i + 3
        s[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(pd(i), pd(i + 2)));
        s[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(pd(i), pd(i + 2)));
        s[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(pd(i + 1), pd(i + 3)));
        s[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(pd(i + 1), pd(i + 3)));
    }
    constexpr int LOW_HALVES = 0x20, HIGH_HALVES = 0x31;
    for (int j = 0; j < 4; j++) {
        x[j] = _mm256_permute2f128_ps(s[j], s[4 + j], LOW_HALVES);
        x[4 + j] = _mm256_permute2f128_ps(s[j], s[4 + j], HIGH_HALVES);
    }
}

// The box's integer codes; returns each row's 2^(E - 127 - scale_shift), NaN if it holds Inf or NaN.
inline F encode(const F (&x)[BOX], __m256i (&codes)[BOX], int width, int scale_shift) {
    U exponent = exponent_of_rows(x);
    Scale down = encode_scale(exponent, width - 2);
    F max_code = all((float)((1 << (width - 1)) - 1)), min_code = -max_code;
    for (int k = 0; k < BOX; k++)  // the conversion rounds half to even
        codes[k] = _mm256_cvtps_epi32(max(min(times(x[k], down), max_code), min_code));
    return nan_where_marked(exponent, bits<F>(exponent << 23)) * (1.0f / (1 << scale_shift));
}

inline __m256i halves(__m256i low, __m256i high) {  // the low 16 bits of either, side by side
    return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xAA);
}

// `load_part(from, i, at)` loads 8 floats of the source's row i in memory, beginning with the one numbered `at`.
template <class Load>
inline void load_box(F (&x)[BOX], const float* from, const Source& s, Load load_part) {
    if (s.k_outer) {
        for (int i = 0; i < BOX; i++) x[i] = load_part(from + i * s.stride, i, 0);
        return;
    }
    for (int i = 0; i < LANES; i++) {
        const float* from_row = from + i * s.stride;
        _mm_prefetch(from_row + PREFETCH, _MM_HINT_T1);
        x[i] = load_part(from_row, i, 0);
        x[LANES + i] = load_part(from_row + LANES, i, LANES);
    }
    transpose(x);
    transpose(x + LANES);
}

// Box `box` of the panel of W rows from `row` on, as `write` writes the codes and scales of 8 rows of it.
template <int W, class Write>
inline void pack_rows(const Source& s, long row, long box, int scale_shift, uint32_t* out, Write write) {
    long k0 = box * BOX, k = std::min<long>(BOX, s.k - k0);
    for (int g = 0; g < W; g += LANES) {
        long rows = std::min<long>(s.rows - row - g, W - g);  // may be < 1: then all of the group is padding
        F x[BOX];
        const float* from = s.data + (s.k_outer ? k0 * s.stride + row + g : (row + g) * s.stride + k0);
        if (rows >= LANES && k >= BOX)
            load_box(x, from, s, [](const float* part, long, long) { return _mm256_loadu_ps(part); });
        else
            load_box(x, from, s, [&](const float* part, long i, long at) {
                return s.k_outer ? load(part, i < k ? rows : 0) : load(part, i < rows ? k - at : 0);
            });
        __m256i codes[BOX];
        __m256 scale = encode(x, codes, s.bits, scale_shift);
        write(codes, scale, out + g);
    }
}

inline void put(uint32_t* out, __m256i words) { _mm256_store_si256(reinterpret_cast<__m256i*>(out), words); }

// ---------------------------------------- kernels

// Keeps the compiler from gathering the products of a whole box before it adds them up, for which registers do not do.
inline __m256i in_order(__m256i sum) {
    asm("" : "+x"(sum));
    return sum;
}

struct Words {  // of the columns of a tile
    __m256i vectors[TILE_VECTORS];
    explicit Words(const uint32_t* from) {
        for (int j = 0; j < TILE_VECTORS; j++) vectors[j] = load_words(from + j * LANES);
    }
    __m256i operator[](int j) const { return vectors[j]; }
};

inline __m256i broadcast(uint32_t word) { return _mm256_set1_epi32(word); }
inline __m256 broadcast_scale(const uint32_t* word) {
    return _mm256_broadcast_ss(reinterpret_cast<const float*>(word));
}

template <int R>
inline void store(const __m256 (&acc)[R][TILE_VECTORS], const Tile& t) {
    for (int j = 0; j < TILE_VECTORS; j++) {
        long columns = t.columns - j * LANES;
        if (columns <= 0) return;
        __m256 bias = t.bias ? load(t.bias + j * LANES, columns) : _mm256_setzero_ps();
        for (int r = 0; r < R; r++) {
            float* c = t.c + r * t.stride + j * LANES;
            __m256 sum = t.add ? _mm256_add_ps(load(c, columns), acc[r][j]) : acc[r][j];
            if (t.bias) sum = _mm256_add_ps(sum, bias);
            if (columns >= LANES) {
                _mm256_storeu_ps(c, sum);
            } else {
                alignas(32) float part[LANES];
                _mm256_store_ps(part, sum);
                std::copy(part, part + columns, c);
            }
        }
    }
}

// A tile by boxes: `sums` makes the box's integer sums and leaves `a` and `b` at its scales.
template <int R, int A_ROWS, int B_ROWS, class Sums>
inline void tile_of(const uint32_t* a, const uint32_t* b, long boxes, const Tile& t, Sums sums) {
    __m256 acc[R][TILE_VECTORS];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < TILE_VECTORS; j++) acc[r][j] = _mm256_setzero_ps();
    for (; boxes > 0; boxes--, a += A_ROWS, b += B_ROWS) {
        __m256i sum[R][TILE_VECTORS];
        sums(sum, a, b);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            __m256 a_scale = broadcast_scale(a + r);
#pragma GCC unroll 4
            for (int j = 0; j < TILE_VECTORS; j++) {
                __m256 b_scale = _mm256_load_ps(reinterpret_cast<const float*>(b + j * LANES));
                __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[r][j]), b_scale);
                acc[r][j] = _mm256_fmadd_ps(scaled, a_scale, acc[r][j]);
            }
        }
    }
    store<R>(acc, t);
}

// A box's N words of codes: `add(sum, w, a_word, b_word, j)` is the sum of column vector j with word w's products.
template <int R, int N, int A_ROWS, int B_ROWS, class Add>
inline void sum_products(__m256i (&sum)[R][TILE_VECTORS], const uint32_t*& a, const uint32_t*& b, Add add) {
#pragma GCC unroll 8
    for (int w = 0; w < N; w++, a += A_ROWS, b += B_ROWS) {
        Words b_words(b);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            __m256i a_word = broadcast(a[r]);
#pragma GCC unroll 4
            for (int j = 0; j < TILE_VECTORS; j++) sum[r][j] = in_order(add(sum[r][j], w, a_word, b_words[j], j));
        }
    }
}

struct Int16 {
    static constexpr int A_ROWS = PANEL_ROWS, A_PANELS = 1, B_ROWS = TILE_VECTORS * LANES, TILE_ROWS = ::TILE_ROWS;
    static constexpr int PAIRS = BOX / 2, A_WORDS = PAIRS + 1, B_WORDS = PAIRS + 1;  // codes, scale

    template <Side SIDE>
    static void pack_box(const Source& s, long row, long box, uint32_t* out, long) {
        constexpr int W = SIDE == A ? A_ROWS : B_ROWS;
        pack_rows<W>(s, row, box, s.scale_shift(SIDE), out, [](const __m256i(&codes)[BOX], __m256 scale, uint32_t* to) {
            for (int p = 0; p < PAIRS; p++) put(to + p * W, halves(codes[2 * p], codes[2 * p + 1]));
            put(to + PAIRS * W, bits_of(scale));
        });
    }

    template <int R>
    static void tile(const uint32_t* a, const uint32_t* b, long boxes, const Tile& t) {
        tile_of<R, A_ROWS, B_ROWS>(a, b, boxes, t, [](auto& sum, auto& a, auto& b) {
            sum_products<R, PAIRS, A_ROWS, B_ROWS>(sum, a, b, [](__m256i sum, int p, __m256i x, __m256i y, int) {
                __m256i products = _mm256_madd_epi16(x, y);
                return p ? _mm256_add_epi32(sum, products) : products;
            });
        });
    }
};

// The instruction multiplies unsigned bytes of A by signed ones of B and adds pairs in 16 bits: A's codes come with an
// offset, which makes them positive, and B's box with what takes that away again, offset * (-sum of codes), where each
// lane's sum begins. A lane sums 8 products, which fit for bits of A + bits of B <= 14; sums on the way may wrap.
struct Int8 {
    static constexpr int A_ROWS = PANEL_ROWS, A_PANELS = 1, B_ROWS = TILE_VECTORS * LANES, TILE_ROWS = ::TILE_ROWS;
    static constexpr int FOURS = BOX / 4, A_WORDS = FOURS + 1, B_WORDS = FOURS + 2;  // codes, (correction,) scale
    static constexpr int MOST_BITS = 8, MOST_BITS_TOGETHER = 14;

    static bool holds(int a_bits, int b_bits) {
        return a_bits <= MOST_BITS && b_bits <= MOST_BITS && a_bits + b_bits <= MOST_BITS_TOGETHER;
    }

    template <Side SIDE>
    static void pack_box(const Source& s, long row, long box, uint32_t* out, long) {
        constexpr int W = SIDE == A ? A_ROWS : B_ROWS;
        int a_bits = SIDE == A ? s.bits : s.other_bits;
        __m256i offset = _mm256_set1_epi16((1 << (a_bits - 1)) - 1);
        int shift = s.scale_shift(SIDE);
        pack_rows<W>(s, row, box, shift, out, [&](const __m256i(&codes)[BOX], __m256 scale, uint32_t* to) {
            __m256i sums = _mm256_setzero_si256(), low_bytes = _mm256_set1_epi16(0xFF);
            for (int f = 0; f < FOURS; f++, to += W) {
                __m256i even = halves(codes[4 * f], codes[4 * f + 2]), odd = halves(codes[4 * f + 1], codes[4 * f + 3]);
                sums = _mm256_add_epi16(sums, _mm256_add_epi16(even, odd));
                if constexpr (SIDE == A) even = _mm256_add_epi16(even, offset), odd = _mm256_add_epi16(odd, offset);
                put(to, _mm256_or_si256(_mm256_and_si256(even, low_bytes), _mm256_slli_epi16(odd, 8)));
            }
            if constexpr (SIDE == B) {
                put(to, _mm256_sub_epi16(_mm256_setzero_si256(), _mm256_mullo_epi16(sums, offset)));
                to += W;
            }
            put(to, bits_of(scale));
        });
    }

    template <int R>
    static void tile(const uint32_t* a, const uint32_t* b, long boxes, const Tile& t) {
        tile_of<R, A_ROWS, B_ROWS>(a, b, boxes, t, [](auto& sum, auto& a, auto& b) {
            Words start(b + FOURS * B_ROWS);
            // A pair of bytes as it lies in a word: k and k + 1 in the low half, k + 2 and k + 3 in the high one.
            sum_products<R, FOURS, A_ROWS, B_ROWS>(sum, a, b, [&](__m256i sum, int f, __m256i x, __m256i y, int j) {
                return _mm256_add_epi16(f ? sum : start[j], _mm256_maddubs_epi16(x, y));
            });
            b += B_ROWS;
            __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int j = 0; j < TILE_VECTORS; j++) sum[r][j] = _mm256_madd_epi16(sum[r][j], ones);
        });
    }
};

struct Single {
    static constexpr int A_ROWS = PANEL_ROWS, A_PANELS = 1, B_ROWS = TILE_VECTORS * LANES, TILE_ROWS = ::TILE_ROWS;
    static constexpr int A_WORDS = BOX, B_WORDS = BOX;

    template <Side SIDE>
    static void pack_box(const Source& s, long row, long box, uint32_t* out, long) {
        constexpr int W = SIDE == A ? A_ROWS : B_ROWS;
        pack_rows<W>(s, row, box, s.bits - 2, out, [](const __m256i(&codes)[BOX], __m256 scale, uint32_t* to) {
            for (int k = 0; k < BOX; k++) put(to + k * W, bits_of(_mm256_cvtepi32_ps(codes[k]) * scale));
        });
    }

    template <int R>
    static void tile(const uint32_t* a, const uint32_t* b, long boxes, const Tile& t) {
        __m256 acc[R][TILE_VECTORS];
        for (int r = 0; r < R; r++)
            for (int j = 0; j < TILE_VECTORS; j++) acc[r][j] = _mm256_setzero_ps();
        for (long k = boxes * BOX; k > 0; k--, a += A_ROWS, b += B_ROWS) {
            Words b_words(b);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                __m256 v = broadcast_scale(a + r);
#pragma GCC unroll 4
                for (int j = 0; j < TILE_VECTORS; j++)
                    acc[r][j] = _mm256_fmadd_ps(v, _mm256_castsi256_ps(b_words[j]), acc[r][j]);
            }
        }
        store<R>(acc, t);
    }
};

inline bool cpu_runs() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// Whether operands may be values that need no rounding, in whatever format.
inline bool cpu_takes_values() { return false; }

template <class Run>
inline int with_engine(const DsqOperand& a, const DsqOperand& b, Run run) {
    if (terms_of(a) == 2 && terms_of(b) == 2) return run(Single());
    return Int8::holds(a.bits, b.bits) ? run(Int8()) : run(Int16());
}

}  // namespace
