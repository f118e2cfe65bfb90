"""Freed memory stays with the process, where glibc is told so."""

from __future__ import annotations

import os
import platform

import pytest
from command import run

from fairseq_dsq.kernels import memory

# Page faults of a tensor of 64 MB that is made over and over again, once small blocks have found their places.
PROGRAM = """
import resource, torch
from fairseq_dsq.kernels import native
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(6):
    before = faults()
    torch.ones(1 << 24)
print(faults() - before)
"""


class Libc:
    def __init__(self):
        self.told = []

    def gnu_get_libc_version(self):
        return b"2.36"

    def mallopt(self, number, value):
        self.told.append((number, value))
        return 1


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({}, True),
        ({"FAIRSEQ_DSQ_KEEP_MEMORY": "1"}, True),
        ({"FAIRSEQ_DSQ_KEEP_MEMORY": "0"}, False),
        ({"MALLOC_MMAP_THRESHOLD_": "1048576"}, False),
        ({"MALLOC_TRIM_THRESHOLD_": "1048576"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=4096"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, True),
    ],
)
def test_glibc_is_told_unless_the_user_said_otherwise(environ, told):
    libc = Libc()
    assert memory.keep_freed(environ, libc) == told
    assert len(libc.told) == (2 if told else 0)


def test_another_c_library_is_left_alone():
    assert not memory.keep_freed({}, object())


def test_a_wrong_value_is_refused():
    with pytest.raises(ValueError, match=r"^FAIRSEQ_DSQ_KEEP_MEMORY: got 'no', expected 0 or 1$"):
        memory.keep_freed({"FAIRSEQ_DSQ_KEEP_MEMORY": "no"}, Libc())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_a_large_tensor_s_pages_are_not_faulted_in_again(tmp_path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}

    def faults(keep):
        code, out, err = run(["python", "-c", PROGRAM], tmp_path, {**clean, "FAIRSEQ_DSQ_KEEP_MEMORY": keep})
        assert code == 0, err
        return int(out)

    assert faults("1") < faults("0") / 8
