"""Precision is what a function of one's own says."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fairseq_dsq.errors import DSQError
from fairseq_dsq.flags import flag
from fairseq_dsq.schedules.base import Policy, State, register
from fairseq_dsq.text import printable, quoted


def dotted(value: Any) -> str:
    """A check of ``module:function``."""
    if not isinstance(value, str) or (value and not re.fullmatch(r"\w+(\.\w+)*:\w+", value)):
        raise ValueError(f"got {quoted(value)}, expected module:function such as my_rules.levels:rise")
    return value


@dataclass(frozen=True)
class CallbackState(State):
    """Where the schedule stands.

    Attributes:
        loss: of the last validation; NaN before the first.
    """

    loss: float = math.nan


@register
@dataclass(frozen=True)
class Callback(Policy[CallbackState]):
    """Asks ``callback(level, updates, epoch, loss)`` before each update for the index of the level.

    ``loss`` is that of the last validation, NaN before the first. What the function returns has to follow from its
    arguments alone: several workers ask it apart, and a training that goes on asks it where it was stopped.
    """

    name: ClassVar[str] = "callback"
    callback: str = flag(
        "",
        dotted,
        "MODULE:FUNCTION",
        "with --dsq-schedule callback: a function that Python can import; asked before each update with (level, "
        "updates, epoch, validation loss), it returns the index of the level",
        "schedule",
    )

    def start(self) -> CallbackState:
        return CallbackState()

    def prepare(self) -> None:
        self._function()

    def on_validation(self, state: CallbackState, loss: float) -> CallbackState:
        return replace(state, loss=loss)

    def on_update(self, state: CallbackState, updates: int, epoch: int) -> CallbackState:
        level = self._function()(state.level, updates, epoch, state.loss)
        if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < self.num_levels:
            last = self.num_levels - 1
            raise DSQError(
                f"argument --dsq-callback: {self.callback}: returned {quoted(level)} after {updates} updates, expected "
                f"an integer from 0 to {last}"
            )
        return replace(state, level=level)

    def _function(self) -> Callable[..., Any]:
        module, _, function = self.callback.partition(":")
        if not module:
            raise ValueError("callback: got '', expected module:function")
        try:
            found = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"callback: got {self.callback!r}, expected module:function ({printable(str(error))})"
            ) from None
        if not callable(found):
            raise ValueError(f"callback: got {self.callback!r}, expected a function")
        return found  # type: ignore[no-any-return]
