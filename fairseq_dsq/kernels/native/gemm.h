// What the GEMM kernels have in common: their operands as native/__init__.py describes them, and what they refuse.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "names.h"

extern "C" {
// native/__init__.py has the same fields.
struct DsqOperand {
    const float* data;
    int64_t row_stride;    // floats from one row in memory to the next (a row of K x M if k_outer)
    int64_t batch_stride;  // floats from one batch item to the next; 0 shares the operand
    int32_t k_outer;       // 0: K is the inner, contiguous dimension; 1: K is the outer one
    int32_t bits;          // block floating point in boxes of 16 along K, 2 to 16; 0: already representable
    int32_t terms;         // bfloat16 terms a value needs, 1 or 2, if bits is 0
};
enum { DSQ_OK = 0, DSQ_NO_MEMORY = 1, DSQ_BAD_ARGUMENT = 2, DSQ_UNAVAILABLE = 3 };
}

#define GEMM_ARGUMENTS                                                                                     \
    const DsqOperand *a, const DsqOperand *b, float *c, int64_t c_row_stride, int64_t c_batch_stride,      \
        const float *bias, int32_t accumulate, int64_t batch, int64_t m, int64_t n, int64_t k, int32_t threads

namespace {

constexpr int BOX = 16;
constexpr int ONE_TERM_BITS = 9;  // sign and 8 significant bits: a bfloat16

enum Side { A, B };

inline int terms_of(const DsqOperand& x) { return x.bits ? 1 + (x.bits > ONE_TERM_BITS) : x.terms; }
inline bool valid(const DsqOperand& x) {
    return x.bits ? x.bits >= 2 && x.bits <= 16 : x.terms == 1 || x.terms == 2;
}

struct Source {  // an operand, or a part of it: `rows` rows of length k
    const float* data;
    long stride, rows, k;
    int k_outer, bits, other_bits;

    Source(const DsqOperand& x, long rows, long k, int other_bits)
        : data(x.data), stride(x.row_stride), rows(rows), k(k), k_outer(x.k_outer), bits(x.bits),
          other_bits(other_bits) {}

    Source part(long row, long row_count, long k0, long k_count) const {
        Source s = *this;
        s.data += k_outer ? k0 * stride + row : row * stride + k0;
        s.rows = std::min(row_count, rows - row);
        s.k = std::min(k_count, k - k0);
        return s;
    }
    // Integer codes are worth 2^(E - (bits - 2)). B's scale takes A's 2^-(bits - 2) along: then A's own is always a
    // normal number, and a box's sum, under 2^(bits of A + bits of B + 2), times B's scale only overflows if B holds
    // 2^122 or more.
    int scale_shift(Side side) const { return side == B ? bits + other_bits - 4 : 0; }
};

inline uint32_t* allocate(long words) {  // never nothing, whose address may be null
    return static_cast<uint32_t*>(aligned_alloc(64, (words * sizeof(uint32_t) / 64 + 1) * 64));
}

}  // namespace
