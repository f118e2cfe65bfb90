"""What a flag is: a field of a configuration with a check, and a text for --help."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fairseq_dsq.text import quoted

# Checks a flag's value, text from a command line or a value from YAML or Python, and gives it in its one form.
Check = Callable[[Any], Any]
# What a flag decides: the levels, by value; when they rise; what evaluation computes too; or training alone.
Role = Literal["levels", "schedule", "evaluation", "training"]


def integer(expected: str, accepts: Callable[[int], bool]) -> Check:
    """A check of an integer."""

    def check(value: Any) -> int:
        text = value.strip() if isinstance(value, str) else str(value)
        if isinstance(value, bool) or not isinstance(value, (int, str)) or not re.fullmatch("[0-9]+", text):
            raise ValueError(f"got {quoted(value)}, expected {expected}")
        if not accepts(int(text)):
            raise ValueError(f"got {quoted(value)}, expected {expected}")
        return int(text)

    return check


def number(expected: str, accepts: Callable[[float], bool]) -> Check:
    """A check of a finite number."""

    def check(value: Any) -> float:
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if not (math.isfinite(found) and accepts(found)):
            raise ValueError(f"got {quoted(value)}, expected {expected}")
        return found

    return check


def boolean(value: Any) -> bool:
    """A check of a switch without a value, such as ``--head-from-pooler``."""
    if not isinstance(value, bool):
        raise ValueError(f"got {quoted(value)}, expected True or False")
    return value


@dataclass(frozen=True)
class Choice:
    """A check of a name among ``values()``."""

    values: Callable[[], Sequence[str]]

    def __call__(self, value: Any) -> str:
        values = self.values()
        if isinstance(value, bool) and {"on", "off"} <= set(values):
            value = "on" if value else "off"  # YAML reads both as booleans
        if not isinstance(value, str) or value not in values:
            raise ValueError(f"got {quoted(value)}, expected one of {', '.join(values)}")
        return value


def choice(*values: str) -> Choice:
    return Choice(lambda: values)


def flag(default: Any, check: Check, metavar: str, help: str, role: Role = "evaluation", plain: bool = True) -> Any:
    """A field of a configuration.

    Args:
        help: one that ends in a colon is completed by the values of its :class:`Choice`.
        plain: the float model has the flag's effect too, or does not need it; else only the default can be exported.
    """
    metadata = {"check": check, "metavar": metavar, "help": help, "role": role, "plain": plain}
    return dataclasses.field(default=default, metadata=metadata)
