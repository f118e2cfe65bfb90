"""The Roofline model: which of arithmetic and memory bounds a training step.

A group of operators takes max(macs / peak, bytes / bandwidth) seconds, and reaches macs over that many seconds. Source:
Williams, Waterman and Patterson, "Roofline: An Insightful Visual Performance Model for Multicore Architectures", CACM
52(4), 2009; the paper's Figure 1 and Table 7 (arXiv 2303.05295).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fairseq_dsq.cost.gemm import gemm_bytes, stash_bytes
from fairseq_dsq.cost.hardware import Hardware
from fairseq_dsq.ledger import LedgerKey, StashKey
from fairseq_dsq.precision import PrecisionConfig

ATTENTION, FULLY_CONNECTED, OTHERS = "attention", "fully connected", "others"
MEMORY, COMPUTE = "memory", "compute"


@dataclass(frozen=True)
class Group:
    """Operators that are looked at together.

    Attributes:
        name: of the group.
        macs: of its GEMMs.
        dram_bytes: moved by all of its operators.
        compute_s: seconds of its GEMMs at peak performance.
        memory_s: seconds of its traffic at full bandwidth.
    """

    name: str
    macs: int
    dram_bytes: int
    compute_s: float
    memory_s: float

    @property
    def latency_s(self) -> float:
        """Seconds, arithmetic and traffic overlapped."""
        return max(self.compute_s, self.memory_s)

    @property
    def bound(self) -> str:
        """``compute`` or ``memory``."""
        return COMPUTE if self.compute_s > self.memory_s else MEMORY

    @property
    def intensity(self) -> float:
        """MACs per byte."""
        return self.macs / self.dram_bytes if self.dram_bytes else math.inf

    @property
    def macs_per_s(self) -> float:
        """Attainable performance."""
        return self.macs / self.latency_s if self.latency_s else 0.0


def total(groups: list[Group]) -> Group:
    """The groups as one, their times added up."""
    return Group(
        "all",
        sum(group.macs for group in groups),
        sum(group.dram_bytes for group in groups),
        sum(group.compute_s for group in groups),
        sum(group.memory_s for group in groups),
    )


def shares(groups: list[Group]) -> list[float]:
    """Per cent of the latency of all."""
    latency = sum(group.latency_s for group in groups)
    return [100 * group.latency_s / latency for group in groups]


def groups_of_step(
    gemms: Iterable[tuple[LedgerKey, int]],
    stashes: Iterable[tuple[StashKey, int]],
    elements: tuple[int, int],
    precision: PrecisionConfig,
    hardware: Hardware,
    float_bits: int,
    quantized: bool = True,
) -> list[Group]:
    """Attention, fully connected layers, and everything else of one training step at a precision.

    Args:
        gemms, stashes: items of what runs, as :class:`fairseq_dsq.nn.Work` counts it; their own precision is not
            looked at.
        elements: moved by the operators other than GEMMs, within attention and elsewhere.
        precision: gives every operand its bytes (as cost profile ``operands``) and every MAC its width.
        hardware: peak performance and bandwidth.
        float_bits: of an element outside of GEMMs.
        quantized: stashes are written beside the operands; without quantization the operand itself is kept.
    """
    macs = {ATTENTION: 0, FULLY_CONNECTED: 0, OTHERS: 0}
    moved = {
        ATTENTION: elements[0] * float_bits // 8,
        FULLY_CONNECTED: 0,
        OTHERS: elements[1] * float_bits // 8,
    }
    seconds = dict.fromkeys(macs, 0.0)
    for (gemm, *_), count in gemms:
        name = ATTENTION if gemm.batch > 1 else FULLY_CONNECTED
        bits = max(operand.bits for operand in precision.operands(gemm.kind))
        macs[name] += gemm.macs * count
        moved[name] += gemm_bytes(gemm, precision) * count
        seconds[name] += gemm.macs * count / hardware.macs_per_s(bits)
    if quantized:
        for (stash, *_), count in stashes:
            name = ATTENTION if len(stash.shape) > 2 else FULLY_CONNECTED
            moved[name] += stash_bytes(stash, precision) * count
    return [Group(name, macs[name], moved[name], seconds[name], moved[name] / hardware.bytes_per_s) for name in macs]
