"""What checkpoints are called and hold; one whose tensors are not the model's: which one, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

Shape = tuple[int, ...] | None
# The default of --restore-file: what is in --save-dir, if anything is.
LAST = "checkpoint_last.pt"
# Of the entries of the schedule in a model's state.
PREFIX = "dsq."


def with_suffix(path: str, suffix: str) -> str:
    """A checkpoint's path under --checkpoint-suffix, as fairseq puts it together."""
    return path.replace(".pt", f"{suffix}.pt")


def shape_to_str(shape: Shape) -> str:
    """Such as ``30522 x 384``; a tensor that is missing is ``none``."""
    return "none" if shape is None else " x ".join(map(str, shape)) or "a number"


def without_schedule(state: Mapping[str, Any]) -> dict[str, Any]:
    """A model's entries but for those of its schedule."""
    return {name: value for name, value in state.items() if not name.startswith(PREFIX)}


def misfit(own: Mapping[str, Tensor], checkpoint: Mapping[str, Tensor]) -> tuple[str, Shape, Shape] | None:
    """(name, shape in the checkpoint, shape in the model) of the first tensor that differs; those that both have first.

    The schedule's entries fit whatever they are, see :class:`fairseq_dsq.plugin.state.SavedSchedule`.
    """
    names = without_schedule({**own, **checkpoint})
    for name in sorted(names, key=lambda name: name not in own or name not in checkpoint):
        has, expected = (tuple(state[name].shape) if name in state else None for state in (checkpoint, own))
        if has != expected:
            return name, has, expected
    return None
