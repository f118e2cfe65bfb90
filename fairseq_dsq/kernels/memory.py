"""Freed memory stays with the process: glibc is told so, once.

By default glibc returns the memory of a tensor of 32 MB and more to the kernel, and the next such tensor costs a page
fault for every 4 KB: more than the GEMM that fills it. Once it is told, blocks below 1 GiB come from the heap, and the
heap shrinks only where 2 GiB at its end are free. The environment variable FAIRSEQ_DSQ_KEEP_MEMORY=0 leaves glibc
alone, and so do settings of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VARIABLE = "FAIRSEQ_DSQ_KEEP_MEMORY"
# glibc's names of the two, in mallopt, the environment and GLIBC_TUNABLES; an int is the most that mallopt takes.
SETTINGS = (
    (-3, "MALLOC_MMAP_THRESHOLD_", "glibc.malloc.mmap_threshold", 1 << 30),
    (-1, "MALLOC_TRIM_THRESHOLD_", "glibc.malloc.trim_threshold", (1 << 31) - 1),
)


def keep_freed(environ: Mapping[str, str], libc: Any) -> bool:
    """Have a C library keep freed memory; whether it was asked to.

    Raises:
        ValueError: a value of FAIRSEQ_DSQ_KEEP_MEMORY that is neither 0 nor 1.
    """
    wanted = environ.get(VARIABLE, "1")
    if wanted not in ("0", "1"):
        raise ValueError(f"{VARIABLE}: got {wanted!r}, expected 0 or 1")
    tunables = environ.get("GLIBC_TUNABLES", "")
    if any(name in environ or tunable in tunables for _, name, tunable, _ in SETTINGS):
        return False
    if wanted == "0" or not (hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt")):
        return False
    for number, _, _, value in SETTINGS:
        libc.mallopt(number, value)
    return True
