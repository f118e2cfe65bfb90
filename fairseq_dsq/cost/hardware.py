"""What a machine can do: data files in configs/hardware/, or this machine, measured."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fairseq_dsq import data_files

FOLDER = "hardware"
OPS_PER_MAC = 2  # as vendors count
_ROUNDS = 7
_TRIAL_SIZE = 256


@dataclass(frozen=True)
class Hardware:
    """Peak performance and memory bandwidth.

    Attributes:
        name: as the tables print it.
        tera_ops_per_s: by width of the operands in bits; a MAC is two operations. Wider operands than all of these have
            no entry; others take the next wider unit.
        gigabytes_per_s: DRAM bandwidth.
        source: where the numbers come from.
    """

    name: str
    tera_ops_per_s: dict[int, float]
    gigabytes_per_s: float
    source: str

    def __post_init__(self) -> None:
        if not self.tera_ops_per_s or not all(0 < ops < math.inf for ops in self.tera_ops_per_s.values()):
            raise ValueError(f"tera_ops_per_s: got {self.tera_ops_per_s}, expected numbers above 0 by width in bits")
        if max(self.tera_ops_per_s) < 32:
            raise ValueError(f"tera_ops_per_s: got widths {sorted(self.tera_ops_per_s)}, expected 32 among them")
        if not 0 < self.gigabytes_per_s < math.inf:
            raise ValueError(f"gigabytes_per_s: got {self.gigabytes_per_s}, expected a number above 0")

    @property
    def bytes_per_s(self) -> float:
        """DRAM bandwidth."""
        return self.gigabytes_per_s * 1e9

    def macs_per_s(self, bits: int) -> float:
        """Peak MACs per second of operands of ``bits`` bits, on the narrowest unit that holds them."""
        width = min(width for width in self.tera_ops_per_s if width >= min(bits, max(self.tera_ops_per_s)))
        return self.tera_ops_per_s[width] * 1e12 / OPS_PER_MAC


def load_hardware(name: str) -> Hardware:
    """The machine of a name in configs/hardware/, or of the path of a file of one's own; errors as data_files.load."""
    return data_files.load(Hardware, FOLDER, name)


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of several rounds, after one to warm up."""
    run()
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _gemm_seconds(size: int, dtype: torch.dtype) -> float:
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return _fastest(lambda: a @ b)


def processor() -> str:
    """This machine's processor, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split("\t:", 1) for line in lines if "\t:" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name = fields.get("model name", platform.machine())
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{name} (family {family}, model {model})" if family and model else name


def measure(size: int = 2048, copy_bytes: int = 2**28) -> Hardware:
    """This machine's CPU: the fastest of seven square GEMMs of ``size`` in float32 and bfloat16, and of seven copies.

    A copy of ``copy_bytes`` bytes moves twice as many; widths of 16 bits and less are given bfloat16's speed where it
    is the faster.
    """
    float32 = bfloat16 = _gemm_seconds(size, torch.float32)
    # Without bfloat16 units torch takes hundreds of times as long: a small product tells in no time.
    if _gemm_seconds(_TRIAL_SIZE, torch.bfloat16) < 4 * _gemm_seconds(_TRIAL_SIZE, torch.float32):
        bfloat16 = min(float32, _gemm_seconds(size, torch.bfloat16))
    source = torch.zeros(copy_bytes, dtype=torch.uint8)
    target = torch.ones_like(source)
    copy = _fastest(lambda: target.copy_(source))
    tera_ops = OPS_PER_MAC * size**3 / 1e12
    threads = torch.get_num_threads()
    return Hardware(
        name=f"{processor()}, {threads} {'thread' if threads == 1 else 'threads'}",
        tera_ops_per_s={32: round(tera_ops / float32, 4), 16: round(tera_ops / bfloat16, 4)},
        gigabytes_per_s=round(2 * copy_bytes / copy / 1e9, 2),
        source=f"measured: torch {torch.__version__}, GEMMs of {size}x{size}x{size}, copies of {copy_bytes} bytes",
    )
