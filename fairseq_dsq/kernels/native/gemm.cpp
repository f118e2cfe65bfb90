// C = A @ B in float32 accuracy on multipliers of 16 and 8 bits, with quantization fused into packing.
//
// Operands are float32 matrices seen as rows along the reduction dimension K: A is M rows, B is N rows (its columns).
// In memory K is either inner (row-major M x K, N x K) or outer (K x M, K x N).
//
// Packing turns W rows (a *panel*; W = A_ROWS or B_ROWS) into one stretch of boxes along K, 16 values of K to a box; a
// box is some words of 32 bits for each row, the rows side by side:
//
//     panel:  [box 0][box 1]...
//     box:    [word 0: W rows][word 1: W rows]...
//
// so that the kernels read both operands front to back. Missing rows and the tail of the last box are zero. A word
// holds what one lane of one instruction multiplies; which one depends on the engine (A_WORDS, B_WORDS to a box):
//
//     Bf16<1>  bfloat16 values, two to a word: every value of both operands is a bfloat16 (codes of <= 9 bits).
//     Bf16<2>  A = hi + lo, each a bfloat16 (<= 16 significant bits): two terms of A share one B.
//     Int16    integer codes, two to a word, and a power-of-two scale per box, both operands quantized here. Sums of a
//              box are exact integers, below 2^15 * 2^8 * 16 = 2^27; only a box's sum is rounded and scaled into the
//              float32 total. More accurate than Bf16<2>, so that the two do not agree bit for bit.
//     Int8     likewise, four codes to a word, for codes so short that sums fit 16 bits.
//     Single   float32 values, one to a word, by fused multiply-adds: where both operands have more than 9 bits. Their
//              bfloat16 terms would take four products, two instructions where this is one.
//
// gemm_avx512.h has Bf16, Int16 and Single, gemm_avx2.h Int16, Int8 and Single. Values that are quantized already may
// be given to an engine of integers again, with the same bits: that changes nothing.
//
// Loop order (each operand is packed once; tiles of C are touched once per K block):
//
//     for each batch item
//       for each block of K_BLOCK along K
//         pack all of B                                        (about K_BLOCK * N * 2 bytes)
//         for each block of M_BLOCK rows of A                  (independent: the loop to parallelise; see multiply)
//           pack the block of A                                (stays in L2)
//           for each panel of B, for each panel of A: one tile of C in registers
//
// What differs from float32 arithmetic: vdpbf16ps (Bf16) reads subnormal numbers as zero and flushes such results; and
// Inf in B gives NaN, not Inf, under two terms of A, one of which is zero or of the other sign.
//
// This file is compiled once per instruction set: DSQ_NAME(f) is the exported name.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <utility>

#include "gemm.h"

#if defined(__AVX512VNNI__) || (defined(__AVX2__) && !defined(__AVX512F__))
#include "encode.h"

namespace {

constexpr int PREFETCH = 64;      // floats ahead, when packing
// A block of A (384 KB at most) stays in L2, a panel of it in L1.
constexpr long K_BLOCK = 512, M_BLOCK = 192;

struct Tile {  // where a tile goes: some rows of up to B_ROWS columns
    float* c;
    long stride, columns;
    const float* bias;  // added to each row, or null
    bool add;           // to what is there
};

// The biased exponent of each row's box; x[k] holds value k of each row.
INLINE U exponent_of_rows(const F (&x)[BOX]) {
    U largest{};
    for (int k = 0; k < BOX; k++) largest = max(largest, bits<U>(x[k]) & ~SIGN);
    return exponent_of(largest);
}

}  // namespace

#if defined(__AVX512VNNI__)
#include "gemm_avx512.h"
#else
#include "gemm_avx2.h"
#endif

namespace {

template <class E, Side SIDE>
constexpr long box_words() {
    return SIDE == A ? E::A_ROWS * E::A_WORDS : E::B_ROWS * E::B_WORDS;
}

// Rows of a panel, and how many panels are packed at once.
template <class E, Side SIDE>
constexpr long WIDTH = SIDE == A ? E::A_ROWS : E::B_ROWS;
template <class E, Side SIDE>
constexpr long AT_ONCE = SIDE == A ? E::A_PANELS : 1;

template <class E, Side SIDE>
void pack(const Source& s, uint32_t* out) {
    constexpr long rows = WIDTH<E, SIDE> * AT_ONCE<E, SIDE>;
    long boxes = (s.k + BOX - 1) / BOX, panel = boxes * box_words<E, SIDE>(), groups = (s.rows + rows - 1) / rows;
    auto pack_box = [&](long g, long b) {
        uint32_t* to = out + g * AT_ONCE<E, SIDE> * panel + b * box_words<E, SIDE>();
        E::template pack_box<SIDE>(s, g * rows, b, to, panel);
    };
    // Along memory: a K-outer operand has neighbouring panels side by side, else neighbouring boxes are.
    if (s.k_outer)
        for (long b = 0; b < boxes; b++)
            for (long g = 0; g < groups; g++) pack_box(g, b);
    else
        for (long g = 0; g < groups; g++)
            for (long b = 0; b < boxes; b++) pack_box(g, b);
}

template <class E, size_t... I>
constexpr auto tile_table(std::index_sequence<I...>) {
    return std::array{&E::template tile<I + 1>...};
}

// C += (rows of A) @ B for one block of K; `packed_b` is the whole of it, `packed_a` the caller's own scratch.
template <class E>
void multiply(const Source& a, const uint32_t* packed_b, long n, uint32_t* packed_a, Tile t) {
    static constexpr auto tiles = tile_table<E>(std::make_index_sequence<E::TILE_ROWS>());
    pack<E, A>(a, packed_a);
    long boxes = (a.k + BOX - 1) / BOX;
    long a_words = boxes * box_words<E, A>(), b_words = boxes * box_words<E, B>();
    for (long j = 0; j < n; j += E::B_ROWS)
        for (long i = 0; i < a.rows; i += E::TILE_ROWS) {
            long rows = std::min<long>(E::TILE_ROWS, a.rows - i);
            Tile u = {t.c + i * t.stride + j, t.stride, n - j, t.bias ? t.bias + j : nullptr, t.add};
            for (long r = 0; r < rows; r++)  // by the time the sums are there, so is C
                for (long line = 0; line < E::B_ROWS; line += 16) __builtin_prefetch(u.c + r * t.stride + line, 1);
            tiles[rows - 1](packed_a + i / E::A_ROWS * a_words + i % E::A_ROWS, packed_b + j / E::B_ROWS * b_words,
                            boxes, u);
        }
}

struct Scratch {
    uint32_t* words;
    explicit Scratch(long count) : words(allocate(count)) {}
    Scratch(const Scratch&) = delete;
    ~Scratch() { free(words); }
};

template <class E, Side SIDE>
long panel_words(long rows, long k) {
    constexpr long at_once = WIDTH<E, SIDE> * AT_ONCE<E, SIDE>;
    long panels = (rows + at_once - 1) / at_once * AT_ONCE<E, SIDE>;
    return panels * ((std::min(K_BLOCK, k) + BOX - 1) / BOX) * box_words<E, SIDE>();
}

template <class E>
Scratch scratch_of_a(const Source& a) {
    return Scratch(panel_words<E, A>(std::min(M_BLOCK, a.rows), a.k));
}

// C of one batch item. `on_rows` runs its argument for each block of rows of A, with scratch of the caller's own.
template <class E, class OnRows>
void run_item(const Source& a, const Source& b, const Tile& t, uint32_t* packed_b, OnRows on_rows) {
    for (long k = 0; k == 0 || k < a.k; k += K_BLOCK) {  // K = 0 makes one empty sum
        pack<E, B>(b.part(0, b.rows, k, K_BLOCK), packed_b);
        on_rows([&](long i, uint32_t* packed_a) {
            Tile u = {t.c + i * t.stride, t.stride, b.rows, k ? nullptr : t.bias, t.add || k};
            multiply<E>(a.part(i, M_BLOCK, k, K_BLOCK), packed_b, b.rows, packed_a, u);
        });
    }
}

template <class E>
bool run_items(const Source& a, long a_batch, const Source& b, long b_batch, const Tile& t, long c_batch, long from,
               long to) {
    Scratch packed_b(panel_words<E, B>(b.rows, a.k)), packed_a = scratch_of_a<E>(a);
    if (!packed_b.words || !packed_a.words) return false;
    for (long item = from; item < to; item++) {
        Source item_a = a, item_b = b;
        Tile item_t = t;
        item_a.data += item * a_batch;
        item_b.data += item * b_batch;
        item_t.c += item * c_batch;
        run_item<E>(item_a, item_b, item_t, packed_b.words, [&](auto block) {
            for (long i = 0; i < a.rows; i += M_BLOCK) block(i, packed_a.words);
        });
    }
    return true;
}

template <class E>
bool run_on_threads(const Source& a, const Source& b, const Tile& t, int threads) {
    Scratch packed_b(panel_words<E, B>(b.rows, a.k));
    bool ok = packed_b.words;
    if (ok)
        run_item<E>(a, b, t, packed_b.words, [&](auto block) {
#pragma omp parallel num_threads(threads) reduction(&& : ok)
            {
                Scratch packed_a = scratch_of_a<E>(a);
                ok = packed_a.words;
#pragma omp for schedule(static)
                for (long i = 0; i < a.rows; i += M_BLOCK)
                    if (packed_a.words) block(i, packed_a.words);
            }
        });
    return ok;
}

// A parallel region, even of one thread, takes as long as a small item of a batch.
template <class E>
int run(Source a, long a_batch, Source b, long b_batch, Tile t, long c_batch, long batch, int threads) {
    bool ok = true;
    if (threads == 1) {
        ok = run_items<E>(a, a_batch, b, b_batch, t, c_batch, 0, batch);
    } else if (batch == 1) {
        ok = run_on_threads<E>(a, b, t, threads);
    } else {
#pragma omp parallel for num_threads(threads) schedule(static) reduction(&& : ok)
        for (int part = 0; part < threads; part++) {
            long from = batch * part / threads, to = batch * (part + 1) / threads;
            ok = run_items<E>(a, a_batch, b, b_batch, t, c_batch, from, to) && ok;
        }
    }
    return ok ? DSQ_OK : DSQ_NO_MEMORY;
}

}  // namespace

EXPORT int32_t DSQ_NAME(gemm_runs)() { return cpu_runs(); }
EXPORT int32_t DSQ_NAME(gemm_takes_values)() { return cpu_takes_values(); }

// C (batch x M x N, rows contiguous) = A @ B, + C if accumulate, + bias (N values, may be null) in every row.
EXPORT int32_t DSQ_NAME(gemm)(GEMM_ARGUMENTS) {
    if (!valid(*a) || !valid(*b) || batch < 0 || m < 0 || n < 0 || k < 0) return DSQ_BAD_ARGUMENT;
    bool coded = a->bits && b->bits;
    if (!cpu_runs() || (!coded && !cpu_takes_values())) return DSQ_UNAVAILABLE;
    if (batch == 0 || m == 0 || n == 0) return DSQ_OK;
    Tile t = {c, c_row_stride, n, bias, accumulate != 0};
    Source sa(*a, m, k, b->bits), sb(*b, n, k, a->bits);
    return with_engine(*a, *b, [&](auto engine) {
        return run<decltype(engine)>(sa, a->batch_stride, sb, b->batch_stride, t, c_batch_stride, batch, threads);
    });
}

#else

EXPORT int32_t DSQ_NAME(gemm_runs)() { return 0; }
EXPORT int32_t DSQ_NAME(gemm_takes_values)() { return 0; }
EXPORT int32_t DSQ_NAME(gemm)(GEMM_ARGUMENTS) {
    return DSQ_UNAVAILABLE;
}

#endif
