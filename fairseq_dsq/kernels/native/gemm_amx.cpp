// C = A @ B in float32 accuracy on AMX's bfloat16 tiles, with quantization fused into packing.
//
// Operands are those of gemm.cpp. A value is the exact sum of one or two bfloat16 terms (codes of at most 9, or of 16
// bits) and a product of two values that of one, two or four products of terms.
//
// A *unit* is one tile, 16 rows of an operand by 32 values of K, two boxes. The order of K within a unit is free as
// long as A and B agree: word p of a row holds the p-th values of its two boxes, so that no lane moves to form pairs,
// and only an operand that lies across its tile (A with K outer, B with K inner) is transposed.
//
//     unit of A:  a tile row is a row of A, 16 words along K
//     unit of B:  a tile row is a word along K, 16 columns
//     panel:      32 rows, step by step along K:  [term 0: rows 0 to 15, rows 16 to 31][term 1: likewise][next step]...
//
// Loop order (each operand is packed once, C is written once):
//
//     for each batch item
//       pack all of B
//       for each block of rows of A                            (independent: what the threads share)
//         for each block of columns of C
//           for each block along K                             (A packed for the first columns, kept for the others)
//             for each panel of A, for each panel of B: 32 x 32 sums in four tiles
//           the block's sums to C, with bias and what is there
//
// The code is a template over the tiles: AMX's, and arrays that give the same bits on any CPU with AVX-512, for tests.
//
// What differs from float32 arithmetic: TDPBF16PS reads subnormal numbers as zero and flushes such results; and Inf
// gives NaN, not Inf, where the other operand has two terms, one of which is zero or of the other sign.
#include "gemm.h"

#if defined(__AVX512F__)
#include <algorithm>
#include <cstdlib>

#include "encode.h"
#include "avx512.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int STEP = 2 * BOX, PANEL = 2 * BOX;
constexpr int UNIT = BOX * BOX;         // words
constexpr long STREAMED = 1L << 20;     // values of C that are written past the caches: 4 MB
constexpr uint32_t UPPER = 0xFFFF0000;  // a float32's bits that are a bfloat16

// ---------------------------------------- tiles
// Four tiles of sums (32 x 32), two of A (32 rows), two of B (32 columns).

#if defined(__AMX_BF16__) && defined(__linux__)

struct Amx {
    // GCC does not know that the intrinsics read memory (8 bytes of 64, or none): without a barrier it may write
    // the memory after them.
    static void memory_is_written() { asm volatile("" ::: "memory"); }

    static void begin() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; tile++) config.row_bytes[tile] = 64, config.rows[tile] = 16;
        asm volatile("" ::"r"(&config) : "memory");
        _tile_loadconfig(&config);
    }
    static void end() { _tile_release(); }  // or every switch of threads saves 8 KB more

    void zero() {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    void load(const float* c, long stride) {
        const float* below = c + 16 * stride;
        _tile_loadd(0, c, 4 * stride);
        _tile_loadd(1, c + 16, 4 * stride);
        _tile_loadd(2, below, 4 * stride);
        _tile_loadd(3, below + 16, 4 * stride);
    }
    void store(float* c, long stride) {
        float* below = c + 16 * stride;
        _tile_stored(0, c, 4 * stride);
        _tile_stored(1, c + 16, 4 * stride);
        _tile_stored(2, below, 4 * stride);
        _tile_stored(3, below + 16, 4 * stride);
    }
    void load_a(const uint32_t* a) {
        _tile_loadd(4, a, 64);
        _tile_loadd(5, a + UNIT, 64);
    }
    template <bool PAST_L1>
    void load_b(const uint32_t* b) {
        if (PAST_L1) {
            _tile_stream_loadd(6, b, 64);
            _tile_stream_loadd(7, b + UNIT, 64);
        } else {
            _tile_loadd(6, b, 64);
            _tile_loadd(7, b + UNIT, 64);
        }
    }
    void multiply() {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
};

#endif

// Intel's Software Developer's Manual, TDPBF16PS: the lower and the upper halves of the words are summed apart by fused
// multiply-adds, then together, then onto C; subnormal numbers are zero wherever they appear.
struct Emulated {
    U tiles[8][16];  // row by row

    static void memory_is_written() {}
    static void begin() {}
    static void end() {}
    static F flushed(F x) { return bits<F>(bits<U>(x) & ((U)((bits<U>(x) & 0x7F800000u) != 0) | SIGN)); }

    void zero() { memset(tiles, 0, 4 * sizeof tiles[0]); }
    template <class Copy>
    void copy(long stride, Copy row) {  // (vector, where it is) of C
        for (int i = 0; i < 64; i++) row(tiles[i / 16][i % 16], (i / 32 * 16 + i % 16) * stride + i / 16 % 2 * 16);
    }
    void load(const float* c, long stride) {
        copy(stride, [&](U& row, long at) { row = ::load<U>(c + at); });
    }
    void store(float* c, long stride) {
        copy(stride, [&](U& row, long at) { ::store(c + at, row); });
    }
    void load_a(const uint32_t* a) { memcpy(tiles[4], a, 2 * sizeof tiles[4]); }
    template <bool PAST_L1>
    void load_b(const uint32_t* b) {
        memcpy(tiles[6], b, 2 * sizeof tiles[6]);
    }
    void multiply() {
        for (int tile = 0; tile < 4; tile++) multiply(tiles[tile], tiles[4 + tile / 2], tiles[6 + tile % 2]);
    }
    static void multiply(U (&c)[16], const U (&a)[16], const U (&b)[16]) {
        auto add_product = [](F sum, U x, U y) {
            return flushed(_mm512_fmadd_ps(flushed(bits<F>(x)), flushed(bits<F>(y)), sum));
        };
        for (int row = 0; row < 16; row++) {
            F lower{}, upper{};
            for (int p = 0; p < 16; p++) {
                U word = all(a[row][p]);
                lower = add_product(lower, word << 16, b[p] << 16);
                upper = add_product(upper, word & UPPER, b[p] & UPPER);
            }
            c[row] = bits<U>(flushed(flushed(bits<F>(c[row])) + flushed(lower + upper)));
        }
    }
};

// ---------------------------------------- packing

// To the nearest code of a box, ties to even: x + magic - magic is a multiple of the box's scale, as magic is 1.5 *
// 2^23 scales, a float32 that has no bits below. Codes beyond the largest are cut to it. Boxes of 2^74 and more are
// rounded 2^-32 times as large, where magic does not overflow; a box with Inf or NaN has none but NaN.
struct Rounding {
    F magic, limit, down, up;

    Rounding() = default;
    Rounding(U largest, int width) {
        U exponent = exponent_of(largest), huge = (U)(exponent > 200u);
        F largest_code = bits<F>(exponent << 23 | ((1u << (width - 2)) - 1) << (25 - width));
        limit = nan_where_marked(exponent, largest_code);
        magic = nan_where_marked(exponent, bits<F>(((exponent - (huge & 32u) + (25 - width)) << 23) + 0x400000u));
        down = choose((I)huge, all(0x1p-32f), all(1.0f));
        up = choose((I)huge, all(0x1p32f), all(1.0f));
    }
    INLINE F operator()(F x) const {
        F code = (_mm512_fmadd_ps(x, down, magic) - magic) * up;
        return _mm512_range_ps(code, limit, SMALLER_MAGNITUDE);
    }
};

// The two boxes of a unit of the source s, whose rows or values of K are the vectors: x[0] and x[1].
template <bool OUTER>
INLINE void load_boxes(const Source& s, F (&x)[2][BOX]) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        const float* from = s.data + (OUTER ? h * BOX * s.stride : h * BOX);
        long vectors = OUTER ? s.k - h * BOX : s.rows, lanes = OUTER ? s.rows : s.k - h * BOX;
        if (vectors >= BOX && lanes >= LANES) {
#pragma GCC unroll 16
            for (int i = 0; i < BOX; i++) x[h][i] = _mm512_loadu_ps(from + i * s.stride);
        } else {
            for (int i = 0; i < BOX; i++)  // a masked load does not touch what it leaves out
                x[h][i] = _mm512_maskz_loadu_ps(i < vectors ? first(lanes) : 0, from + i * s.stride);
        }
    }
}

template <bool OUTER>
INLINE void round_box(F (&x)[BOX], int width) {
    if (OUTER) {  // each lane has a box of its own
        U largest{};
#pragma GCC unroll 16
        for (int i = 0; i < BOX; i++) largest = max(largest, bits<U>(x[i]) & ~SIGN);
        Rounding rounded(largest, width);
#pragma GCC unroll 16
        for (int i = 0; i < BOX; i++) x[i] = rounded(x[i]);
    } else {  // each vector is one
        U magnitudes[BOX];
#pragma GCC unroll 16
        for (int i = 0; i < BOX; i++) magnitudes[i] = bits<U>(x[i]) & ~SIGN;
        Rounding each(largest_of_each(magnitudes), width);
        alignas(64) float magic[BOX], limit[BOX], down[BOX], up[BOX];
        store(magic, each.magic), store(limit, each.limit), store(down, each.down), store(up, each.up);
        Rounding rounded;
#pragma GCC unroll 16
        for (int i = 0; i < BOX; i++) {
            rounded.magic = all(magic[i]), rounded.limit = all(limit[i]);
            rounded.down = all(down[i]), rounded.up = all(up[i]);
            x[i] = rounded(x[i]);
        }
    }
}

// Words of the upper halves of both.
INLINE F paired(F low, F high) {
    __m512i lower = _mm512_srli_epi32(_mm512_castps_si512(low), 16);
    return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xAAAAAAAA, lower, _mm512_castps_si512(high)));
}

// The unit that begins with the source's first value.
template <Side SIDE, bool OUTER, int TERMS>
INLINE void pack_unit(const Source& s, uint32_t* out) {
    F x[2][BOX];
    load_boxes<OUTER>(s, x);
    if (s.bits) {
        round_box<OUTER>(x[0], s.bits);
        round_box<OUTER>(x[1], s.bits);
    } else {
        for (auto& box : x)  // a NaN must not lose its last set bit to the cut and become Inf
            for (F& v : box) v = bits<F>(bits<U>(v) | ((U)(v != v) & 0x00400000u));
    }
#pragma GCC unroll 2
    for (int term = 0; term < TERMS; term++, out += 2 * UNIT) {
        F words[BOX];
#pragma GCC unroll 16
        for (int p = 0; p < BOX; p++) words[p] = paired(x[0][p], x[1][p]);
        if ((SIDE == A) == OUTER) transpose(words);
#pragma GCC unroll 16
        for (int p = 0; p < BOX; p++) store(out + p * BOX, words[p]);
        if (term + 1 == TERMS) break;
        for (auto& box : x)
            for (F& v : box) {  // Inf and NaN stay in the first term: Inf - Inf is NaN
                __mmask16 finite = _knot_mask16(_mm512_fpclass_ps_mask(v, NOT_FINITE));
                v = _mm512_maskz_sub_ps(finite, v, bits<F>(bits<U>(v) & UPPER));
            }
    }
}

constexpr long rounded_up(long x, long to) { return (x + to - 1) / to * to; }

// Words of `rows` rows (of whole panels) of length k (of whole steps).
constexpr long words_of(long rows, long k, int terms) { return rows * k / 2 * terms; }

template <Side SIDE, bool OUTER, int TERMS>
void pack_along(const Source& s, uint32_t* out) {
    long steps = rounded_up(std::max(s.k, 1L), STEP) / STEP, units = rounded_up(s.rows, PANEL) / BOX;
    auto pack_one = [&](long unit, long step) {
        Source here = s.part(unit * BOX, BOX, step * STEP, STEP);
        // What lies one turn of the inner loop ahead, to L2: that many rows are too many streams for the hardware.
        const float* next = here.data + (OUTER ? STEP : BOX) * s.stride;
        for (int i = 0; i < (OUTER ? STEP : BOX); i++) {
            _mm_prefetch(next + i * s.stride, _MM_HINT_T1);
            if (!OUTER) _mm_prefetch(next + i * s.stride + BOX, _MM_HINT_T1);
        }
        pack_unit<SIDE, OUTER, TERMS>(here, out + ((unit / 2 * steps + step) * 2 * TERMS + unit % 2) * UNIT);
    };
    if (OUTER)  // along memory
        for (long step = 0; step < steps; step++)
            for (long unit = 0; unit < units; unit++) pack_one(unit, step);
    else
        for (long unit = 0; unit < units; unit++)
            for (long step = 0; step < steps; step++) pack_one(unit, step);
}

template <Side SIDE, int TERMS>
void pack(const Source& s, uint32_t* out) {
    if (s.k_outer)
        pack_along<SIDE, true, TERMS>(s, out);
    else
        pack_along<SIDE, false, TERMS>(s, out);
}

// ---------------------------------------- kernels

// 32 x 32 sums of two panels. A's stays in L1 from block to block; B's comes from L2 and must not drive it out.
template <class Tiles, int A_TERMS, int B_TERMS>
INLINE void add_panels(const uint32_t* a, const uint32_t* b, long steps, float* sums, long stride, bool add) {
    constexpr bool PAST_L1 = A_TERMS == 1;
    Tiles tiles;
    if (add)
        tiles.load(sums, stride);
    else
        tiles.zero();
    for (; steps > 0; steps--, a += 2 * A_TERMS * UNIT, b += 2 * B_TERMS * UNIT) {
        tiles.load_a(a);
        tiles.template load_b<PAST_L1>(b);
        tiles.multiply();
        if (B_TERMS == 2) {
            tiles.template load_b<PAST_L1>(b + 2 * UNIT);
            tiles.multiply();
        }
        if (A_TERMS == 2) {
            tiles.load_a(a + 2 * UNIT);
            tiles.multiply();
            if (B_TERMS == 2) {
                tiles.template load_b<PAST_L1>(b);
                tiles.multiply();
            }
        }
    }
    tiles.store(sums, stride);
}

struct Target {  // C, or a part of it
    float* c;
    long stride, rows, columns;
    const float* bias;  // added to each row, or null
    bool add;           // to what is there
    bool stream;        // past the caches
    Target part(long row, long row_count, long column, long column_count) const {
        Target t = *this;
        t.c += row * stride + column;
        t.rows = std::min(row_count, rows - row);
        t.columns = std::min(column_count, columns - column);
        t.bias = bias ? bias + column : nullptr;
        return t;
    }
    void take(const float* sums, long sums_stride) const {
        bool lines = stream && reinterpret_cast<uintptr_t>(c) % 64 == 0 && stride % LANES == 0;
        for (long r = 0; r < rows; r++)
            for (long j = 0; j < columns; j += LANES) {
                float* to = c + r * stride + j;
                __mmask16 mask = first(columns - j);
                __m512 x = _mm512_load_ps(sums + r * sums_stride + j);
                if (add) x = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), x);
                if (bias) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, bias + j));
                if (lines && mask == 0xFFFF)
                    _mm512_stream_ps(to, x);
                else
                    _mm512_mask_storeu_ps(to, mask, x);
            }
    }
};

// A product's blocks. Panels of A of 32 KB, or of A and B, in L1 (48 KB); a block of A and its sums in L2 (2 MB).
template <class Tiles, int A_TERMS, int B_TERMS>
struct Product {
    Source a, b;
    long k, columns;                       // of whole steps, of whole panels
    long k_block, row_block, column_block;

    Product(Source a, Source b, int threads) : a(a), b(b) {
        k = rounded_up(std::max(a.k, 1L), STEP);  // K = 0 makes empty sums
        columns = rounded_up(b.rows, PANEL);
        k_block = std::min(k, A_TERMS > B_TERMS ? 256L : 512L);
        column_block = std::min(columns, b.rows > 512 ? 256L : 512L);
        long share = rounded_up((a.rows + threads - 1) / threads, PANEL);
        row_block = std::min(share, A_TERMS == 1 ? 512L : 256L);
    }

    long sums_stride() const { return column_block + BOX; }  // rows 2^n apart share few sets of L1
    long a_words() const { return words_of(row_block, column_block == columns ? k_block : k, A_TERMS); }
    long b_words() const { return words_of(columns, k, B_TERMS); }
    long sums_words() const { return row_block * sums_stride(); }

    void pack_b(long column, long count, uint32_t* packed_b) const {
        for (long k0 = 0; k0 < k; k0 += k_block)
            pack<B, B_TERMS>(b.part(column, count, k0, k_block), b_panel(packed_b, column, k0));
    }
    uint32_t* b_panel(uint32_t* packed_b, long column, long k0) const {
        return packed_b + words_of(columns, k0, B_TERMS) + words_of(column, std::min(k_block, k - k0), B_TERMS);
    }

    // A block of rows of C, all columns.
    void multiply(long row, uint32_t* packed_b, uint32_t* packed_a, float* sums, const Target& t) const {
        long rows = std::min(row_block, a.rows - row);
        for (long column = 0; column < b.rows; column += column_block) {
            long columns_here = std::min(column_block, b.rows - column);
            for (long k0 = 0; k0 < k; k0 += k_block) {
                long k_here = std::min(k_block, k - k0);
                uint32_t* a_block = column_block == columns ? packed_a : packed_a + words_of(row_block, k0, A_TERMS);
                if (column == 0) pack<A, A_TERMS>(a.part(row, row_block, k0, k_block), a_block);
                Tiles::memory_is_written();
                for (long i = 0; i < rows; i += PANEL)
                    for (long j = 0; j < columns_here; j += PANEL)
                        add_panels<Tiles, A_TERMS, B_TERMS>(
                            a_block + words_of(i, k_here, A_TERMS), b_panel(packed_b, column + j, k0), k_here / STEP,
                            sums + i * sums_stride() + j, sums_stride(), k0 > 0);
            }
            t.part(row, row_block, column, column_block).take(sums, sums_stride());
        }
    }
};

// Threads share the batch, or a single item's columns of B and rows of A.
template <class Tiles, int A_TERMS, int B_TERMS>
int run(Source a, long a_batch, Source b, long b_batch, Target t, long c_batch, long batch, int threads) {
    constexpr long PACKED_AT_ONCE = 4 * PANEL;
    bool items = batch > 1;
    const Product<Tiles, A_TERMS, B_TERMS> whole(a, b, items ? 1 : threads);
    uint32_t* shared_b = items ? nullptr : allocate(whole.b_words());
    bool ok = items || shared_b;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : ok)
    {
        uint32_t* packed_a = allocate(whole.a_words());
        uint32_t* packed_b = items ? allocate(whole.b_words()) : shared_b;
        float* sums = reinterpret_cast<float*>(allocate(whole.sums_words()));
        ok = packed_a && packed_b && sums;
        Tiles::begin();
        if (items) {
#pragma omp for schedule(static)
            for (long item = 0; item < batch; item++) {
                auto product = whole;
                Target out = t;
                product.a.data += item * a_batch;
                product.b.data += item * b_batch;
                out.c += item * c_batch;
                if (!ok) continue;
                product.pack_b(0, b.rows, packed_b);
                for (long row = 0; row < a.rows; row += whole.row_block)
                    product.multiply(row, packed_b, packed_a, sums, out);
            }
        } else {
#pragma omp for schedule(static)
            for (long column = 0; column < b.rows; column += PACKED_AT_ONCE)
                if (packed_b) whole.pack_b(column, PACKED_AT_ONCE, packed_b);
#pragma omp for schedule(static)
            for (long row = 0; row < a.rows; row += whole.row_block)
                if (ok) whole.multiply(row, packed_b, packed_a, sums, t);
        }
        Tiles::end();
        _mm_sfence();  // what went past the caches is there for whoever reads next
        if (items) free(packed_b);
        free(packed_a);
        free(sums);
    }
    free(shared_b);
    return ok ? DSQ_OK : DSQ_NO_MEMORY;
}

template <class Tiles>
int gemm(GEMM_ARGUMENTS) {
    if (!valid(*a) || !valid(*b) || batch < 0 || m < 0 || n < 0 || k < 0) return DSQ_BAD_ARGUMENT;
    if (batch == 0 || m == 0 || n == 0) return DSQ_OK;
    Source sa(*a, m, k, b->bits), sb(*b, n, k, a->bits);
    Target t = {c, c_row_stride, m, n, bias, accumulate != 0, m * n >= STREAMED};
    int a_terms = terms_of(*a), b_terms = terms_of(*b);
    auto with = a_terms == 1 ? (b_terms == 1 ? run<Tiles, 1, 1> : run<Tiles, 1, 2>)
                             : (b_terms == 1 ? run<Tiles, 2, 1> : run<Tiles, 2, 2>);
    return with(sa, a->batch_stride, sb, b->batch_stride, t, c_batch_stride, batch, threads);
}

#if defined(__AMX_BF16__) && defined(__linux__)

// Whether the CPU has the instructions and the kernel lets this process, and the threads that it will have, use tiles.
bool allowed() {
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;  // of leaf 7's EDX
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || ~edx & (AMX_BF16 | AMX_TILE)) return false;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

#endif

}  // namespace

#define PASSED a, b, c, c_row_stride, c_batch_stride, bias, accumulate, batch, m, n, k, threads

EXPORT int32_t dsq_amx_emulated_gemm_runs() { return 1; }
EXPORT int32_t dsq_amx_emulated_gemm_takes_values() { return 1; }
EXPORT int32_t dsq_amx_emulated_gemm(GEMM_ARGUMENTS) { return gemm<Emulated>(PASSED); }

#if defined(__AMX_BF16__) && defined(__linux__)
// Asked once, by who loads the library.
EXPORT int32_t dsq_amx_gemm_runs() {
    static const bool runs = allowed();
    return runs;
}
EXPORT int32_t dsq_amx_gemm_takes_values() { return 1; }
EXPORT int32_t dsq_amx_gemm(GEMM_ARGUMENTS) { return dsq_amx_gemm_runs() ? gemm<Amx>(PASSED) : DSQ_UNAVAILABLE; }
#endif

#endif
