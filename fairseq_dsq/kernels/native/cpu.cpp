// What the loader asks of the library before it calls a kernel. Compiled for any CPU of the architecture.

#include <cstdint>

#if defined(_OPENMP)
#include <dlfcn.h>
#include <omp.h>
#endif

#include "names.h"

// The sources that were compiled: setup.py and native/__init__.py compute the same number.
EXPORT uint32_t dsq_source() { return DSQ_SOURCE; }

// The file of the OpenMP runtime that the kernels use; null without one.
EXPORT const char* dsq_openmp() {
#if defined(_OPENMP)
    Dl_info info;
    if (dladdr((void*)&omp_get_num_threads, &info)) return info.dli_fname;
#endif
    return nullptr;
}

// Whether this CPU and its operating system run the kernels that were compiled for an instruction set.
EXPORT int32_t dsq_baseline_runs() { return 1; }

#if defined(__x86_64__)
EXPORT int32_t dsq_avx2_runs() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

EXPORT int32_t dsq_avx512_runs() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
