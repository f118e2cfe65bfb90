// An update of Adam, row by row: decodes a row's moments, updates them and the weight, encodes the moments. Compiled
// once per instruction set; LowBitAdam of fairseq_dsq/adam.py is the definition, bit for bit.
//
// What torch's kernels compute on CPUs with AVX2 or AVX-512 (`fused`), vector lanes and what is left of them alike:
//   x.add_(y, alpha=a)         fma(a, y, x)
//   x.addcmul_(y, z, value=a)  fma(a * y, z, x)
//   x.addcdiv_(y, z, value=a)  x + (a * y) / z
// and on other CPUs the same with a product and a sum in place of each fma.

#include "names.h"
#include "rows.h"

extern "C" {

// Of one update; native/__init__.py fills them.
struct DsqAdam {
    float beta1, rest1, beta2, rest2, eps;  // rest = 1 - beta
    float decay, size;                      // weight decay times learning rate; step size, bias corrections included
    float residual;                         // what m gets of a step of codes that rounding left undone; or 0
};

// A weight that is held as 8-bit integers: scale of row r at scales[r * scale_stride].
struct DsqCodes {
    uint8_t* codes;
    float* scales;
    int64_t scale_stride;
    float min_code, max_code;
    uint64_t seed;
    int64_t changed, bad;  // codes that changed, rows that cannot be told any more; counted here
};

// v packed as log8/row; m / sqrt(v'), where v' is what v's bytes say, as int8/row.
struct DsqMoments {
    uint8_t *m, *v;
    const Log8* log8;
    uint64_t m_seed, v_seed;
    float* scratch;  // for each thread two rows, each of whole vectors
    int32_t stochastic, first;  // first: both are zero, whatever is in memory
};
}

namespace {

template <bool FUSED>
INLINE F add_product(F x, F a, F b) {
    return FUSED ? multiply_add(a, b, x) : x + a * b;
}

INLINE F add_quotient(F x, F a, F b) { return x + a / b; }

// `value`, 0 in lanes beyond the first `count`.
template <class V>
INLINE V keep(V value, int64_t count) {
    return count < LANES ? load<V>(&value, count) : value;
}

// ---- The weight

struct FloatRow {
    float* values;

    INLINE FloatRow(float* values, int64_t row, int64_t length) : values(values + row * length) {}

    template <bool FUSED>
    INLINE void update(const DsqAdam& adam, F& m, F deviation, int64_t at, int64_t count, uint32_t) {
        F value = load<F>(values + at, count);
        if (adam.decay != 0) value = add_product<FUSED>(value, value, all(-adam.decay));
        store(values + at, add_quotient(value, m * -adam.size, deviation), count);
    }
    INLINE void finish() {}
};

// Of a weight that is held as codes: code' = clamp(code + SR(-step / scale)); nn/coded.py is the definition.
struct CodedRow {
    DsqCodes& weight;
    uint8_t* codes;
    float* held_scale;
    // Copies, which no store to the codes can change.
    F scale, min_code, max_code;
    uint64_t seed;
    I changed{}, bad{};

    INLINE CodedRow(DsqCodes* weight, int64_t row, int64_t length)
        : weight(*weight), codes(weight->codes + row * length),
          held_scale(weight->scales + row * weight->scale_stride), scale(all(*held_scale)),
          min_code(all(weight->min_code)), max_code(all(weight->max_code)), seed(weight->seed) {}

    template <bool FUSED>
    INLINE void update(const DsqAdam& adam, F& m, F deviation, int64_t at, int64_t count, uint32_t place) {
        F value = load_int8(codes + at, count) * scale;
        F rest = subtract(add_quotient(value * adam.decay, m * adam.size, deviation), at, count, place);
        if (adam.residual != 0) m = add_product<FUSED>(m, adam.residual * rest, deviation);
    }

    // Gives what rounding left undone of the step. `place` is the first value's in the weight.
    INLINE F subtract(F step, int64_t at, int64_t count, uint32_t place) {
        F delta = step / -scale;
        U size = bits<U>(delta) & ~SIGN, sign = bits<U>(delta) & SIGN;
        I finite = (I)(size < INFINITE);
        bad |= keep(~finite, count);
        F magnitude = bits<F>(size & bits<U>(finite)), whole = floor(magnitude);
        U threshold = whole_part((magnitude - whole) * 0x1p32f);  // the fraction in units of 2^-32
        I away = (I)(random_bits(lane_numbers() + place, seed) < threshold);
        F moved = bits<F>(bits<U>(whole + one_where(away)) | sign);
        F before = load_int8(codes + at, count), after = min(max_code, max(min_code, moved + before));
        changed -= keep((I)(after != before), count);  // a comparison is -1
        store_int8(codes + at, after, count);
        F within = max(bits<F>(bits<U>(magnitude) | sign), min_code - before);
        return (after - before - min(within, max_code - before)) * scale;
    }

    INLINE void finish() {
        if (any(bad) && weight.scale_stride) *held_scale = __builtin_nanf("");
        int64_t count = 0;
        for (int lane = 0; lane < LANES; lane++) count += changed[lane];
        __atomic_fetch_add(&weight.changed, count, __ATOMIC_RELAXED);
        __atomic_fetch_add(&weight.bad, any(bad), __ATOMIC_RELAXED);
    }
};

// One scale for all rows becomes NaN when all have read it.
void finish(DsqCodes& weight) {
    if (weight.bad && !weight.scale_stride) *weight.scales = __builtin_nanf("");
}

// ---- The moments

struct Moments {
    const DsqMoments& held;
    Rows m_rows, v_rows;
    int64_t row, length;
    float m_scale, v_scale;
    float *m, *v;
    LargestPositive largest;

    INLINE Moments(const DsqMoments& held, int64_t row, int64_t rows, int64_t length)
        : held(held), m_rows{held.m, rows, length}, v_rows{held.v, rows, length}, row(row),
          length(length), m_scale(m_rows.scale(row)), v_scale(v_rows.scale(row)) {
        int64_t room = (length + LANES - 1) / LANES * LANES;
        m = held.scratch + 2 * room * thread_number();
        v = m + room;
    }

    INLINE void get(F& old_m, F& old_v, int64_t at, int64_t count) const {
        if (held.first) {
            old_m = old_v = F{};
            return;
        }
        old_v = load_log8(v_rows.codes(row) + at, *held.log8, count) * v_scale;
        old_m = load_int8(m_rows.codes(row) + at, count) * m_scale * square_root(old_v);
    }
    INLINE void put(F new_m, F new_v, int64_t at, int64_t count) {
        largest.see(keep(new_v, count));
        store(m + at, new_m);
        store(v + at, new_v);
    }

    template <bool STOCHASTIC>
    INLINE void encode() {
        uint8_t *m_codes = m_rows.codes(row), *v_codes = v_rows.codes(row);
        uint32_t place = (uint32_t)(row * length);
        float scale = scale_of(largest.found(), 1.0f);
        v_rows.set_scale(row, scale);
        if (!(scale > 0)) memset(v_codes, 0, length);
        Largest ratios;
        for_vectors(length, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
            F element = all(1.0f);
            if (scale > 0) {
                element = load<F>(v + at) / scale;
                U rounded = round_to_log8<STOCHASTIC>(element, *held.log8, lane_numbers() + (place + (uint32_t)at),
                                                      held.v_seed);
                store_log8(v_codes + at, rounded, count);
            }
            // No root of a float32 lies below 2^-75 but 0. A NaN comes through.
            F root = max(all(0x1p-75f), square_root(element * scale));
            F ratio = load<F>(m + at) / root;
            ratios.see(keep(ratio, count));
            store(m + at, ratio);
        });
        scale = scale_of(ratios.found(), LARGEST_INT8);
        m_rows.set_scale(row, scale);
        if (!(scale > 0)) {
            memset(m_codes, 0, length);
            return;
        }
        for_vectors(length, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
            U places = lane_numbers() + (place + (uint32_t)at);
            store_int8(m_codes + at, int8_element<STOCHASTIC>(load<F>(m + at) / scale, places, held.m_seed), count);
        });
    }
    INLINE void finish() {
        if (held.stochastic)
            encode<true>();
        else
            encode<false>();
    }
};

// ---- An update

template <bool FUSED, class Weight, class Held>
void update(const DsqAdam& adam, Held weight, const float* grad, const DsqMoments& held, int64_t rows, int64_t length,
            int threads) {
    for_each(rows, threads, [&](int64_t row) {
        Weight weights(weight, row, length);
        Moments moments(held, row, rows, length);
        for_vectors(length, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
            int64_t place = row * length + at;
            F g = load<F>(grad + place, count), m, v;
            moments.get(m, v, at, count);
            m = add_product<FUSED>(m * adam.beta1, all(adam.rest1), g);
            v = add_product<FUSED>(v * adam.beta2, adam.rest2 * g, g);
            weights.template update<FUSED>(adam, m, square_root(v) + adam.eps, at, count, (uint32_t)place);
            moments.put(m, v, at, count);
        });
        weights.finish();
        moments.finish();
    });
}

template <class Weight, class Held>
void update(const DsqAdam& adam, Held weight, const float* grad, const DsqMoments& held, int64_t rows, int64_t length,
            int threads, bool fused) {
    auto run = fused ? update<true, Weight, Held> : update<false, Weight, Held>;
    run(adam, weight, grad, held, rows, length, threads);
}

}  // namespace

EXPORT void DSQ_NAME(adam)(const DsqAdam* adam, int32_t fused, float* values, const float* grad, const DsqMoments* held,
                           int64_t rows, int64_t length, int32_t threads) {
    update<FloatRow>(*adam, values, grad, *held, rows, length, threads, fused);
}

EXPORT void DSQ_NAME(adam_of_codes)(const DsqAdam* adam, int32_t fused, DsqCodes* codes, const float* grad,
                                    const DsqMoments* held, int64_t rows, int64_t length, int32_t threads) {
    update<CodedRow>(*adam, codes, grad, *held, rows, length, threads, fused);
    finish(*codes);
}

// `step` is subtracted from a weight that is held as codes, and becomes what rounding left undone of it if `leave_rest`.
EXPORT void DSQ_NAME(subtract)(DsqCodes* codes, float* step, int32_t leave_rest, int64_t rows, int64_t length,
                               int32_t threads) {
    for_each(rows, threads, [&](int64_t row) {
        CodedRow coded(codes, row, length);
        for (int64_t at = 0; at < length; at += LANES) {
            int64_t place = row * length + at, count = length - at;
            F rest = coded.subtract(load<F>(step + place, count), at, count, (uint32_t)place);
            if (leave_rest) store(step + place, rest, count);
        }
        coded.finish();
    });
    finish(*codes);
}
