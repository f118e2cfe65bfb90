// Exported functions; DSQ_NAME(f) is dsq_<instruction set>_f in files that are compiled once per instruction set.
#pragma once

#define EXPORT extern "C" __attribute__((visibility("default")))
#define JOIN2(a, b, c) a##b##_##c
#define JOIN(a, b, c) JOIN2(a, b, c)
#define DSQ_NAME(name) JOIN(dsq_, DSQ_ISA, name)
