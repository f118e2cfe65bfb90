"""What ran: GEMMs and stashes, counted when they run."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from fairseq_dsq.precision import FOR_REPEATS, GemmKind, PrecisionConfig, StashRole


class Gemm(NamedTuple):
    """One (batched) matrix product that ran: ``batch`` times MxK @ KxN => MxN."""

    kind: GemmKind
    m: int
    k: int
    n: int
    batch: int = 1

    @classmethod
    @lru_cache(maxsize=4096)
    def of_product(cls, kind: GemmKind, m: int, k: int, n: int, batch: int = 1) -> Gemm:
        """One of the three GEMMs of a product whose output GEMM is MxK @ KxN; grad_weight is KxM @ MxN."""
        sizes = {"output": (m, k, n), "grad_input": (m, n, k), "grad_weight": (k, m, n)}[kind]
        return cls(kind, *sizes, batch)

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.batch * self.m * self.k * self.n

    @property
    def elements(self) -> int:
        """Elements of the two operands and the result."""
        return self.batch * (self.m * self.k + self.k * self.n + self.m * self.n)


class Stash(NamedTuple):
    """An operand packed for backward: a GEMM's input, or the second operand of a batched product, its weight.

    Of one in the role "recomputed" nothing is packed: the backward pass makes it again.
    """

    role: StashRole
    shape: tuple[int, ...]
    dim: int

    @property
    def elements(self) -> int:
        """Elements packed."""
        return math.prod(self.shape)

    @property
    def for_repeat(self) -> bool:
        """Whether only an output GEMM that the backward pass repeats needs it."""
        return self.role in FOR_REPEATS


class Update(NamedTuple):
    """An optimizer's step: the values that it updates, and what it reads and writes of them as they are held.

    Attributes:
        values: of the weights.
        weight_bytes: of the weights, and of float copies that an optimizer keeps of them.
        gradient_bytes: of their gradients, and of those of the copies.
        state_bytes: of the optimizer's states.
    """

    values: int
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int

    @property
    def in_float32(self) -> Update:
        """The update of as many values by Adam, all in float32."""
        return Update(self.values, 4 * self.values, 4 * self.values, 8 * self.values)


class LedgerKey(NamedTuple):
    """A GEMM, the precision it ran at, whether its forward pass ran under grad, and the module it served.

    ``repeated`` is an output GEMM that a backward pass runs once more: activation checkpointing's, of which the first
    ran without grad, and attention's scores under stash scope ``all``.
    """

    gemm: Gemm
    precision: PrecisionConfig
    training: bool
    scope: str = ""
    repeated: bool = False


class StashKey(NamedTuple):
    """A stash, the precision it was packed at, and the module it served."""

    stash: Stash
    precision: PrecisionConfig
    scope: str = ""


@dataclass
class Work:
    """What ran: GEMMs and stashes with their counts, the bytes that the stashes really took, and updates.

    Of batches that share an update each has a part of it: the counts of updates may be fractions.
    """

    gemms: Counter[LedgerKey] = field(default_factory=Counter)
    stashes: Counter[StashKey] = field(default_factory=Counter)
    stash_bytes: int = 0
    updates: dict[Update, float] = field(default_factory=dict)

    def once(self) -> Work:
        """The same with nothing repeated nor packed for it, all inputs kept; the bytes really taken are not known."""
        stashes = Counter[StashKey]()
        for key, count in self.stashes.items():
            if not key.stash.for_repeat:
                role: StashRole = "input" if key.stash.role == "recomputed" else key.stash.role
                stashes[key._replace(stash=key.stash._replace(role=role))] += count
        gemms = Counter({key: count for key, count in self.gemms.items() if not key.repeated})
        return Work(gemms, stashes, updates=dict(self.updates))

    def at_precision(self, precision: PrecisionConfig) -> Work:
        """The same GEMMs, stashes and updates at another level; the bytes really taken by stashes are not known."""
        return Work(
            Counter({key._replace(precision=precision): count for key, count in self.gemms.items()}),
            Counter({key._replace(precision=precision): count for key, count in self.stashes.items()}),
            updates=dict(self.updates),
        )


# What a ledger notes down before it counts: a step's worth, so that one that nobody drains stays small.
_NOTES = 1_000


@dataclass
class Ledger:
    """Counts the GEMMs that a model executes, each when it runs, and what it packs for backward.

    What a backward pass repeats is counted as often as it runs, and marked.

    Attributes:
        scope: goes into every key; names the module at work, for whoever wants to tell them apart.
        updated_codes: codes of weights that are held as such, in the updates since the last :meth:`drain_updates`.
        changed_codes: how many of them an update changed: a number, or a tensor that nobody has waited for.
    """

    scope: str = ""
    updated_codes: int = 0
    changed_codes: Any = 0
    _work: Work = field(default_factory=Work)
    # Fields of a LedgerKey and of a StashKey: to make and hash a key takes ten times as long as to note its fields.
    _ran: list[tuple[tuple[GemmKind, int, int, int, int], PrecisionConfig, bool, str, bool]] = field(
        default_factory=list
    )
    _packed: list[tuple[tuple[StashRole, tuple[int, ...], int], PrecisionConfig, str]] = field(default_factory=list)

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
        repeated = kind == "output" and torch._C._current_graph_task_id() >= 0  # autograd is in a backward pass
        ran = (kind, m, k, n, batch), precision, training, self.scope if scope is None else scope, repeated
        self._ran.append(ran)
        if len(self._ran) > _NOTES:
            self._count()

    def record_stash(
        self, role: StashRole, shape: tuple[int, ...], dim: int, precision: PrecisionConfig, nbytes: int
    ) -> None:
        """Count one stash that took ``nbytes`` bytes."""
        self._packed.append(((role, shape, dim), precision, self.scope))
        self._work.stash_bytes += nbytes
        if len(self._packed) > _NOTES:
            self._count()

    def _count(self) -> Work:
        """All that ran so far, with what has been noted down."""
        for (gemm, precision, training, scope, repeated), count in Counter(self._ran).items():
            self._work.gemms[LedgerKey(Gemm(*gemm), precision, training, scope, repeated)] += count
        for (stash, precision, scope), count in Counter(self._packed).items():
            self._work.stashes[StashKey(Stash(*stash), precision, scope)] += count
        self._ran, self._packed = [], []
        return self._work

    @property
    def gemms(self) -> Counter[LedgerKey]:
        """The GEMMs that ran."""
        return self._count().gemms

    @property
    def stashes(self) -> Counter[StashKey]:
        """The stashes that were packed."""
        return self._count().stashes

    @property
    def stash_bytes(self) -> int:
        """Bytes that the stashes took."""
        return self._work.stash_bytes

    def record_update(self, changed: Any, codes: int) -> None:
        """Count one update of a weight of so many codes, of which it changed ``changed``."""
        self.updated_codes += codes
        self.changed_codes = self.changed_codes + changed

    def drain_updates(self) -> tuple[int, int]:
        """Codes that were changed and that were updated since the last call; starts anew."""
        found = int(self.changed_codes), self.updated_codes
        self.updated_codes = self.changed_codes = 0
        return found

    def drain(self) -> Work:
        """What ran since the last call; starts anew."""
        work, self._work = self._count(), Work()
        return work
