"""The precision schedule: a pure state machine, validation loss in, level out.

Source: arXiv 2303.05295, section 3 ("time-adaptive"): precision rises when validation stops improving.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ScheduleState:
    """Where a schedule stands.

    Attributes:
        level: index of the current level.
        best_loss: lowest validation loss so far.
        bad_validations: validations in a row without a new best.
    """

    level: int = 0
    best_loss: float = math.inf
    bad_validations: int = 0


@dataclass(frozen=True)
class PrecisionSchedule:
    """Raises the level after ``patience`` validations in a row without a new best.

    A new best is lower than the best by more than ``min_delta``. The best survives a rise (as in
    ``ReduceLROnPlateau``); the count starts anew. At the last level only the count goes on.

    Raises:
        ValueError: no level, patience < 1, or a min_delta that is negative or not finite.
    """

    num_levels: int
    patience: int = 5
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.num_levels < 1:
            raise ValueError(f"num_levels: got {self.num_levels!r}, expected >= 1")
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise ValueError(f"patience: got {self.patience!r}, expected an integer >= 1")
        if not (math.isfinite(self.min_delta) and self.min_delta >= 0):
            raise ValueError(f"min_delta: got {self.min_delta!r}, expected a finite number >= 0")

    def step(self, state: ScheduleState, loss: float) -> ScheduleState:
        """The state after a validation whose loss was ``loss``; NaN is never a new best."""
        if loss < state.best_loss - self.min_delta:
            return replace(state, best_loss=loss, bad_validations=0)
        bad = state.bad_validations + 1
        if bad >= self.patience and state.level + 1 < self.num_levels:
            return replace(state, level=state.level + 1, bad_validations=0)
        return replace(state, bad_validations=bad)
