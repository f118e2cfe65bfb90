"""Precision changes at given updates, or epochs."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fairseq_dsq.flags import flag
from fairseq_dsq.schedules.base import Policy, State, register
from fairseq_dsq.text import quoted

_POINT = re.compile(r"(epoch:)?([0-9]{1,12})")


def points(value: Any) -> str:
    """A check of ``1000,4000`` or ``epoch:2,epoch:5``."""
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    text = str(text) if isinstance(text, int) and not isinstance(text, bool) else text
    expected = "expected rising updates such as 1000,4000, or epochs such as epoch:2,epoch:5"
    if not isinstance(text, str):
        raise ValueError(f"got {quoted(value)}, {expected}")
    found = [_POINT.fullmatch(piece.strip()) for piece in text.split(",")] if text else []
    kinds = {match[1] for match in found if match}
    numbers = [int(match[2]) for match in found if match]
    rising = all(before < after for before, after in itertools.pairwise([0, *numbers]))
    if len(numbers) < len(found) or len(kinds) > 1 or not rising:
        raise ValueError(f"got {quoted(value)}, {expected}")
    return text


@register
@dataclass(frozen=True)
class Updates(Policy[State]):
    """Goes to the next level at each point of ``raise_at``: after so many updates, or where an epoch begins."""

    name: ClassVar[str] = "updates"
    raise_at: str = flag(
        "",
        points,
        "POINTS",
        "with --dsq-schedule updates: where the next level begins, once for each level but the first: updates such as "
        "1000,4000, or epochs such as epoch:2,epoch:5",
        "schedule",
    )

    @property
    def at(self) -> list[int]:
        """The points, as numbers."""
        return [int(match[2]) for match in _POINT.finditer(self.raise_at)]

    @property
    def in_epochs(self) -> bool:
        """Whether the points are epochs."""
        return "epoch" in self.raise_at

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.at) != self.num_levels - 1:
            raise ValueError(
                f"raise_at: got {self.raise_at!r}, expected {self.num_levels - 1} point"
                f"{'s' * (self.num_levels != 2)} for the {self.num_levels} levels of --dsq-levels, such as 1000,4000 "
                "or epoch:2,epoch:5"
            )

    def start(self) -> State:
        return State()

    def on_update(self, state: State, updates: int, epoch: int) -> State:
        reached = epoch if self.in_epochs else updates
        return replace(state, level=sum(point <= reached for point in self.at))
