"""Operand slots of the three GEMMs of a layer, and the paper's [q0, q1, q2, q3] as a notation for them.

::

    output:       input(q0) @ weight(q0)              MxK @ KxN => MxN
    grad_input:   grad_output(q3) @ weight(q2)        MxN @ NxK => MxK
    grad_weight:  stash(q1) @ grad_output(q3)         KxM @ MxN => KxN

A q is bits of ``--dsq-format`` (``4``), any format's text (``int8/row``), or, for q0 and q3, whose operands may differ,
a pair of these: ``int8/row|bfp4`` is input and weight in q0, the gradient of grad_input and of grad_weight in q3. The
second operand of a batched product plays the weight; it is stashed at q2. Square boxes are a weight's alone:
``bfp4|bfp4/16x16`` in q0 and ``bfp4/16x16`` in q2 have output and grad_input read the same values.

Source: "Dynamic Stashing Quantization for Efficient Transformer Training", arXiv 2303.05295, section 3.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from fairseq_dsq import formats
from fairseq_dsq.formats import Float32, Format, FormatOptions, Square
from fairseq_dsq.text import check_choice, printable, quoted, shortened

GemmKind = Literal["output", "grad_input", "grad_weight"]
# What is kept of a GEMM's input and of a batched product's second operand, its weight; or of both operands of an output
# GEMM that the backward pass repeats; "recomputed" is an input that such a one makes again, of which nothing is kept.
StashRole = Literal["input", "weight", "first operand", "second operand", "recomputed"]
FOR_REPEATS: tuple[StashRole, StashRole] = ("first operand", "second operand")
Q = int | str

# (index of the q, which of its pair) of a GEMM's two operands, in the order of the legend above, and of a stash.
_OPERANDS: dict[GemmKind, tuple[tuple[int, int], tuple[int, int]]] = {
    "output": ((0, 0), (0, 1)),
    "grad_input": ((3, 0), (2, 0)),
    "grad_weight": ((1, 0), (3, 1)),
}
_STASHES: dict[StashRole, tuple[int, int]] = {"input": (1, 0), "weight": (2, 0)}
_STASHES |= {"first operand": (0, 0), "second operand": (0, 1), "recomputed": (1, 0)}
_PAIRED = (0, 3)
# Not what int() reads besides: 1_6, +16, the digits of other scripts, thousands of them.
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,8})")


class Member(NamedTuple):
    """An operand of a level.

    Attributes:
        fmt: its format.
        bits: what the paper's tables count of it: a number as given, or the bits of a format.
        family: of the format, as a flag names it.
    """

    fmt: Format
    bits: int
    family: str


@dataclass(frozen=True)
class PrecisionConfig:
    """One level [q0, q1, q2, q3].

    Attributes:
        q: the four as the flags give them.
        format_name: the family of the q that are bits, a name of :func:`fairseq_dsq.formats.names`.
        options: how that family reads q.

    Raises:
        ValueError, TypeError: a q that stands for no format; the message names its index.
    """

    q: tuple[Q, Q, Q, Q]
    format_name: str = "bfp"
    options: FormatOptions = FormatOptions()

    def __post_init__(self) -> None:
        if not isinstance(self.q, tuple):
            raise TypeError(f"q: got {quoted(self.q)}, expected a tuple such as (2, 2, 2, 16); parse_levels reads text")
        if len(self.q) != 4:
            raise ValueError(f"got {len(self.q)} numbers in {list(self.q)}, expected four: [q0,q1,q2,q3]")
        check_choice("format_name", self.format_name, formats.names())
        on_top = 0 if self.format_name == "float32" else self.options.bits(0)
        least, most = formats.MIN_BITS - on_top, formats.MAX_BITS - on_top
        for index, q in enumerate(self.q):
            if isinstance(q, bool) or not isinstance(q, (int, str)) or (isinstance(q, str) and _INTEGER.fullmatch(q)):
                raise TypeError(f"q{index}: got {q!r}, expected an integer or a format such as int8/row")
            pair = _pair(q)
            if len(pair) > (2 if index in _PAIRED else 1):
                raise ValueError(
                    f"q{index}: got {q}, expected {'a pair' if index in _PAIRED else 'one format'} at most"
                )
            for member in pair:
                if isinstance(member, int) and not least <= member <= most:
                    raise ValueError(f"q{index}: got {q}, expected {least} to {most}")
                try:
                    _ = self._format(member).text  # which is checked when it is made
                except ValueError as error:
                    raise ValueError(f"q{index} = {q}: {error}{self._instead(member)}") from None
        for index, pair_of in enumerate(self.formats):
            # The first of q0 is the input; q1 and q3 are the stash and the gradient.
            others = {0: pair_of[:1], 2: ()}.get(index, pair_of)
            if any(isinstance(fmt.group, Square) for fmt in others):
                raise ValueError(
                    f"q{index}: got {self.q[index]}, expected squares as a weight's boxes alone: "
                    "bfp4|bfp4/16x16 in q0, bfp4/16x16 in q2"
                )

    @cached_property
    def _hash(self) -> int:
        return hash((self.q, self.format_name, self.options))

    def __hash__(self) -> int:
        """Made once: every GEMM that runs is counted under its precision."""
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: another process hashes text otherwise."""
        return {"q": self.q, "format_name": self.format_name, "options": self.options}

    def _format(self, member: Q) -> Format:
        if isinstance(member, int):
            return formats.make_format(self.format_name, member, self.options)
        fmt = formats.parse(member)
        if not fmt.signed:
            raise ValueError("expected a format with negative values: this one holds second moments")
        return fmt

    def _member(self, q: Q) -> Member:
        fmt = self._format(q)
        return Member(fmt, q, self.format_name) if isinstance(q, int) else Member(fmt, fmt.bits, fmt.family)

    def _instead(self, member: Q) -> str:
        """What to write in place of bits of a family whose width is fixed, to end an error's line."""
        if isinstance(member, str) or self.format_name == "float32":
            return ""
        found = []
        for q in range(formats.MIN_BITS, formats.MAX_BITS + 1):
            with contextlib.suppress(ValueError):
                found.append(formats.make_format(self.format_name, q, self.options).text)
        return f", or name formats: [{','.join(found * 3)},mxfp8e5m2]" if len(found) == 1 else ""

    @cached_property
    def members(self) -> tuple[tuple[Member, Member], ...]:
        """Of the two operands of each q; the same twice where it is no pair."""
        pairs = [[self._member(member) for member in _pair(q)] for q in self.q]
        return tuple((pair[0], pair[-1]) for pair in pairs)

    @cached_property
    def formats(self) -> tuple[tuple[Format, Format], ...]:
        """For each q the formats of its two operands."""
        return tuple((first.fmt, second.fmt) for first, second in self.members)

    def operand_members(self, kind: GemmKind) -> tuple[Member, Member]:
        """Of a GEMM's two operands, in the order of this module's legend."""
        (first, of_first), (second, of_second) = _OPERANDS[kind]
        return self.members[first][of_first], self.members[second][of_second]

    @cached_property
    def _operands(self) -> dict[GemmKind, tuple[Format, Format]]:
        members = {kind: self.operand_members(kind) for kind in _OPERANDS}
        return {kind: (first.fmt, second.fmt) for kind, (first, second) in members.items()}

    def operands(self, kind: GemmKind) -> tuple[Format, Format]:
        """The formats of a GEMM's two operands, in the order of this module's legend."""
        return self._operands[kind]

    def stash(self, role: StashRole) -> Format:
        """What a stash is packed in."""
        index, which = _STASHES[role]
        return self.formats[index][which]

    @cached_property
    def rounds(self) -> bool:
        """Whether any operand is rounded."""
        return any(fmt != Float32() for pair in self.formats for fmt in pair)

    @cached_property
    def has_bits(self) -> bool:
        """Whether any q, or one of a pair, is bits of ``format_name``."""
        return any(isinstance(member, int) for q in self.q for member in _pair(q))

    @cached_property
    def squares(self) -> bool:
        """Whether a weight's boxes are squares."""
        return any(isinstance(fmt.group, Square) for fmt in (self.formats[0][1], self.formats[2][0]))

    @cached_property
    def by_value(self) -> str:
        """The level by value, whichever flags spelled it: ``[bfp2,bfp2,bfp2,bfp16]``."""
        return f"[{','.join('|'.join(dict.fromkeys(fmt.text for fmt in pair)) for pair in self.formats)}]"

    def with_weight(self, fmt: Format) -> PrecisionConfig:
        """The level of a layer whose weight is held in a format, in which every GEMM reads it."""
        first = _pair(self.q[0])[0]
        return replace(self, q=(f"{first}|{fmt.text}", self.q[1], fmt.text, self.q[3]))

    def __str__(self) -> str:
        return "[" + ",".join(str(q) for q in self.q) + "]"


def _pair(q: Q) -> list[Q]:
    """The members of a q, bits as integers."""
    if isinstance(q, int):
        return [q]
    return [int(text) if _INTEGER.fullmatch(text) else text for text in q.split("|")]


FLOAT32 = PrecisionConfig((32, 32, 32, 32), "float32")


def parse_q(text: str) -> tuple[Q, Q, Q, Q]:
    """Four q from ``[2,2,2,16]`` (brackets optional).

    Raises:
        ValueError: anything else; the message quotes the text, and says why a format is none.
    """
    expected = "expected four integers such as [2,2,2,16], or formats such as "
    example = "[int8/row,bfp4,bfp4,bfp16]"
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    pieces = [piece.strip() for piece in inner.split(",")]
    if len(pieces) != 4:
        raise ValueError(f"got {quoted(text)}, {expected}{example}")
    for piece in pieces:
        for member in piece.split("|"):
            if not _INTEGER.fullmatch(member):
                try:
                    formats.parse(member)
                except ValueError as error:
                    got = f"got {shortened(printable(member), 20)} in {shortened(quoted(text), 40)}"
                    known = str(error).partition("expected such as ")[2]  # where it is the text of none
                    raise ValueError(f"{got}, {expected}{known or f'{example}: {error}'}") from None
    q0, q1, q2, q3 = (int(piece) if _INTEGER.fullmatch(piece) else piece for piece in pieces)
    return q0, q1, q2, q3


def parse_levels(
    text: str, format_name: str = "bfp", options: FormatOptions = FormatOptions()
) -> tuple[PrecisionConfig, ...]:
    """The levels of a schedule from ``'[2,2,2,16] [16,4,4,16]'``, in their order, spaces between them.

    Raises:
        ValueError: no level, a malformed one, or a q outside the format's widths; the message names the level
            (counted from 0) and the index.
    """
    pieces = re.findall(r"\[[^\[\]]*\]", text) or re.sub(r"\s*,\s*", ",", text).split()
    if not pieces or "".join("".join(pieces).split()) != "".join(text.split()):
        example = "'[2,2,2,16] [16,4,4,16]', nothing but spaces between them"
        raise ValueError(f"got {quoted(text)}, expected one or more levels such as {example}")
    levels: list[PrecisionConfig] = []
    for number, piece in enumerate(pieces):
        try:
            level = PrecisionConfig(parse_q(piece), format_name, options)
        except ValueError as error:
            raise ValueError(f"level {number}: {error}") from None
        levels.append(level)
    return tuple(levels)


@dataclass(frozen=True)
class Rule:
    """Levels of the modules whose name a shell-style pattern matches.

    Attributes:
        pattern: of a module's full name, or of one that contains it.
        levels: one for each level of the schedule, or one for all.
    """

    pattern: str
    levels: tuple[PrecisionConfig, ...]


def parse_rules(
    text: str, levels: int, format_name: str = "bfp", options: FormatOptions = FormatOptions()
) -> tuple[Rule, ...]:
    """Rules from ``'decoder.output_projection=float32; *.fc2=[4,4,4,16] [16,4,4,16]'``: a format stands for four q.

    Raises:
        ValueError: a rule without a pattern or levels, malformed levels, or neither one level nor as many as
            ``levels``; the message quotes the rule.
    """
    rules = []
    for piece in filter(None, (piece.strip() for piece in text.split(";"))):
        pattern, _, value = (part.strip() for part in piece.partition("="))
        if not pattern or not value:
            raise ValueError(f"got {quoted(piece)}, expected such as '*.fc2=[4,4,4,16]' or 'decoder.*=float32'")
        try:
            own = parse_levels(value if "[" in value else f"[{','.join([value] * 4)}]", format_name, options)
        except ValueError as error:
            raise ValueError(f"rule {quoted(piece)}: {error}") from None
        if len(own) not in (1, levels):
            raise ValueError(f"rule {quoted(piece)}: got {len(own)} levels, expected 1, or {levels} as in --dsq-levels")
        rules.append(Rule(pattern, own))
    return tuple(rules)


def levels_to_str(levels: tuple[PrecisionConfig, ...]) -> str:
    """The inverse of :func:`parse_levels`."""
    return " ".join(str(level) for level in levels)
