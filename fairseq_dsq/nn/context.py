"""What the GEMMs of one model share: the precision in force, how it is applied, and the ledger."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from fairseq_dsq.precision import Gemm, GemmKind, PrecisionConfig, Stash, StashRole
from fairseq_dsq.quant import Rounding

BoxDim = Literal["reduction", "last"]
BOX_DIMS: tuple[BoxDim, ...] = ("reduction", "last")
ValueBoxes = Literal["row", "feature"]
VALUE_BOXES: tuple[ValueBoxes, ...] = ("row", "feature")
GemmMode = Literal["auto", "float32"]
GEMM_MODES: tuple[GemmMode, ...] = ("auto", "float32")
StashScope = Literal["gemm", "all"]
STASH_SCOPES: tuple[StashScope, ...] = ("gemm", "all")

FLOAT32 = PrecisionConfig((32, 32, 32, 32), "float32")


class LedgerKey(NamedTuple):
    """A GEMM, the precision it ran at, whether its forward pass ran under grad, and the module it served."""

    gemm: Gemm
    precision: PrecisionConfig
    training: bool
    scope: str = ""


class StashKey(NamedTuple):
    """A stash, the precision it was packed at, and the module it served."""

    stash: Stash
    precision: PrecisionConfig
    scope: str = ""


@dataclass
class Work:
    """What ran: GEMMs and stashes with their counts, and the bytes that the stashes really took."""

    gemms: Counter[LedgerKey] = field(default_factory=Counter)
    stashes: Counter[StashKey] = field(default_factory=Counter)
    stash_bytes: int = 0

    def at_precision(self, precision: PrecisionConfig) -> Work:
        """The same GEMMs and stashes at another level; the bytes really taken are not known."""
        return Work(
            Counter({key._replace(precision=precision): count for key, count in self.gemms.items()}),
            Counter({key._replace(precision=precision): count for key, count in self.stashes.items()}),
        )


@dataclass
class Ledger(Work):
    """Counts the GEMMs that a model executes, each when it runs, and what it packs for backward.

    What activation checkpointing repeats is counted as often as it runs.

    Attributes:
        scope: goes into every key; names the module at work, for whoever wants to tell them apart.
    """

    scope: str = ""

    def record(
        self,
        kind: GemmKind,
        m: int,
        k: int,
        n: int,
        batch: int,
        precision: PrecisionConfig,
        training: bool,
        scope: str | None = None,
    ) -> None:
        """Count one GEMM; a backward one names the ``scope`` its forward ran in."""
        self.gemms[
            LedgerKey(Gemm(kind, m, k, n, batch), precision, training, self.scope if scope is None else scope)
        ] += 1

    def record_stash(
        self, role: StashRole, shape: tuple[int, ...], dim: int, precision: PrecisionConfig, nbytes: int
    ) -> None:
        """Count one stash that took ``nbytes`` bytes."""
        self.stashes[StashKey(Stash(role, shape, dim), precision, self.scope)] += 1
        self.stash_bytes += nbytes

    def drain(self) -> Work:
        """What ran since the last call; starts anew."""
        work = Work(self.gemms, self.stashes, self.stash_bytes)
        self.gemms, self.stashes, self.stash_bytes = Counter(), Counter(), 0
        return work


@dataclass(frozen=True)
class GemmConfig:
    """How one GEMM's operands are quantized.

    Attributes:
        precision: the level.
        rounding: ``nearest`` or ``stochastic``.
        box_dim: ``reduction`` lays boxes along the reduction dimension of the GEMM that reads the operand; ``last``
            along the stored tensor's last dimension.
        gemm: ``auto`` multiplies on the cheapest arithmetic that is exact, see :mod:`fairseq_dsq.nn.gemm`; ``float32``
            on that.
        value_boxes: what shares an exponent of attention's values, of which no position's may share one with
            another's: ``row``, all of one position and head; ``feature``, boxes along the features.
    """

    precision: PrecisionConfig
    rounding: Rounding = "nearest"
    box_dim: BoxDim = "reduction"
    gemm: GemmMode = "auto"
    value_boxes: ValueBoxes = "row"

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
        stash_scope: ``gemm`` packs what GEMMs keep for backward; ``all`` also what LayerNorm, softmax, activation
            functions and dropout keep, see :mod:`fairseq_dsq.nn.saved`.
        layers: how many layers it has; their numbers tell the rounding noise of their weights apart.
    """

    config: GemmConfig
    attention_matmul: bool = True
    ledger: Ledger = field(default_factory=Ledger)
    stash_scope: StashScope = "gemm"
    layers: int = 0

    def number_layer(self) -> int:
        """The number of one more layer, from 0."""
        self.layers += 1
        return self.layers - 1

    @property
    def packs(self) -> bool:
        """Whether the level in force packs anything."""
        return self.config.precision.format_name != FLOAT32.format_name

    @property
    def packs_everything(self) -> bool:
        """Whether operations other than GEMMs are to keep less too."""
        return self.stash_scope == "all" and self.packs

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
