"""Text of others within a message of one line: short, and nothing in it that a terminal cannot show."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 80


def printable(text: str) -> str:
    """Text with a question mark in place of what a terminal or a page cannot show."""
    return "".join(character if character.isprintable() else "?" for character in text)


def shortened(text: str, longest: int = LONGEST) -> str:
    """Text of at most ``longest`` characters; the end of a longer one becomes ``...``."""
    return text if len(text) <= longest else text[: longest - 3] + "..."


def quoted(value: object) -> str:
    """A value as Python would write it, shortened."""
    return shortened(repr(value[: LONGEST + 1] if isinstance(value, str) else value))


def check_choice(name: str, value: object, values: Sequence[object]) -> None:
    """Refuse an argument's value that is none of those there are.

    Raises:
        ValueError: one line names the argument.
    """
    if value not in values:
        raise ValueError(f"{name}: got {quoted(value)}, expected one of {', '.join(map(str, values))}")
