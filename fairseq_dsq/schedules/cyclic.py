"""Precision goes through the levels in turn, again and again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fairseq_dsq.flags import flag, integer
from fairseq_dsq.schedules.base import Policy, State, register


@register
@dataclass(frozen=True)
class Cyclic(Policy[State]):
    """Goes to the next level, after the last one to the first, every ``cycle`` updates."""

    name: ClassVar[str] = "cyclic"
    cycle: int = flag(
        1000,
        integer("an integer >= 1", lambda value: value >= 1),
        "N",
        "with --dsq-schedule cyclic: updates at each level",
        "schedule",
    )

    def start(self) -> State:
        return State()

    def on_update(self, state: State, updates: int, epoch: int) -> State:
        return replace(state, level=updates // self.cycle % self.num_levels)
