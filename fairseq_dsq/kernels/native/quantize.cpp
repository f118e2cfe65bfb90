// Quantize, pack and unpack float32 tensors on the CPU: fairseq_dsq/formats is the definition, bit for bit.
//
// A contiguous tensor is seen as (before, length, after) with boxes of n values along `length`, or the whole tensor
// is one box. encode.h has the codes of a box, runs.h and tiles.h the two ways that boxes lie in memory, bits.h the
// bits.
//
// Packed bytes: a part of all full boxes, then a part of the short last ones; each part is one byte e per box in the
// order (before, boxes, after), then the boxes' codes in the same order, `bits` bits each, little-endian, a box
// starting on a whole byte.
//
// Tensors are read where they lie; nothing is transposed. First the largest magnitude of each box is found, then the
// scales of all boxes of the run or tile, then its values are rounded, all within the caches.
//
// This file is compiled once per instruction set: DSQ_NAME(f) is the exported name. No fused multiply-add and no fast
// math: each operation is rounded as PyTorch rounds it.

#include <type_traits>

#include "names.h"
#include "runs.h"
#include "tiles.h"

namespace {

struct Shape {
    int64_t before, length, after;

    int64_t count() const { return before * length * after; }
};

// Boxes of equal size: all full ones, or all short ones.
struct Part {
    int64_t start;         // of the first box along the length
    int64_t boxes, n;      // of a fibre, of a box
    int64_t exponents_at;  // where they lie in the packed bytes
    int64_t codes_at, box_bytes;
};

// work(part) for each part of a packed tensor.
template <class Work>
INLINE void for_parts(Shape shape, const DsqFormat& format, Work work) {
    int64_t n = format.box_size, full = shape.length / n, rest = shape.length % n, at = 0;
    const Part parts[] = {{0, full, n, 0, 0, 0}, {full * n, 1, rest, 0, 0, 0}};
    for (Part part : parts) {
        int64_t boxes = shape.before * part.boxes * shape.after;
        if (!boxes || !part.n) continue;
        part.exponents_at = at;
        part.codes_at = at + boxes;
        part.box_bytes = bytes_of(part.n, format.bits);
        at += boxes * (1 + part.box_bytes);
        work(part);
    }
}

// Fibres without a short box follow on one another: they are one long one.
INLINE Shape joined(Shape shape, const DsqFormat& format) {
    return shape.after == 1 && shape.length % format.box_size == 0 ? Shape{1, shape.before * shape.length, 1} : shape;
}

// Boxes along the last dimension: work(place of the first value, place of the first box in its part, boxes).
template <class Work>
INLINE void for_runs(Shape shape, const Part& part, int threads, Work work) {
    int64_t per_run = part.n < CHUNK ? smaller(CHUNK / part.n, BOXES) : 1;
    int64_t runs = (part.boxes + per_run - 1) / per_run;
    for_each(shape.before * runs, threads, [&](int64_t item) {
        int64_t fibre = item / runs, box = item % runs * per_run;
        work(fibre * shape.length + part.start + box * part.n, fibre * part.boxes + box,
             smaller(per_run, part.boxes - box));
    });
}

// One row of boxes along another dimension: work(tile, place of its first value, place of its first box in its part).
template <class Work>
INLINE void for_tiles(Shape shape, const Part& part, int64_t row_of_boxes, Work work) {
    int64_t fibre = row_of_boxes / part.boxes, box = row_of_boxes % part.boxes;
    for (int64_t column = 0; column < shape.after; column += BOXES) {
        int64_t at = (fibre * shape.length + part.start + box * part.n) * shape.after + column;
        Tile tile{part.n, smaller(BOXES, shape.after - column), shape.after, (uint32_t)at};
        work(tile, at, row_of_boxes * shape.after + column);
    }
}

// A tensor that is one box: work(place of the first value, values).
template <class Work>
INLINE void for_chunks(Shape shape, int threads, Work work) {
    int64_t count = shape.count();
    for_each((count + CHUNK - 1) / CHUNK, threads,
             [&](int64_t chunk) { work(chunk * CHUNK, smaller(CHUNK, count - chunk * CHUNK)); });
}

U exponent_of_all(const float* x, Shape shape, const DsqFormat& format, int threads) {
    int64_t count = shape.count(), shares = threads < 1 ? 1 : threads;
    int64_t share = (count / shares / CHUNK + 1) * CHUNK;
    uint32_t largest = 0;
#pragma omp parallel for num_threads(threads) reduction(max : largest) if (threads > 1)
    for (int64_t start = 0; start < count; start += share) {
        uint32_t found = largest_of(x + start, smaller(share, count - start));
        largest = found > largest ? found : largest;
    }
    return exponent_of(all(largest), format);
}

// `index` is the place of x's first value in the tensor.
template <bool STOCHASTIC, class Out, class Format>
void quantize_fibres(const float* x, Out* out, int64_t index, Shape shape, Format format, uint64_t seed, int threads) {
    shape = joined(shape, format);
    for_parts(shape, format, [&](const Part& part) {
        for_runs(shape, part, threads, [&](int64_t at, int64_t, int64_t boxes) {
            quantize_run<STOCHASTIC>(x + at, out + at, boxes, part.n, (uint32_t)(index + at), format, seed);
        });
    });
}

template <bool STOCHASTIC, class Out, class Format>
void fake_quantize(const float* x, Out* out, Shape shape, Format format, uint64_t seed, int threads) {
    if (!format.box_size) {
        U exponent = exponent_of_all(x, shape, format, threads);
        Scale down = scale_down(exponent, format), up = scale_up(exponent, format);
        for_chunks(shape, threads, [&](int64_t at, int64_t count) {
            quantize_stretch<STOCHASTIC>(x + at, out + at, count, (uint32_t)at, down, up, format, seed);
        });
        return;
    }
    if (shape.after == 1) return quantize_fibres<STOCHASTIC>(x, out, 0, shape, format, seed, threads);
    for_parts(shape, format, [&](const Part& part) {
        for_each(shape.before * part.boxes, threads, [&](int64_t row_of_boxes) {
            for_tiles(shape, part, row_of_boxes, [&](Tile tile, int64_t at, int64_t) {
                quantize_tile<STOCHASTIC>(x + at, out + at, tile, format, seed);
            });
        });
    });
}

template <bool STOCHASTIC, class Format>
void pack_row_of_boxes(const float* x, uint8_t* out, Shape shape, const Part& part, int64_t row_of_boxes, Format format,
                       uint64_t seed) {
    for_tiles(shape, part, row_of_boxes, [&](Tile tile, int64_t at, int64_t box) {
        pack_tile<STOCHASTIC>(x + at, out + part.exponents_at + box, out + part.codes_at + box * part.box_bytes, tile,
                              format, seed);
    });
}

// use(T()) with the T that holds a code.
template <class Use>
INLINE void with_code_type(const DsqFormat& format, Use use) {
    if (format.bits <= 8)
        use(uint8_t());
    else if (format.bits <= 16)
        use(uint16_t());
    else
        use(uint32_t());
}

template <bool STOCHASTIC, class Format>
void pack(const float* x, uint8_t* out, Shape shape, Format format, uint64_t seed, int threads) {
    if (!format.box_size) {
        U exponent = exponent_of_all(x, shape, format, threads);
        Scale down = scale_down(exponent, format);
        *out = (uint8_t)exponent[0];
        return with_code_type(format, [&](auto type) {
            for_chunks(shape, threads, [&](int64_t at, int64_t count) {
                uint8_t* codes = out + 1 + at / 8 * format.bits;
                pack_stretch<STOCHASTIC, decltype(type)>(x + at, codes, count, (uint32_t)at, down, format, seed);
            });
        });
    }
    shape = joined(shape, format);
    for_parts(shape, format, [&](const Part& part) {
        if (shape.after > 1)
            return for_each(shape.before * part.boxes, threads, [&](int64_t row_of_boxes) {
                pack_row_of_boxes<STOCHASTIC>(x, out, shape, part, row_of_boxes, format, seed);
            });
        with_code_type(format, [&](auto type) {
            for_runs(shape, part, threads, [&](int64_t at, int64_t box, int64_t boxes) {
                uint8_t *exponents = out + part.exponents_at + box, *codes = out + part.codes_at + box * part.box_bytes;
                pack_run<STOCHASTIC, decltype(type)>(x + at, exponents, codes, boxes, part.n, (uint32_t)at, format,
                                                     seed);
            });
        });
    });
}

template <class Out, class Format>
void unpack(const uint8_t* data, Out* out, Shape shape, Format format, int threads) {
    if (!format.box_size) {
        Scale up = scale_up(all((uint32_t)*data), format);
        return with_code_type(format, [&](auto type) {
            for_chunks(shape, threads, [&](int64_t at, int64_t count) {
                unpack_stretch<decltype(type)>(data + 1 + at / 8 * format.bits, out + at, count, up, format);
            });
        });
    }
    shape = joined(shape, format);
    for_parts(shape, format, [&](const Part& part) {
        const uint8_t *exponents = data + part.exponents_at, *codes = data + part.codes_at;
        if (shape.after > 1)
            return for_each(shape.before * part.boxes, threads, [&](int64_t row_of_boxes) {
                for_tiles(shape, part, row_of_boxes, [&](Tile tile, int64_t at, int64_t box) {
                    unpack_tile(exponents + box, codes + box * part.box_bytes, out + at, tile, format);
                });
            });
        with_code_type(format, [&](auto type) {
            for_runs(shape, part, threads, [&](int64_t at, int64_t box, int64_t boxes) {
                unpack_run<decltype(type)>(exponents + box, codes + box * part.box_bytes, out + at, boxes, part.n,
                                           format);
            });
        });
    });
}

// x as (before, length, after) once for two readers: the operand has its boxes along `after`, the stash along
// `length`. Each row of the stash's boxes is quantized for the operand, and packed while it is in the cache.
template <class Out, class Operand, class Stash>
void quantize_and_pack(const float* x, Out* operand, uint8_t* stash, Shape shape, Operand operand_format,
                       Stash stash_format, int threads) {
    for_parts(shape, stash_format, [&](const Part& part) {
        for_each(shape.before * part.boxes, threads, [&](int64_t row_of_boxes) {
            int64_t fibre = row_of_boxes / part.boxes, box = row_of_boxes % part.boxes;
            int64_t at = (fibre * shape.length + part.start + box * part.n) * shape.after;
            quantize_fibres<false>(x + at, operand + at, at, {part.n, shape.after, 1}, operand_format, 0, 1);
            pack_row_of_boxes<false>(x, stash, shape, part, row_of_boxes, stash_format, 0);
        });
    });
}

// Of NVFP4: under which the largest finite magnitude is the largest element times the largest scale.
float tensor_scale_of(const float* x, int64_t count, int threads) {
    int64_t shares = threads < 1 ? 1 : threads, share = (count / shares / CHUNK + 1) * CHUNK;
    uint32_t largest = 0;
#pragma omp parallel for num_threads(threads) reduction(max : largest) if (threads > 1)
    for (int64_t start = 0; start < count; start += share) {
        U found{};
        for (int64_t i = start; i < smaller(start + share, count); i += LANES) {
            U here = magnitude(x + i, smaller(LANES, count - i));
            found = max(found, here & (U)(here < EXPONENT));
        }
        uint32_t of_share = largest_lane(found);
        largest = of_share > largest ? of_share : largest;
    }
    float scale = scale_of(largest, NVFP4::MOST_OF_SCALE * 6.0f);
    return scale > NVFP4::LEAST_OF_TENSOR ? scale : NVFP4::LEAST_OF_TENSOR;
}

// use(out) as what it holds. Minifloats under the smallest scales reach further down than bfloat16.
template <class Format, class Use>
INLINE void with_output(void* out, int32_t bfloat16, const Format&, Use use) {
    if constexpr (std::is_same_v<Format, Integers>)
        if (bfloat16) return use((uint16_t*)out);
    use((float*)out);
}

// work(format) for every kind of elements and scales.
template <class Work>
INLINE void with_format(const DsqFormat& format, Work work) {
    if (format.scale == NVFP4::SCALE)
        work(NVFP4(format));
    else
        with_elements(format, work);
}

// Rows, each one box: elements code * 2^-fraction_bits, NaN throughout where one holds Inf or NaN, and factors 2^E,
// there 1. Their product is the value.
template <bool STOCHASTIC, class Format>
void factorize(const float* x, float* elements, float* factors, int64_t rows, int64_t length, Format format,
               uint64_t seed, int threads) {
    for_each(rows, threads, [&](int64_t row) {
        int64_t at = row * length;
        U exponent = exponent_of(all(largest_of(x + at, length)), format);
        bool finite = exponent[0] != NAN_EXPONENT;
        Scale down = scale_down(exponent, format), factor = decode_scale(exponent, 0);
        Scale up{all(finite ? 1.0f : __builtin_nanf("")), power_of_two(all(-format.fraction_bits()))};
        quantize_stretch<STOCHASTIC>(x + at, elements + at, length, (uint32_t)at, down, up, format, seed);
        factors[row] = finite ? times(all(1.0f), factor)[0] : 1.0f;
    });
}

}  // namespace

// ---- Exported: out holds float32, or bfloat16 (uint16_t) where `bfloat16` says so, of integers

EXPORT void DSQ_NAME(fake_quantize)(const float* x, void* out, int32_t bfloat16, int64_t before, int64_t length,
                                    int64_t after, const DsqFormat* format, int32_t stochastic, uint64_t seed,
                                    int32_t threads) {
    Shape shape{before, length, after};
    with_format(*format, [&](auto f) {
        with_output(out, bfloat16, f, [&](auto to) {
            if (stochastic) return fake_quantize<true>(x, to, shape, f, seed, threads);
            fake_quantize<false>(x, to, shape, f, seed, threads);
        });
    });
}

EXPORT void DSQ_NAME(pack)(const float* x, uint8_t* out, int64_t before, int64_t length, int64_t after,
                           const DsqFormat* format, int32_t stochastic, uint64_t seed, int32_t threads) {
    Shape shape{before, length, after};
    with_format(*format, [&](auto f) {
        if constexpr (std::is_same_v<decltype(f), NVFP4>) out = f.put_tensor_scale(out);
        if (stochastic) return pack<true>(x, out, shape, f, seed, threads);
        pack<false>(x, out, shape, f, seed, threads);
    });
}

EXPORT void DSQ_NAME(unpack)(const uint8_t* data, void* out, int32_t bfloat16, int64_t before, int64_t length,
                             int64_t after, const DsqFormat* format, int32_t threads) {
    Shape shape{before, length, after};
    with_format(*format, [&](auto f) {
        if constexpr (std::is_same_v<decltype(f), NVFP4>) data = f.get_tensor_scale(data);
        with_output(out, bfloat16, f, [&](auto to) { unpack(data, to, shape, f, threads); });
    });
}

EXPORT float DSQ_NAME(tensor_scale)(const float* x, int64_t count, int32_t threads) {
    return tensor_scale_of(x, count, threads);
}

EXPORT void DSQ_NAME(quantize_and_pack)(const float* x, void* operand, int32_t bfloat16, uint8_t* stash, int64_t before,
                                        int64_t length, int64_t after, const DsqFormat* operand_format,
                                        const DsqFormat* stash_format, int32_t threads) {
    Shape shape{before, length, after};
    with_elements(*operand_format, [&](auto first) {
        with_elements(*stash_format, [&](auto second) {
            with_output(operand, bfloat16, first,
                        [&](auto to) { quantize_and_pack(x, to, stash, shape, first, second, threads); });
        });
    });
}

EXPORT void DSQ_NAME(factorize)(const float* x, float* elements, float* factors, int64_t rows, int64_t length,
                                const DsqFormat* format, int32_t stochastic, uint64_t seed, int32_t threads) {
    with_elements(*format, [&](auto f) {
        if (stochastic) return factorize<true>(x, elements, factors, rows, length, f, seed, threads);
        factorize<false>(x, elements, factors, rows, length, f, seed, threads);
    });
}
