"""The paper's [q0, q1, q2, q3] and the three GEMMs of a layer.

The only place that says which operand of which GEMM is held at which q::

    output:       input(q0) @ weight(q0)              MxK @ KxN => MxN
    grad_input:   grad_output(q3) @ weight(q2)        MxN @ NxK => MxK
    grad_weight:  stash(q1) @ grad_output(q3)         KxM @ MxN => KxN

Source: "Dynamic Stashing Quantization for Efficient Transformer Training", arXiv 2303.05295, section 3.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from fairseq_dsq import formats
from fairseq_dsq.formats import Format, FormatOptions
from fairseq_dsq.text import printable, quoted, shortened

GemmKind = Literal["output", "grad_input", "grad_weight"]


class Gemm(NamedTuple):
    """One (batched) matrix product that ran: ``batch`` times MxK @ KxN => MxN."""

    kind: GemmKind
    m: int
    k: int
    n: int
    batch: int = 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.batch * self.m * self.k * self.n

    @property
    def elements(self) -> int:
        """Elements of the two operands and the result."""
        return self.batch * (self.m * self.k + self.k * self.n + self.m * self.n)


StashRole = Literal["input", "weight"]


class Stash(NamedTuple):
    """An operand packed for backward: a GEMM's input, or the second operand of a batched product, its weight."""

    role: StashRole
    shape: tuple[int, ...]
    dim: int

    @property
    def elements(self) -> int:
        """Elements packed."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class PrecisionConfig:
    """One level [q0, q1, q2, q3] in one number format.

    Attributes:
        q: the four numbers as the flags give them.
        format_name: a name of :func:`fairseq_dsq.formats.names`.
        options: how the format reads q.

    Raises:
        ValueError, TypeError: a q that the format does not have; the message names its index.
    """

    q: tuple[int, int, int, int]
    format_name: str = "bfp"
    options: FormatOptions = FormatOptions()

    def __post_init__(self) -> None:
        if len(self.q) != 4:
            raise ValueError(f"got {len(self.q)} numbers in {list(self.q)}, expected four: [q0,q1,q2,q3]")
        for index, q in enumerate(self.q):
            if isinstance(q, bool) or not isinstance(q, int):
                raise TypeError(f"q{index}: got {q!r}, expected an integer")
            if not formats.MIN_BITS <= q <= formats.MAX_BITS:
                raise ValueError(f"q{index}: got {q}, expected {formats.MIN_BITS} to {formats.MAX_BITS}")
            try:
                formats.make_format(self.format_name, q, self.options)
            except ValueError as error:
                raise ValueError(f"q{index} = {q}: {error}") from None

    def _format(self, index: int) -> Format:
        return formats.make_format(self.format_name, self.q[index], self.options)

    @cached_property
    def output_operands(self) -> Format:
        """Input and weight of the output GEMM: q0."""
        return self._format(0)

    @cached_property
    def stash(self) -> Format:
        """What is kept for grad_weight: q1."""
        return self._format(1)

    @cached_property
    def grad_input_weight(self) -> Format:
        """The weight (or a matmul's second operand) of the grad_input GEMM: q2."""
        return self._format(2)

    @cached_property
    def grad_output(self) -> Format:
        """The gradient that enters both backward GEMMs: q3."""
        return self._format(3)

    def stash_format(self, role: StashRole) -> Format:
        """What a stash is packed in: inputs at q1, what plays the weight at q2."""
        return self.stash if role == "input" else self.grad_input_weight

    def operands(self, kind: GemmKind) -> tuple[Format, Format]:
        """The formats of a GEMM's two operands, in the order of this module's legend."""
        return {
            "output": (self.output_operands, self.output_operands),
            "grad_input": (self.grad_output, self.grad_input_weight),
            "grad_weight": (self.stash, self.grad_output),
        }[kind]

    def operand_q(self, kind: GemmKind) -> tuple[int, int]:
        """The q of a GEMM's two operands."""
        q0, q1, q2, q3 = self.q
        return {"output": (q0, q0), "grad_input": (q3, q2), "grad_weight": (q1, q3)}[kind]

    def __str__(self) -> str:
        return "[" + ",".join(str(q) for q in self.q) + "]"


# Not what int() reads besides: 1_6, +16, the digits of other scripts, thousands of them.
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,8})")


def parse_q(text: str) -> tuple[int, int, int, int]:
    """Four integers from ``[2,2,2,16]`` (brackets optional).

    Raises:
        ValueError: anything else; the message quotes the text.
    """
    expected = "expected four integers such as [2,2,2,16]"
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    pieces = [piece.strip() for piece in inner.split(",")]
    if len(pieces) != 4:
        raise ValueError(f"got {quoted(text)}, {expected}")
    for piece in pieces:
        if not _INTEGER.fullmatch(piece):
            raise ValueError(f"got {shortened(printable(piece), 20)} in {quoted(text)}, {expected}")
    q0, q1, q2, q3 = map(int, pieces)
    return q0, q1, q2, q3


def parse_levels(
    text: str, format_name: str = "bfp", options: FormatOptions = FormatOptions()
) -> tuple[PrecisionConfig, ...]:
    """The levels of a schedule from ``'[2,2,2,16] [16,4,4,16]'``, in their order.

    Raises:
        ValueError: no level, a malformed one, or a q outside the format's widths; the message names the level
            (counted from 0) and the index.
    """
    pieces = re.findall(r"\[[^\[\]]*\]", text) or text.split()
    if not pieces or "".join("".join(pieces).split()) != "".join(text.split()):
        raise ValueError(f"got {quoted(text)}, expected one or more levels such as '[2,2,2,16] [16,4,4,16]'")
    levels: list[PrecisionConfig] = []
    for number, piece in enumerate(pieces):
        try:
            level = PrecisionConfig(parse_q(piece), format_name, options)
        except ValueError as error:
            raise ValueError(f"level {number}: {error}") from None
        levels.append(level)
    return tuple(levels)


def levels_to_str(levels: tuple[PrecisionConfig, ...]) -> str:
    """The inverse of :func:`parse_levels`."""
    return " ".join(str(level) for level in levels)
