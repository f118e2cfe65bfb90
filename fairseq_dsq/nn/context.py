"""What the GEMMs of one model share: the precision in force, how it is applied, and the ledger."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from fairseq_dsq.precision import Gemm, GemmKind, PrecisionConfig
from fairseq_dsq.quant import Rounding

BoxDim = Literal["reduction", "last"]
BOX_DIMS: tuple[BoxDim, ...] = ("reduction", "last")

FLOAT32 = PrecisionConfig((32, 32, 32, 32), "float32")


class LedgerKey(NamedTuple):
    """A GEMM, the precision it ran at, and whether its forward pass ran under grad."""

    gemm: Gemm
    precision: PrecisionConfig
    training: bool


@dataclass
class Ledger:
    """Counts the GEMMs that a model executes and the bytes it packs for backward.

    Backward GEMMs are counted when the forward that will need them runs under grad.
    """

    gemms: Counter[LedgerKey] = field(default_factory=Counter)
    stash_bytes: int = 0

    def record(
        self, kind: GemmKind, m: int, k: int, n: int, batch: int, precision: PrecisionConfig, training: bool
    ) -> None:
        self.gemms[LedgerKey(Gemm(kind, m, k, n, batch), precision, training)] += 1

    def drain(self) -> tuple[Counter[LedgerKey], int]:
        """The counts and stash bytes since the last call; starts anew."""
        counts = self.gemms, self.stash_bytes
        self.gemms, self.stash_bytes = Counter(), 0
        return counts


@dataclass(frozen=True)
class GemmConfig:
    """How one GEMM's operands are quantized.

    Attributes:
        precision: the level.
        rounding: ``nearest`` or ``stochastic``.
        box_dim: ``reduction`` lays boxes along the reduction dimension of the GEMM that reads the operand; ``last``
            along the stored tensor's last dimension.
    """

    precision: PrecisionConfig
    rounding: Rounding = "nearest"
    box_dim: BoxDim = "reduction"

    def dim(self, reduction_dim: int) -> int:
        """The dimension along which the boxes of an operand lie."""
        return reduction_dim if self.box_dim == "reduction" else -1


@dataclass
class DSQContext:
    """Shared by all DSQ modules of a model; assigning ``config`` changes the precision of all of them.

    Attributes:
        config: the level in force and how it is applied.
        attention_matmul: quantize attention's two batched products too.
        ledger: counts what runs.
    """

    config: GemmConfig
    attention_matmul: bool = True
    ledger: Ledger = field(default_factory=Ledger)

    def set_precision(self, precision: PrecisionConfig) -> None:
        """Put a level in force."""
        self.config = replace(self.config, precision=precision)

    def for_mode(self, training: bool) -> GemmConfig:
        """The configuration of a module's forward: evaluation always rounds to nearest, so that it is repeatable."""
        if training or self.config.rounding == "nearest":
            return self.config
        return replace(self.config, rounding="nearest")

    def float32(self) -> DSQContext:
        """A context on the same ledger whose GEMMs stay float32: for modules left out by a skip pattern."""
        return DSQContext(GemmConfig(FLOAT32), ledger=self.ledger)
