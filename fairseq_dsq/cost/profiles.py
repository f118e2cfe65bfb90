"""Cost profiles: what a GEMM costs at a precision, and what an update does.

A profile is a data file in configs/cost/ (or anywhere) whose ``kind`` names one of the classes below, or one of one's
own (:func:`register`); it holds the coefficients, where they come from and what they do not fit. Costs are given beside
those of the same GEMMs and stashes in 32-bit fixed point, the paper's baseline, and of the same updates by Adam in
float32. The baseline keeps all that its backward pass needs: what is repeated, and what is packed to be repeated, costs
and is not in it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

from fairseq_dsq import data_files
from fairseq_dsq.cost.gemm import gemm_bytes, stash_bytes, update_bytes
from fairseq_dsq.formats import Float32
from fairseq_dsq.ledger import Gemm, LedgerKey, Stash, StashKey, Update
from fairseq_dsq.precision import GemmKind, Member, PrecisionConfig

BASELINE_BITS = 32
BASELINE_BYTES = BASELINE_BITS // 8
BASELINE_MAC = BASELINE_BITS**2  # partial products
ANY_FORMAT = "*"
FOLDER = "cost"


@dataclass(frozen=True)
class Cost:
    """What GEMMs and updates cost; costs add up.

    Attributes:
        arithmetic: in MACs of 32-bit fixed point.
        arithmetic_baseline: the same GEMMs' MACs, each once.
        dram_bytes: modelled DRAM traffic.
        dram_baseline_bytes: traffic of the same GEMMs in 32-bit fixed point, of the same updates by Adam in float32.
    """

    arithmetic: float = 0.0
    arithmetic_baseline: float = 0.0
    dram_bytes: float = 0.0
    dram_baseline_bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.arithmetic + other.arithmetic,
            self.arithmetic_baseline + other.arithmetic_baseline,
            self.dram_bytes + other.dram_bytes,
            self.dram_baseline_bytes + other.dram_baseline_bytes,
        )

    def __mul__(self, count: float) -> Cost:
        return Cost(
            self.arithmetic * count,
            self.arithmetic_baseline * count,
            self.dram_bytes * count,
            self.dram_baseline_bytes * count,
        )

    @property
    def without_baseline(self) -> Cost:
        """The same, of what the baseline has no need of."""
        return replace(self, arithmetic_baseline=0.0, dram_baseline_bytes=0.0)

    @property
    def arithmetic_relative(self) -> float:
        """Over the same GEMMs in 32-bit fixed point; NaN where nothing ran."""
        return self.arithmetic / self.arithmetic_baseline if self.arithmetic_baseline else math.nan

    @property
    def dram_relative(self) -> float:
        """Over the same GEMMs in 32-bit fixed point; NaN where nothing ran."""
        return self.dram_bytes / self.dram_baseline_bytes if self.dram_baseline_bytes else math.nan


@dataclass  # OmegaConf cannot fill a frozen one inside a mapping
class FormatCost:
    """Coefficients of one number format.

    A MAC of operands with a and b bits costs (product*a*b + root*sqrt(a*b)) / 1024 32-bit fixed-point MACs.

    Attributes:
        overhead_bits: what an element takes in DRAM beside its q bits; only kind ``setting`` reads it.
    """

    product: float = 1.0
    root: float = 0.0
    overhead_bits: float = 0.0

    def __post_init__(self) -> None:
        for name in ("product", "root", "overhead_bits"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a finite number >= 0")

    def mac(self, a: int, b: int) -> float:
        """One MAC of an a-bit and a b-bit operand, in 32-bit fixed-point MACs."""
        return (self.product * a * b + self.root * math.sqrt(a * b)) / BASELINE_MAC


@dataclass(frozen=True)
class CostProfile(ABC):
    """What all kinds of profile hold.

    What is reported is a cost over its baseline, and below that of 16-bit fixed point: units cancel, if a kind has the
    baseline in the same unit. What is shown as such is MACs of 32-bit fixed point, and bytes.

    Attributes:
        name: as the tables print it.
        derivation: where the formulas and numbers come from.
        misfits: what the profile is known not to reproduce or not to model.
        formats: coefficients by format name; ``*`` serves the formats without an entry.
        prices_updates: whether updates cost anything.
    """

    name: str
    derivation: str
    formats: dict[str, FormatCost]
    misfits: list[str] = field(default_factory=list)

    prices_updates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if ANY_FORMAT not in self.formats:
            raise ValueError(
                f"formats: got {', '.join(self.formats) or 'none'}, expected one of them to be {ANY_FORMAT!r}"
            )

    def format_cost(self, family: str) -> FormatCost:
        """The coefficients of a format family."""
        return self.formats.get(family) or self.formats[ANY_FORMAT]

    @cached_property
    def _known(self) -> dict[Any, float]:
        """What :meth:`mac` and the like gave: a training step prices each of its GEMMs twice."""
        return {}

    def unpriced(self, levels: Iterable[PrecisionConfig]) -> list[str]:
        """The formats of levels that a profile of named families does not name; float32, the unit, is not among them.

        A profile whose only formula is ``*`` prices every format by it.
        """
        named = self.formats.keys() - {ANY_FORMAT}
        found = {member.fmt.text: member.family for level in levels for pair in level.members for member in pair}
        return [text for text, family in found.items() if named and family not in {*named, Float32.family}]

    def says_of_unpriced(self, levels: Iterable[PrecisionConfig]) -> str:
        """One line on :meth:`unpriced`; empty where there are none."""
        names = ", ".join(self.unpriced(levels))
        fixed = self.formats[ANY_FORMAT] == FormatCost()
        formula = "fixed point of the same bits, scales not counted" if fixed else f"its entry {ANY_FORMAT} has it"
        return f"profile {self.name} has no price for {names}: charged as {formula}" if names else ""

    def mac(self, precision: PrecisionConfig, kind: GemmKind, bits: tuple[int, int]) -> float:
        """One MAC of a GEMM's operands, in 32-bit fixed-point MACs; of two families, the dearer one's formula."""
        key = precision, kind, bits
        if key not in self._known:
            self._known[key] = max(self.format_cost(each.family).mac(*bits) for each in precision.operand_members(kind))
        return self._known[key]

    @abstractmethod
    def gemm(self, gemm: Gemm, precision: PrecisionConfig, training: bool) -> Cost:
        """Cost of one GEMM; ``training`` says whether its forward pass ran under grad."""

    @abstractmethod
    def stash(self, stash: Stash, precision: PrecisionConfig) -> Cost:
        """Cost of writing one stash; reading it belongs to the GEMM that reads it."""

    def update(self, update: Update) -> Cost:
        """Cost of one update, whatever the level; nothing unless ``prices_updates``."""
        return Cost()


@dataclass(frozen=True)
class SettingProfile(CostProfile):
    """Charges the setting [q0,q1,q2,q3] itself, as the paper's tables do.

    DRAM traffic relative to the baseline is the mean over q0..q3 of (q + overhead_bits) / 32, whatever the GEMM; q0
    alone for a forward pass without grad. The stash is q1's part of that mean.
    """

    def dram_relative(self, precision: PrecisionConfig, training: bool) -> float:
        """DRAM traffic of a training step, or of a forward pass alone, relative to 32-bit fixed point."""
        key = precision, training
        if key not in self._known:
            self._known[key] = self._dram_relative(precision, training)
        return self._known[key]

    def _dram_relative(self, precision: PrecisionConfig, training: bool) -> float:
        pairs = precision.members[: None if training else 1]

        def stored(member: Member) -> float:
            return member.bits + self.format_cost(member.family).overhead_bits

        return sum((stored(first) + stored(second)) / 2 for first, second in pairs) / (BASELINE_BITS * len(pairs))

    def gemm(self, gemm: Gemm, precision: PrecisionConfig, training: bool) -> Cost:
        baseline_bytes = BASELINE_BYTES * gemm.elements
        first, second = precision.operand_members(gemm.kind)
        return Cost(
            arithmetic=gemm.macs * self.mac(precision, gemm.kind, (first.bits, second.bits)),
            arithmetic_baseline=gemm.macs,
            dram_bytes=baseline_bytes * self.dram_relative(precision, training),
            dram_baseline_bytes=baseline_bytes,
        )

    def stash(self, stash: Stash, precision: PrecisionConfig) -> Cost:
        return Cost()


@dataclass(frozen=True)
class OperandProfile(CostProfile):
    """Charges every operand, result and stash at the bits and bytes that its packed format takes; updates likewise."""

    prices_updates: ClassVar[bool] = True

    def gemm(self, gemm: Gemm, precision: PrecisionConfig, training: bool) -> Cost:
        first, second = precision.operands(gemm.kind)
        return Cost(
            arithmetic=gemm.macs * self.mac(precision, gemm.kind, (first.bits, second.bits)),
            arithmetic_baseline=gemm.macs,
            dram_bytes=gemm_bytes(gemm, precision),
            dram_baseline_bytes=BASELINE_BYTES * gemm.elements,
        )

    def stash(self, stash: Stash, precision: PrecisionConfig) -> Cost:
        return Cost(
            dram_bytes=stash_bytes(stash, precision),
            dram_baseline_bytes=BASELINE_BYTES * stash.elements,
        )

    def update(self, update: Update) -> Cost:
        return Cost(dram_bytes=update_bytes(update), dram_baseline_bytes=update_bytes(update.in_float32))


_KINDS: dict[str, type[CostProfile]] = {"setting": SettingProfile, "operands": OperandProfile}


def register(kind: str, profile: type[CostProfile]) -> None:
    """Have files whose ``kind`` is this one make profiles of a class: a dataclass, whose fields are the file's keys.

    Raises:
        ValueError: the name is another class's already.
    """
    if _KINDS.setdefault(kind, profile) is not profile:
        raise ValueError(f"kind {kind!r}: registered already")


def load_profile(name: str) -> CostProfile:
    """The profile of a name in configs/cost/, or of the path of a file of one's own.

    Raises:
        ValueError: no such profile, or a file that is not one; the message says what is expected.
    """
    return data_files.load_kind(_KINDS, FOLDER, name)


def total_cost(
    profile: CostProfile,
    gemms: Iterable[tuple[LedgerKey, int]],
    stashes: Iterable[tuple[StashKey, int]],
    updates: Iterable[tuple[Update, float]] = (),
) -> Cost:
    """Sum over the items of what ran, as :class:`fairseq_dsq.nn.Work` counts it."""
    total = Cost()
    for ran, count in gemms:
        cost = profile.gemm(ran.gemm, ran.precision, ran.training) * count
        total += cost.without_baseline if ran.repeated else cost
    for (stash, precision, _), count in stashes:
        cost = profile.stash(stash, precision) * count
        total += cost.without_baseline if stash.for_repeat else cost
    for update, count_of_update in updates:
        total += profile.update(update) * count_of_update
    return total
