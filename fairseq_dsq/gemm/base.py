"""Products of two quantized operands: who multiplies, decided once, and who rounds.

An engine multiplies operands exactly and accumulates in float32. :func:`plan` walks the engines, cheapest first, and
takes the first that accepts the operands' formats. An engine may round an operand itself while it reads it (fused
rounding), so that a quantized copy is never written to memory: the plan says which operands are left to it, and
:meth:`Plan.multiply` refuses one that nobody has rounded.

What an engine asks of a format is ``significand_bits``, of an element times its inner scale, and ``outer_scale``, which
never reaches it: a scale for each row, or one for the tensor, multiplies the product afterwards.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fairseq_dsq.formats import Float32, Format

AUTO = "auto"
# The engine that multiplies what no other does.
LAST = "float32"


class Side(NamedTuple):
    """What a plan knows of an operand.

    Attributes:
        fmt: what its values are rounded to.
        along: whether its groups lie along the reduction.
    """

    fmt: Format
    along: bool

    @property
    def factored(self) -> bool:
        """Whether its scale is kept out of the product."""
        return self.fmt.outer_scale and (self.along or self.fmt.group == "tensor")

    @property
    def significand_bits(self) -> int:
        """Of the numbers that the engine multiplies."""
        if self.fmt.outer_scale and not self.factored:
            return Float32().significand_bits
        return self.fmt.significand_bits


class Operand(NamedTuple):
    """One operand of a GEMM.

    Attributes:
        tensor: (rows, columns) or (batch, rows, columns); elements where ``scale`` is given, else values.
        side: its format, and whether groups lie along the reduction.
        reduction: the dimension that the GEMM sums over, -1 or -2.
        rounded: False where the engine is to round it.
        scale: of each row, seen with the reduction last: (..., rows, 1), or one for all.
        terms: bfloat16 tensors that are stacked in front and whose sum is the operand; 0 where it is given by value.
    """

    tensor: Tensor
    side: Side
    reduction: int
    rounded: bool = True
    scale: Tensor | None = None
    terms: int = 0

    @property
    def rows(self) -> Tensor:
        """Seen with the reduction dimension last."""
        return self.tensor if self.reduction == -1 else self.tensor.mT


class Engine(ABC):
    """What multiplies. Registered with :func:`register`; the order of registration is the order of trial, but that
    ``float32`` is the last.
    """

    name: ClassVar[str]
    # Whether it takes operands as terms, and a float32 one has to be cut into these else.
    in_terms: ClassVar[bool] = False

    def unavailable(self) -> str | None:
        """Why the engine runs nothing on this machine; None if it may."""
        return None

    @abstractmethod
    def accepts(self, a: Side, b: Side, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the products of such operands are exact here, sums in float32."""

    def fuses_rounding(self, fmt: Format) -> bool:
        """Whether it rounds an operand of this format itself, to nearest, in groups along the reduction."""
        return False

    @abstractmethod
    def multiply(self, a: Operand, b: Operand, bias: Tensor | None, add_to: Tensor | None) -> Tensor | None:
        """The product of operands that it accepts, as :meth:`Plan.multiply` says; scales are not its concern.

        None where it does not pay for their sizes, or their values do not allow it: the plan's next engine multiplies.
        """


def finish(product: Tensor, bias: Tensor | None, add_to: Tensor | None) -> Tensor:
    """``product`` plus ``bias``, added to ``add_to``."""
    if bias is not None:
        product += bias
    return product if add_to is None else add_to.add_(product)


@dataclass(frozen=True)
class Plan:
    """What multiplies two operands, and which of them it rounds.

    Attributes:
        sides: of the operands a and b.
        engines: tried in turn; all of them round the same.
        fused: whether the engines round a, and b.
    """

    sides: tuple[Side, Side]
    engines: tuple[Engine, ...]
    fused: tuple[bool, bool]

    @property
    def in_terms(self) -> bool:
        """Whether operands may come as bfloat16 terms."""
        return self.engines[0].in_terms

    def multiply(self, a: Operand, b: Operand, bias: Tensor | None = None, add_to: Tensor | None = None) -> Tensor:
        """The product of two operands over their reduction dimensions, exact products accumulated in float32.

        Args:
            a: M x K, or K x M with reduction -2; maybe a batch of them.
            b: N x K, or K x N with reduction -2; likewise.
            bias: N values added to every row.
            add_to: the product is added to this tensor, which is returned.

        Returns:
            (batch,) M x N.

        Raises:
            RuntimeError: an operand that is not rounded and that no engine of the plan rounds, or one that the plan was
                not made for.
        """
        self._check("a", a, self.sides[0], self.fused[0])
        self._check("b", b, self.sides[1], self.fused[1])
        if a.scale is None and b.scale is None:
            return self._product(a, b, bias, add_to)
        product = self._product(a, b, None, None)
        if a.scale is not None:
            product *= a.scale
        if b.scale is not None:
            product *= b.scale.mT
        return finish(product, bias, add_to)

    def _check(self, name: str, operand: Operand, side: Side, fused: bool) -> None:
        if operand.side is not side and operand.side != side:
            raise RuntimeError(f"{name}: got {operand.side}, expected {side}, which the product was planned for")
        if operand.terms and not self.in_terms:
            raise RuntimeError(f"{name}: got {operand.terms} terms, expected values: {self.engines[0].name} adds none")
        if not operand.rounded and not fused:
            names = ", ".join(engine.name for engine in self.engines)
            raise RuntimeError(f"{name}: not rounded to {side.fmt}, and {names} does not round it: nothing multiplied")

    def _product(self, a: Operand, b: Operand, bias: Tensor | None, add_to: Tensor | None) -> Tensor:
        for engine in self.engines:
            product = engine.multiply(a, b, bias, add_to)
            if product is not None:
                return product
        raise RuntimeError("no engine multiplied: the last of a plan has to")


_ENGINES: list[Engine] = []
# Counts the changes of the list: plans that somebody holds are of one.
generation = 0


def register(engine: Engine, first: bool = False) -> None:
    """Have products try an engine after those before it, or before all; ``float32``, which takes all, stays the last.

    Raises:
        ValueError: its name is taken.
    """
    if engine.name in names():
        raise ValueError(f"engine {engine.name!r} is registered already")
    last = names()[-1:] == [LAST]
    _ENGINES.insert(0 if first else len(_ENGINES) - last, engine)
    forget_plans()


def unregister(name: str) -> None:
    """Undo :func:`register`."""
    _ENGINES[:] = [engine for engine in _ENGINES if engine.name != name]
    forget_plans()


def forget_plans() -> None:
    """Have products planned again: the engines are others, or accept others."""
    global generation
    generation += 1
    plan.cache_clear()


def names() -> list[str]:
    """The registered engines, in the order of trial."""
    return [engine.name for engine in _ENGINES]


def check_mode(mode: str) -> None:
    """Refuse a value of ``--dsq-gemm`` that runs nothing on this machine.

    Raises:
        ValueError: an unknown name, or an engine that is not available; says why.
    """
    if mode == AUTO:
        return
    if mode not in names():
        raise ValueError(f"got {mode!r}, expected one of {', '.join((AUTO, *names()))}")
    for engine in _ENGINES:
        if engine.name == mode and (why := engine.unavailable()):
            raise ValueError(f"got {mode}, which does not run here: {why}")


@lru_cache(maxsize=4096)
def plan(a: Side, b: Side, device: torch.device, dtype: torch.dtype, mode: str = AUTO) -> Plan:
    """What multiplies two operands.

    Args:
        a, b: the operands' formats and layout.
        device, dtype: of both.
        mode: ``auto``, or the name of an engine: products that it does not accept run on ``float32``, which is said.
    """
    by_name = {engine.name: engine for engine in _ENGINES}
    engines = _ENGINES if mode == AUTO else [by_name[name] for name in dict.fromkeys((mode, LAST))]
    accepted = [engine for engine in engines if engine.accepts(a, b, device, dtype)]
    rounded = all(not isinstance(side.fmt, Float32) for side in (a, b))
    if rounded and mode not in (AUTO, accepted[0].name):
        warnings.warn(
            f"--dsq-gemm {mode}: does not multiply {a.fmt} by {b.fmt} in {str(dtype).removeprefix('torch.')} on"
            f" {device.type}; {accepted[0].name} does",
            stacklevel=2,
        )

    def fused(engine: Engine) -> tuple[bool, bool]:
        return tuple(side.along and engine.fuses_rounding(side.fmt) for side in (a, b))  # type: ignore[return-value]

    alike = tuple(engine for engine in accepted if fused(engine) == fused(accepted[0]))
    return Plan((a, b), alike, fused(accepted[0]))
