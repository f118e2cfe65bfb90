// Loops over the parts of a tensor, on several threads where that pays.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "lanes.h"

namespace {

// Values of a run; a multiple of 8: whole bytes at every width.
constexpr int CHUNK = 1024;
// Boxes of a run, columns of a tile: a tile of 16 rows is as large as the first-level cache.
constexpr int BOXES = 512;

// A number that is known when compiling, and one that is not.
template <int N>
struct Count {
    constexpr int operator()() const { return N; }
};
struct Values {
    int64_t n;
    int64_t operator()() const { return n; }
};

// work(values of a box): 16 and 32, the usual ones, are known when compiling.
template <class Work>
INLINE void with_box_size(int64_t n, Work work) {
    if (n == 16)
        work(Count<16>());
    else if (n == 32)
        work(Count<32>());
    else
        work(Values{n});
}

// Full vectors of values, then the rest: work(place of the first, how many), inlined with the number of a full one known.
template <class Work>
INLINE void for_vectors(int64_t values, Work work) {
    int64_t at = 0;
    for (; at + LANES <= values; at += LANES) work(at, (int64_t)LANES);
    if (at < values) work(at, values - at);
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Of the thread that runs a body of for_each, from 0.
INLINE int thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

template <class Body>
void for_each(int64_t items, int threads, Body body) {
    if (threads <= 1 || items <= 1) {
        for (int64_t item = 0; item < items; item++) body(item);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t item = 0; item < items; item++) body(item);
}

}  // namespace
