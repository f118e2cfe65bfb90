"""What the GEMMs of one model share: the precision in force, how it is applied, and the ledger."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

from fairseq_dsq import gemm
from fairseq_dsq.formats import Float32, Format
from fairseq_dsq.ledger import Ledger
from fairseq_dsq.nn.rotation import Rotation
from fairseq_dsq.nn.together import Together
from fairseq_dsq.precision import FLOAT32, GemmKind, PrecisionConfig
from fairseq_dsq.quantized import ROUNDINGS, Rounding
from fairseq_dsq.text import check_choice, quoted

BoxDim = Literal["reduction", "last"]
BOX_DIMS: tuple[BoxDim, ...] = ("reduction", "last")
ValueBoxes = Literal["row", "feature"]
VALUE_BOXES: tuple[ValueBoxes, ...] = ("row", "feature")
StashScope = Literal["gemm", "all"]
STASH_SCOPES: tuple[StashScope, ...] = ("gemm", "all")


@dataclass(frozen=True)
class GemmConfig:
    """How one GEMM's operands are quantized.

    Attributes:
        precision: the level.
        rounding: ``nearest`` or ``stochastic``.
        box_dim: ``reduction`` lays boxes along the reduction dimension of the GEMM that reads the operand; ``last``
            along the stored tensor's last dimension.
        gemm: ``auto`` multiplies on the cheapest engine that is exact, see :mod:`fairseq_dsq.gemm`; a name on that one.
        value_boxes: what shares an exponent of attention's values, of which no position's may share one with
            another's: ``row``, all of one position and head; ``feature``, boxes along the features.
        coded: the weight is held as codes, see :meth:`with_weight`.
        rotation: of the operands of GEMMs that read a gradient; None for none.

    Raises:
        TypeError, ValueError: a value that is none of these; one line names the attribute.
    """

    precision: PrecisionConfig
    rounding: Rounding = "nearest"
    box_dim: BoxDim = "reduction"
    gemm: str = gemm.AUTO
    value_boxes: ValueBoxes = "row"
    coded: bool = False
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.precision, PrecisionConfig):
            raise TypeError(f"precision: got {quoted(self.precision)}, expected such as PrecisionConfig((2, 2, 2, 16))")
        if not (self.rotation is None or isinstance(self.rotation, Rotation)):
            raise TypeError(f"rotation: got {quoted(self.rotation)}, expected such as Rotation('grad_weight', 16, 1)")
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_choice("box_dim", self.box_dim, BOX_DIMS)
        check_choice("gemm", self.gemm, (gemm.AUTO, *gemm.names()))
        check_choice("value_boxes", self.value_boxes, VALUE_BOXES)
        check_choice("coded", self.coded, (False, True))

    def rotates(self, kind: GemmKind) -> bool:
        """Whether a GEMM's operands are rotated: not where neither is rounded, nor those that are codes already."""
        if self.rotation is None or not self.rotation.covers(kind) or (self.coded and kind == "grad_input"):
            return False
        return any(fmt != Float32() for fmt in self.precision.operands(kind))

    @cached_property
    def _with_weight(self) -> dict[Format, GemmConfig]:
        return {}

    def with_weight(self, fmt: Format) -> GemmConfig:
        """For a layer whose weight is held as codes of ``fmt``, whose groups lie along K whichever GEMM reads them."""
        if fmt not in self._with_weight:
            self._with_weight[fmt] = replace(self, precision=self.precision.with_weight(fmt), coded=True)
        return self._with_weight[fmt]

    @cached_property
    def to_nearest(self) -> GemmConfig:
        """The same with rounding to nearest, made once."""
        return replace(self, rounding="nearest")

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: plans are of the machine that made them."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def plans(self) -> dict[Any, Any]:
        """What multiplies in the GEMMs of calls like those before, see :mod:`fairseq_dsq.nn.functional`."""
        return {}

    def dim(self, reduction_dim: int) -> int:
        """The dimension along which the boxes of an operand lie."""
        return reduction_dim if self.box_dim == "reduction" else -1


_FLOAT32 = GemmConfig(FLOAT32)


@dataclass
class DSQContext:
    """Shared by all DSQ modules of a model; assigning ``config`` changes the precision of all of them.

    Attributes:
        config: the level in force and how it is applied.
        attention_matmul: quantize attention's two batched products too.
        ledger: counts what runs.
        stash_scope: ``gemm`` packs what GEMMs keep for backward; ``all`` also what LayerNorm, softmax, activation
            functions and dropout keep, see :mod:`fairseq_dsq.nn.saved`.
        together: rounds the weights together that a pass of the model rounds alike.
        layers: how many layers it has; their numbers tell the rounding noise of their weights apart.
        parent: of whom this one follows the levels, see :meth:`ruled`.
        level: the number of the level in force.

    Raises:
        TypeError, ValueError: a value that is none of these; one line names the attribute.
    """

    config: GemmConfig
    attention_matmul: bool = True
    ledger: Ledger = field(default_factory=Ledger)
    stash_scope: StashScope = "gemm"
    together: Together = field(default_factory=Together)
    layers: int = 0
    parent: DSQContext | None = None
    level: int = 0
    _ruled: dict[tuple[PrecisionConfig, ...], DSQContext] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.config, GemmConfig):
            raise TypeError(f"config: got {quoted(self.config)}, expected such as GemmConfig(precision)")
        check_choice("attention_matmul", self.attention_matmul, (False, True))
        check_choice("stash_scope", self.stash_scope, STASH_SCOPES)

    def number_layer(self) -> int:
        """The number of one more layer, from 0."""
        if self.parent is not None:
            return self.parent.number_layer()
        self.layers += 1
        return self.layers - 1

    @property
    def packs(self) -> bool:
        """Whether the level in force packs anything."""
        return self.config.precision.rounds

    @property
    def packs_everything(self) -> bool:
        """Whether operations other than GEMMs are to keep less too."""
        return self.stash_scope == "all" and self.packs

    def set_precision(self, precision: PrecisionConfig, level: int = 0) -> None:
        """Put a level in force; ``level`` is its number, by which modules with a rule find theirs.

        Raises:
            TypeError: no level.
        """
        self.config, self.level = replace(self.config, precision=precision), level
        for levels, context in self._ruled.items():
            context.set_precision(levels[min(level, len(levels) - 1)])

    def for_mode(self, training: bool) -> GemmConfig:
        """The configuration of a module's forward: evaluation always rounds to nearest, so that it is repeatable."""
        if training or self.config.rounding == "nearest":
            return self.config
        return self.config.to_nearest

    def float32(self) -> DSQContext:
        """A context on the same ledger whose GEMMs stay float32."""
        return DSQContext(_FLOAT32, ledger=self.ledger)

    def levels_of(self, other: DSQContext, own: tuple[PrecisionConfig, ...]) -> tuple[PrecisionConfig, ...]:
        """The levels that modules of ``other`` have: those of a rule, or ``own``, which are this one's; none else."""
        ruled = (levels for levels, context in self._ruled.items() if context is other)
        return own if other is self else next(ruled, ())

    def ruled(self, levels: tuple[PrecisionConfig, ...]) -> DSQContext:
        """A context for modules with levels of their own, which are put in force with this one's.

        Args:
            levels: one for each level of the schedule, or one for all.
        """
        if levels not in self._ruled:
            config = replace(self.config, precision=levels[min(self.level, len(levels) - 1)])
            scope = self.attention_matmul, self.ledger, self.stash_scope, self.together
            self._ruled[levels] = DSQContext(config, *scope, parent=self)
        return self._ruled[levels]
