"""Precision rises when validation stops improving.

Source: arXiv 2303.05295, section 3 ("time-adaptive").
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fairseq_dsq.flags import boolean, flag, integer, number
from fairseq_dsq.precision import PrecisionConfig
from fairseq_dsq.schedules.base import Policy, State, register

# Validations in a row, none below the first loss of all, after which a training counts as diverging.
DIVERGED = 2


@dataclass(frozen=True)
class PlateauState(State):
    """Where the schedule stands.

    Attributes:
        best_loss: lowest validation loss so far.
        bad_validations: validations in a row without a new best.
    """

    best_loss: float = math.inf
    bad_validations: int = 0


@dataclass(frozen=True)
class DivergenceState(PlateauState):
    """With ``raise_on_divergence``.

    Attributes:
        only_first: 1 while the first loss of all is the best.
    """

    only_first: int = 0


@register
@dataclass(frozen=True)
class Plateau(Policy[PlateauState]):
    """Raises the level after ``patience`` validations in a row without a new best.

    A new best is lower than the best by more than ``min_delta``. The best survives a rise (as in
    ``ReduceLROnPlateau``); the count starts anew. At the last level only the count goes on.
    """

    name: ClassVar[str] = "plateau"
    patience: int = flag(
        1,
        integer("an integer >= 1", lambda value: value >= 1),
        "N",
        "validations in a row without a new best before the level rises",
        "schedule",
    )
    min_delta: float = flag(
        0.0,
        number("a finite number >= 0", lambda value: value >= 0),
        "D",
        "a new best is lower than the best by more than this",
        "schedule",
    )
    raise_on_divergence: bool = flag(
        False,
        boolean,
        "",
        "do not wait for the patience where training diverges: the level rises after a validation loss of NaN or "
        f"infinity, and after {DIVERGED} validations in a row while none was below the first",
        "schedule",
    )

    def start(self) -> PlateauState:
        return DivergenceState() if self.raise_on_divergence else PlateauState()

    def check(self, levels: Sequence[PrecisionConfig]) -> None:
        for number_, (lower, higher) in enumerate(itertools.pairwise(levels), 1):
            for index, (before, after) in enumerate(zip(lower.members, higher.members, strict=True)):
                if any(low.bits > high.bits for low, high in zip(before, after, strict=True)):
                    falls = f"q{index} falls from {lower.q[index]} to {higher.q[index]}"
                    raise ValueError(f"level {number_} {higher}: {falls}, expected no q to decrease")

    def on_validation(self, state: PlateauState, loss: float) -> PlateauState:
        """The state after a validation whose loss was ``loss``; NaN is never a new best."""
        if loss < state.best_loss - self.min_delta:
            first = state.best_loss == math.inf
            state = replace(state, best_loss=loss, bad_validations=0)
            return replace(state, only_first=int(first)) if isinstance(state, DivergenceState) else state
        bad = state.bad_validations + 1
        diverges = isinstance(state, DivergenceState) and (
            not math.isfinite(loss) or (state.only_first == 1 and bad >= DIVERGED)
        )
        if (bad >= self.patience or diverges) and state.level + 1 < self.num_levels:
            return replace(state, level=state.level + 1, bad_validations=0)
        return replace(state, bad_validations=bad)

    def why(self, before: PlateauState, after: PlateauState) -> str:
        if before.bad_validations + 1 < self.patience:
            return f"where training diverges (best loss {after.best_loss})"
        return f"after {self.patience} validations without a new best (best loss {after.best_loss})"
