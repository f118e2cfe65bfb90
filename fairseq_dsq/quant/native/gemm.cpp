// C = A @ B in float32 accuracy on 16-bit multipliers (AVX512-BF16 and -VNNI), with quantization fused into packing.
//
// Operands are float32 matrices seen as rows along the reduction dimension K: A is M rows, B is N rows (its columns).
// In memory K is either inner (row-major M x K, N x K) or outer (K x M, K x N).
//
// Packing turns W rows (a *panel*; W = A_ROWS or B_ROWS) into one stretch of boxes along K, 16 values of K to a box:
//
//     panel:  [box 0][box 1]...
//     box:    [term 0: 8 pairs x W words] [term 1, if any: 8 pairs x W words] [scales, Int16 only: W floats]
//     word:   the 16-bit values of one row at K = 2p (low half) and 2p + 1 (high half)
//
// so that the kernels read both operands front to back. Missing rows and the tail of the last box are zero. A word
// holds what one lane of one instruction multiplies; which one depends on the engine:
//
//     Bf16<1>  bfloat16 values: every value of both operands is a bfloat16 (codes of <= 9 bits). vdpbf16ps.
//     Bf16<2>  A = hi + lo, each a bfloat16 (<= 16 significant bits): two terms of A share one B.
//     Int16    integer codes and a power-of-two scale per box: A has 10 to 16 bits, B 2 to 9, both quantized here.
//              Sums within a box are exact integers (vpdpwssd), below 2^15 * 2^8 * 16 = 2^27; only a box's sum is
//              rounded and scaled into the float32 total. Costs 10/16 of Bf16<2> and is the more accurate one, so the
//              two do not agree bit for bit; values already quantized may be given again, with the same bits.
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
// What differs from float32 arithmetic: vdpbf16ps reads subnormal numbers as zero and flushes such results (Int16 does
// not); and Inf in B gives NaN, not Inf, under two terms of A, one of which is zero or of the other sign.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <utility>

#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {
// native/__init__.py has the same fields.
struct dsq_operand {
  const float* data;
  int64_t row_stride;    // floats from one row in memory to the next (a row of K x M if k_outer)
  int64_t batch_stride;  // floats from one batch item to the next; 0 shares the operand
  int32_t k_outer;       // 0: K is the inner, contiguous dimension; 1: K is the outer one
  int32_t bits;          // block floating point in boxes of 16 along K: A 2 to 16, B 2 to 9; 0: already representable
  int32_t terms;         // bfloat16 terms a value needs, if bits is 0: A 1 or 2, B 1
};
enum { DSQ_OK = 0, DSQ_NO_MEMORY = 1, DSQ_BAD_ARGUMENT = 2, DSQ_UNAVAILABLE = 3 };
}

#if defined(__AVX512BF16__)
#pragma GCC target("avx512vnni")  // every processor with AVX512-BF16 has it
#include <immintrin.h>

namespace {

constexpr int BOX = 16, PAIRS = BOX / 2, LANES = 16;
constexpr int ONE_TERM_BITS = 9;  // sign and 8 significant bits: a bfloat16
constexpr int A_ROWS = 12, B_ROWS = 2 * LANES;       // a tile of 12 x 32: 24 accumulators, 2 vectors of B, 1 of A
constexpr long K_BLOCK = 512, M_BLOCK = 16 * A_ROWS;  // a panel of A (12 KB) fits L1, a block of A (384 KB at most) L2
constexpr int PREFETCH = 64;  // floats ahead, when packing
constexpr int ROUND_HALF_EVEN = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
constexpr int SMALLER_MAGNITUDE = 2;  // range: of two operands, with the sign of the first
constexpr int NOT_FINITE = 0x99;      // fpclass: quiet NaN, +Inf, -Inf, signalling NaN
constexpr int EXPONENT_BIAS = 127, NAN_EXPONENT = 255;

inline __m512i bits_of(__m512 x) { return _mm512_castps_si512(x); }
inline __mmask16 first(long lanes) { return lanes >= LANES ? 0xFFFF : lanes > 0 ? (1u << lanes) - 1 : 0; }

// ---------------------------------------- packing
// Everything below works on one box of 16 rows: x[k] holds value k of each row.

inline void transpose(__m512 (&x)[BOX]) {
  __m512 t[BOX];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  auto pd = [&](int i) { return _mm512_castps_pd(t[i]); };
  auto lo = [&](int i, int j) { return _mm512_castpd_ps(_mm512_unpacklo_pd(pd(i), pd(j))); };
  auto hi = [&](int i, int j) { return _mm512_castpd_ps(_mm512_unpackhi_pd(pd(i), pd(j))); };
  __m512 s[BOX];
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

// Replaces the box by its integer codes and returns each row's 2^(E - 127 - scale_shift), NaN if it holds Inf or NaN.
// scalef multiplies by a power of two with one rounding, whatever the range; so is a scale below 2^-126 exact.
inline __m512 encode(__m512 (&x)[BOX], int bits, int scale_shift) {
  __m512i largest = _mm512_setzero_si512();  // twice the magnitude's bit pattern: the shift drops the sign
  for (int k = 0; k < BOX; k++) largest = _mm512_max_epu32(largest, _mm512_slli_epi32(bits_of(x[k]), 1));
  __m512i exponent = _mm512_max_epi32(_mm512_srli_epi32(largest, 24), _mm512_set1_epi32(1));
  __m512 e = _mm512_cvtepi32_ps(exponent);
  __m512 shift = _mm512_sub_ps(_mm512_set1_ps(EXPONENT_BIAS + bits - 2), e);
  __m512 max_code = _mm512_set1_ps((1 << (bits - 1)) - 1);
  for (int k = 0; k < BOX; k++) {
    __m512 code = _mm512_roundscale_ps(_mm512_scalef_ps(x[k], shift), ROUND_HALF_EVEN);
    x[k] = _mm512_range_ps(code, max_code, SMALLER_MAGNITUDE);
  }
  __m512 scale = _mm512_scalef_ps(_mm512_set1_ps(1), _mm512_sub_ps(e, _mm512_set1_ps(EXPONENT_BIAS + scale_shift)));
  __mmask16 bad = _mm512_cmpeq_epi32_mask(exponent, _mm512_set1_epi32(NAN_EXPONENT));
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits_of(scale), bad, _mm512_set1_epi32(0x7FC00000)));
}

inline __m512i interleave(__m512i low, __m512i high) {  // the low 16 bits of low, the high 16 bits of high
  return _mm512_mask_blend_epi16(0xAAAAAAAA, low, high);
}
inline __m512i bf16_pair(__m512 x, __m512 y) { return interleave(_mm512_srli_epi32(bits_of(x), 16), bits_of(y)); }
inline __m512 truncate_to_bf16(__m512 x) {
  return _mm512_castsi512_ps(_mm512_and_si512(bits_of(x), _mm512_set1_epi32(0xFFFF0000)));
}

template <int TERMS, int W>
inline void write_bf16(__m512 (&x)[BOX], int bits, uint32_t* out, __mmask16 lanes) {
  if (bits) {
    __m512 scale = encode(x, bits, bits - 2);
    for (int k = 0; k < BOX; k++) x[k] = _mm512_mul_ps(x[k], scale);  // exact: at most 15 bits, at least 2^-140
  } else {
    for (int k = 0; k < BOX; k++) {  // a NaN must not lose its last set bit to the cut and become Inf
      __mmask16 nan = _mm512_cmp_ps_mask(x[k], x[k], _CMP_UNORD_Q);
      x[k] = _mm512_castsi512_ps(_mm512_mask_or_epi32(bits_of(x[k]), nan, bits_of(x[k]), _mm512_set1_epi32(1 << 22)));
    }
  }
  for (int term = 0; term < TERMS; term++, out += PAIRS * W) {
    for (int p = 0; p < PAIRS; p++) _mm512_mask_storeu_epi32(out + p * W, lanes, bf16_pair(x[2 * p], x[2 * p + 1]));
    for (int k = 0; term + 1 < TERMS && k < BOX; k++) {  // Inf and NaN stay in the first term: Inf - Inf is NaN
      __mmask16 finite = _knot_mask16(_mm512_fpclass_ps_mask(x[k], NOT_FINITE));
      x[k] = _mm512_maskz_sub_ps(finite, x[k], truncate_to_bf16(x[k]));
    }
  }
}

template <int W>
inline void write_int16(__m512 (&x)[BOX], int bits, int scale_shift, uint32_t* out, __mmask16 lanes) {
  __m512 scale = encode(x, bits, scale_shift);
  for (int p = 0; p < PAIRS; p++) {
    __m512i low = _mm512_cvtps_epi32(x[2 * p]), high = _mm512_cvtps_epi32(x[2 * p + 1]);
    _mm512_mask_storeu_epi32(out + p * W, lanes, interleave(low, _mm512_slli_epi32(high, 16)));
  }
  _mm512_mask_storeu_ps(out + PAIRS * W, lanes, scale);
}

struct Source {  // an operand, or a part of it: `rows` rows of length k
  const float* data;
  long stride, rows, k;
  int k_outer, bits, scale_shift;
  Source part(long row, long row_count, long k0, long k_count) const {
    Source s = *this;
    s.data += k_outer ? k0 * stride + row : row * stride + k0;
    s.rows = std::min(row_count, rows - row);
    s.k = std::min(k_count, k - k0);
    return s;
  }
};

// Box `box` of the panel of W rows from `row` on.
template <class E, int TERMS, int W>
inline void pack_box(const Source& s, long row, long box, uint32_t* out) {
  long k0 = box * BOX, k = std::min<long>(BOX, s.k - k0);
  for (int g = 0; g < W; g += LANES) {
    long rows = std::min<long>(s.rows - row - g, W - g);  // may be < 1: then all of the group is padding
    __m512 x[BOX];
    const float* from = s.data + (s.k_outer ? k0 * s.stride + row + g : (row + g) * s.stride + k0);
    long vectors = s.k_outer ? k : rows;
    __mmask16 mask = s.k_outer ? first(rows) : first(k);
    // Sixteen rows are too many streams for the hardware to prefetch. To L2: rows 2^n apart share few sets of L1.
    for (int i = 0; i < BOX; i++) _mm_prefetch(from + i * s.stride + PREFETCH, _MM_HINT_T1);
    for (int i = 0; i < BOX; i++)  // a masked load does not touch what it leaves out
      x[i] = _mm512_maskz_loadu_ps(i < vectors ? mask : 0, from + i * s.stride);
    if (!s.k_outer) transpose(x);
    if constexpr (E::SCALES) write_int16<W>(x, s.bits, s.scale_shift, out + g, first(W - g));
    else write_bf16<TERMS, W>(x, s.bits, out + g, first(W - g));
  }
}

template <class E, int TERMS, int W>
void pack(const Source& s, uint32_t* out) {
  constexpr long box_words = (PAIRS * TERMS + E::SCALES) * W;
  long boxes = (s.k + BOX - 1) / BOX, panels = (s.rows + W - 1) / W;
  // Along memory: a K-outer operand has neighbouring panels side by side, else neighbouring boxes are.
  if (s.k_outer)
    for (long b = 0; b < boxes; b++)
      for (long p = 0; p < panels; p++) pack_box<E, TERMS, W>(s, p * W, b, out + (p * boxes + b) * box_words);
  else
    for (long p = 0; p < panels; p++)
      for (long b = 0; b < boxes; b++) pack_box<E, TERMS, W>(s, p * W, b, out + (p * boxes + b) * box_words);
}

// ---------------------------------------- kernels

struct Tile {  // where a tile goes: R rows of up to B_ROWS columns
  float* c;
  long stride, columns;
  const float* bias;  // added to each row, or null
  bool add;           // to what is there
};

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

template <int TERMS_>
struct Bf16 {
  static constexpr int TERMS = TERMS_, SCALES = 0, TILE_ROWS = A_ROWS;
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
  static constexpr int TERMS = 1, SCALES = 1, TILE_ROWS = A_ROWS / 2;  // two accumulators per value
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

template <class E, size_t... I>
constexpr auto tile_table(std::index_sequence<I...>) { return std::array{&E::template tile<I + 1>...}; }

// ---------------------------------------- driver

// C += (rows of A) @ B for one block of K; `packed_b` is the whole of it, `packed_a` the caller's own scratch.
template <class E>
void multiply(const Source& a, const uint32_t* packed_b, long n, uint32_t* packed_a, Tile t) {
  static constexpr auto tiles = tile_table<E>(std::make_index_sequence<E::TILE_ROWS>());
  pack<E, E::TERMS, A_ROWS>(a, packed_a);
  long boxes = (a.k + BOX - 1) / BOX;
  long a_words = boxes * (PAIRS * E::TERMS + E::SCALES) * A_ROWS, b_words = boxes * (PAIRS + E::SCALES) * B_ROWS;
  for (long j = 0; j < n; j += B_ROWS)
    for (long i = 0; i < a.rows; i += E::TILE_ROWS) {
      long rows = std::min<long>(E::TILE_ROWS, a.rows - i);
      Tile u = {t.c + i * t.stride + j, t.stride, n - j, t.bias ? t.bias + j : nullptr, t.add};
      for (long r = 0; r < rows; r++) {  // by the time the sums are there, so is C
        __builtin_prefetch(u.c + r * t.stride, 1);
        __builtin_prefetch(u.c + r * t.stride + LANES, 1);
      }
      tiles[rows - 1](packed_a + i / A_ROWS * a_words + i % A_ROWS, packed_b + j / B_ROWS * b_words, boxes, u);
    }
}

uint32_t* allocate(long words) {  // never nothing, whose address may be null
  return static_cast<uint32_t*>(aligned_alloc(64, (words * sizeof(uint32_t) / 64 + 1) * 64));
}

template <class E>
long panel_words(long rows, long width, long k, int terms) {
  long boxes = (std::min(K_BLOCK, k) + BOX - 1) / BOX, panels = (rows + width - 1) / width;
  return panels * boxes * (PAIRS * terms + E::SCALES) * width;
}

// One batch item; its blocks of rows on `threads` threads.
template <class E>
bool run_item(Source a, Source b, Tile t, int threads) {
  uint32_t* packed_b = allocate(panel_words<E>(b.rows, B_ROWS, a.k, 1));
  bool ok = packed_b;
  for (long k = 0; ok && (k == 0 || k < a.k); k += K_BLOCK) {  // K = 0 makes one empty sum
    pack<E, 1, B_ROWS>(b.part(0, b.rows, k, K_BLOCK), packed_b);
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : ok)
    {
      uint32_t* packed_a = allocate(panel_words<E>(std::min(M_BLOCK, a.rows), A_ROWS, a.k, E::TERMS));
      ok = packed_a;
#pragma omp for schedule(static)
      for (long i = 0; i < a.rows; i += M_BLOCK) {
        Tile u = {t.c + i * t.stride, t.stride, b.rows, k ? nullptr : t.bias, t.add || k};
        if (packed_a) multiply<E>(a.part(i, M_BLOCK, k, K_BLOCK), packed_b, b.rows, packed_a, u);
      }
      free(packed_a);
    }
  }
  free(packed_b);
  return ok;
}

template <class E>
int run(Source a, long a_batch, Source b, long b_batch, Tile t, long c_batch, long batch, int threads) {
  bool ok = true;
  int items_at_once = batch > 1 ? threads : 1;
#pragma omp parallel for num_threads(items_at_once) if (items_at_once > 1) schedule(static) reduction(&& : ok)
  for (long item = 0; item < batch; item++) {
    Source item_a = a, item_b = b;
    Tile item_t = t;
    item_a.data += item * a_batch;
    item_b.data += item * b_batch;
    item_t.c += item * c_batch;
    ok = run_item<E>(item_a, item_b, item_t, batch > 1 ? 1 : threads) && ok;
  }
  return ok ? DSQ_OK : DSQ_NO_MEMORY;
}

}  // namespace

EXPORT int32_t dsq_gemm_runs() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// C (batch x M x N, rows contiguous) = A @ B, + C if accumulate, + bias (N values, may be null) in every row.
EXPORT int32_t dsq_gemm(const dsq_operand* a, const dsq_operand* b, float* c, int64_t c_row_stride,
                        int64_t c_batch_stride, const float* bias, int32_t accumulate, int64_t batch, int64_t m,
                        int64_t n, int64_t k, int32_t threads) {
  bool a_ok = a->bits ? a->bits >= 2 && a->bits <= 16 : a->terms == 1 || a->terms == 2;
  bool b_ok = b->bits ? b->bits >= 2 && b->bits <= ONE_TERM_BITS : b->terms == 1;
  if (!a_ok || !b_ok || batch < 0 || m < 0 || n < 0 || k < 0) return DSQ_BAD_ARGUMENT;
  if (!dsq_gemm_runs()) return DSQ_UNAVAILABLE;
  if (batch == 0 || m == 0 || n == 0) return DSQ_OK;
  Tile t = {c, c_row_stride, n, bias, accumulate != 0};
  int terms = a->bits ? 1 + (a->bits > ONE_TERM_BITS) : a->terms;
  bool integers = terms == 2 && a->bits && b->bits;
  // Int16 moves A's 2^-(bits - 2) into B's scale: then A's own is always a normal number, and a box's sum, under
  // 2^(bits of A + bits of B + 2), times B's scale only overflows if B holds 2^122 or more.
  Source sa = {a->data, a->row_stride, m, k, a->k_outer, a->bits, 0};
  Source sb = {b->data, b->row_stride, n, k, b->k_outer, b->bits, a->bits + b->bits - 4};
  auto engine = integers ? run<Int16> : terms == 2 ? run<Bf16<2>> : run<Bf16<1>>;
  return engine(sa, a->batch_stride, sb, b->batch_stride, t, c_batch_stride, batch, threads);
}

#else

EXPORT int32_t dsq_gemm_runs() { return 0; }
EXPORT int32_t dsq_gemm(const dsq_operand*, const dsq_operand*, float*, int64_t, int64_t, const float*, int32_t, int64_t,
                        int64_t, int64_t, int64_t, int32_t) {
  return DSQ_UNAVAILABLE;
}

#endif
