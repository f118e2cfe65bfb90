"""Average the parameters of checkpoints of one training into a checkpoint at the highest of their precision levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils
from torch import Tensor

from fairseq_dsq import artefact, schedules
from fairseq_dsq.errors import DSQError
from fairseq_dsq.plugin.checkpoints import PREFIX, without_schedule
from fairseq_dsq.plugin.config import DSQConfig, defaults, option
from fairseq_dsq.plugin.effects import levels_of
from fairseq_dsq.plugin.state import SavedSchedule


def average(output: Path, checkpoints: Sequence[Path]) -> SavedSchedule | None:
    """Write the average of checkpoints to ``output``; returns its schedule, None where no model has DSQ layers.

    Raises:
        OSError: a checkpoint, or the folder of ``output``, does not exist.
        ValueError: they are not checkpoints of one model at the same levels; names the first that differs.
    """
    if not output.parent.is_dir():
        raise OSError(f"{output}: its folder does not exist")
    first, *others = checkpoints
    document = _read(first)
    record, parameters = _record(first, document), without_schedule(document["model"])
    sums = {name: value.double() if value.is_floating_point() else value for name, value in parameters.items()}
    for path in others:
        state = _read(path)
        _compare_flags(path, first, state["cfg"]["model"], document["cfg"]["model"])
        record = _join(path, first, _record(path, state), record)
        own = without_schedule(state["model"])
        _compare_parameters(path, first, own, parameters)
        for name, value in own.items():
            if value.is_floating_point():
                sums[name] += value.double()
            elif not torch.equal(value, sums[name]):
                raise ValueError(f"{path}: {name} is not that of {first}, and integers have no average")
    count = len(checkpoints)
    document["model"] = {
        name: (sums[name] / count).to(value.dtype) if value.is_floating_point() else value
        for name, value in parameters.items()
    }
    if record is not None:
        document["model"] |= {PREFIX + name: value for name, value in record.entries().items()}
    # They belong to the parameters of one of the checkpoints.
    document.pop("last_optimizer_state", None)
    for name in ("ema", "ema_fp32_params"):
        document["extra_state"].pop(name, None)
    with artefact.atomic(output) as partial:
        torch.save(document, partial)
    return record


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise OSError(f"{path}: does not exist, expected a checkpoint")
    try:
        state: dict[str, Any] = checkpoint_utils.load_checkpoint_to_cpu(str(path))
        _ = state["model"].items(), state["cfg"]["model"], state["extra_state"]
    except DSQError:
        raise  # says so itself
    except Exception as error:  # torch and fairseq raise whatever comes first
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"{path}: expected a checkpoint of fairseq-train ({type(error).__name__}: {reason})") from None
    return state


def _record(path: Path, state: Mapping[str, Any]) -> SavedSchedule | None:
    """What a checkpoint says of the schedule; None for one of a float model."""
    entries = {name.removeprefix(PREFIX): value for name, value in state["model"].items() if name.startswith(PREFIX)}
    if not entries:
        return None
    flags: Any = DSQConfig.of(state["cfg"]["model"])
    try:
        levels = tuple(level.by_value for level in levels_of(flags))
    except ValueError as error:
        raise ValueError(f"{path}: --dsq-levels: {error}") from None
    try:
        start = schedules.make(flags.dsq_schedule, len(levels), flags).start()
    except ValueError as error:
        raise ValueError(f"{path}: dsq_{error}") from None
    record = SavedSchedule.of(entries, start)
    return record if record.levels else replace(record, levels=levels)


def _join(path: Path, first: Path, own: SavedSchedule | None, other: SavedSchedule | None) -> SavedSchedule | None:
    """The higher of two levels. No loss of the average is known, so that none is the best."""
    if own is None or other is None:
        if own is not other:
            raise ValueError(f"{path}: expected checkpoints with DSQ layers or without, as {first}")
        return None
    if own.levels != other.levels:
        raise ValueError(
            f"{path}: got the levels {' '.join(own.levels)}, expected {' '.join(other.levels)}, those of {first}"
        )
    level = max(own.schedule.level, other.schedule.level)
    fresh: dict[str, Any] = {field.name: field.default for field in fields(own.schedule)}
    schedule = replace(own.schedule, **{**fresh, "level": level})
    return replace(own, in_force=max(own.in_force, other.in_force), schedule=schedule, counted_update=-1)


def _compare_flags(path: Path, first: Path, own: Any, other: Any) -> None:
    # The other flags change nothing that a model computes in evaluation, or are part of the levels by value.
    for name, default in {"arch": None, **defaults(DSQConfig, "evaluation")}.items():
        got, expected = (getattr(model, name, default) for model in (own, other))
        if got != expected:
            raise ValueError(f"{path}: {option(name)}: got {got!r}, expected {expected!r}, that of {first}")


def _compare_parameters(path: Path, first: Path, own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    for name in dict.fromkeys([*other, *own]):
        got, expected = (tuple(model[name].shape) if name in model else None for model in (own, other))
        if got != expected:
            raise ValueError(f"{path}: {name}: got {got or 'none'}, expected {expected or 'none'}, that of {first}")
