"""A training's own record, SAVE_DIR/dsq.jsonl: a line where it begins or goes on, and one for each validation.

An epoch's end, a checkpoint, the training's end and a level's have a line without a validation, too.

The lines are JSON objects; a float that JSON lacks is text (``"nan"``). A line is appended by one write, a validation
in place of the last line where that is of the same update and has none, before fairseq writes that update's checkpoint:
whatever is killed when, a checkpoint's training has its lines. A last line that was cut counts for nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_dsq import artefact
from fairseq_dsq.text import printable, quoted

NAME = "dsq.jsonl"
SCHEMA = 1
_MOST = 10**12  # what counts something stays below


@dataclass(frozen=True)
class Start:
    """Where a training begins, or goes on from a checkpoint.

    Attributes:
        schema: of the file; what reads another refuses.
        update, epoch: updates done by then; the epoch that begins or goes on.
        version: of this package.
        arch, criterion: fairseq's names.
        cost_profile: what the ``dsq_*`` costs follow.
        levels: by value, lowest first: ``[bfp2,bfp2,bfp2,bfp16]``.
        flags: all ``dsq_*`` flags, and those of fairseq-train that a report shows or says an end by.
        machine: processor, torch and the like, in words.
    """

    schema: int
    update: int
    epoch: int
    version: str
    arch: str
    criterion: str
    cost_profile: str
    levels: tuple[str, ...]
    flags: Mapping[str, Any]
    machine: Mapping[str, str]


@dataclass(frozen=True)
class Point:
    """A validation; or the end of an epoch, of a level or of the training, or a checkpoint, that has none.

    Attributes:
        update, epoch: updates done by then; the epoch they are in.
        epoch_ended: whether the epoch ends here.
        counts: whether the precision schedule took it into account: not where a stop or a save alone asked for it.
        level, precision: index and value of the level in force.
        train: fairseq's training metrics of the epoch so far, as its log would say them, but not rounded to six digits.
        valid: by subset, in the order of ``--valid-subset``, its metrics, of which the loss is not rounded; empty
            without a validation.
        wall_s: seconds since the training began, or went on.
    """

    update: int
    epoch: int
    epoch_ended: bool
    counts: bool
    level: int
    precision: str
    train: Mapping[str, float]
    valid: Mapping[str, Mapping[str, float]]
    wall_s: float


Line = Start | Point


def read(path: Path) -> list[Line]:
    """The lines of a record; a last one that was cut is left out.

    Raises:
        OSError: it cannot be read.
        ValueError: a line that is none; names the file and the line.
    """
    lines: list[Line] = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            lines.append(_parse(text))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number}: {error or 'too deep'}") from None
    if lines and not isinstance(lines[0], Start):
        raise ValueError(f"{path}: line 1: schema: missing")
    return lines


def begin(path: Path, start: Start, source: Path | None = None, stopped: bool = True) -> str | None:
    """Write the first lines of a record: those of ``source`` up to ``start.update``, then ``start``.

    What the training repeats is cut. Any other validation in ``path`` is kept, in a numbered file beside it.

    Args:
        source: the record beside the checkpoint that training goes on from; None for a training from its start.
        stopped: whether that checkpoint is the last of a training that was stopped or killed.

    Returns:
        A line on a record that was put aside or cannot be read, or on costs of several profiles; None if there is none.

    Raises:
        OSError: the file cannot be written.
    """
    lines, problem = _lines(source)
    kept = [line for line in lines if line.update <= start.update]
    while kept and isinstance(kept[-1], Start):
        kept.pop()  # nothing came of it
    own, own_problem = _lines(path)
    cut = (
        source is not None
        and path.resolve() == source.resolve()
        and (stopped or all(line.update <= start.update for line in lines))
    )
    said = problem
    former = next((line for line in reversed(kept) if isinstance(line, Start)), start)
    profiles = former.cost_profile, start.cost_profile
    if profiles[0] != profiles[1] and former.criterion == start.criterion:
        said = (
            f"--dsq-cost-profile {profiles[0]} up to update {start.update}, {profiles[1]} from there on: their costs "
            "do not add up, and reports will show none"
        )
    if own_problem or (any(isinstance(line, Point) for line in own) and not cut):
        aside = _unused(path)
        path.rename(aside)
        moved = f"{own_problem or f'{path}: has another training'}; it is {aside.name} now"
        said = moved if said in (None, own_problem) else f"{said}; {moved}"
    with artefact.atomic(path) as partial:
        partial.write_text("".join(map(_to_text, [*kept, start])), encoding="utf-8")
    return said


def append(path: Path, point: Point, at: int | None = None) -> int:
    """Add a line, by one write.

    Args:
        at: the byte that it begins at, in place of what stands there; None for the end.

    Returns:
        The byte that it begins at.

    Raises:
        OSError: it cannot be written.
    """
    with open(path, "ab", buffering=0) as file:
        if at is not None and at < file.tell():
            file.truncate(at)
        begins = file.seek(0, os.SEEK_END)
        file.write(_to_text(point).encode())
    return begins


def _lines(path: Path | None) -> tuple[list[Line], str | None]:
    """A record's lines, none where there is no record, and what is wrong with it."""
    try:
        return (read(path) if path is not None and path.exists() else []), None
    except ValueError as error:
        return [], str(error)


def _unused(path: Path) -> Path:
    number = 1
    while (aside := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    return aside


def _to_text(line: Line) -> str:
    return json.dumps(_plain(dataclasses.asdict(line)), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _parse(line: bytes) -> Line:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{printable(str(error))}, expected a JSON object") from None
    if not isinstance(found, dict):
        raise ValueError(f"got {quoted(found)}, expected a JSON object")
    kind: type[Start] | type[Point] = Start if "schema" in found else Point
    if kind is Start and found["schema"] != SCHEMA:
        raise ValueError(f"schema: got {quoted(found['schema'])}, expected {SCHEMA}: written by another version")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        try:
            values[field.name] = _READERS[str(field.type)](found[field.name])
        except KeyError:
            raise ValueError(f"{field.name}: missing") from None
        except (TypeError, ValueError, OverflowError, AttributeError):
            raise ValueError(f"{field.name}: got {quoted(found[field.name])}, expected {field.type}") from None
    return kind(**values)


def _is(kind: type, accepts: Callable[[Any], bool] = lambda _: True) -> Callable[[Any], Any]:
    """What refuses all but values of one type."""

    def read(value: Any) -> Any:
        if type(value) is not kind or not accepts(value):
            raise ValueError
        return value

    return read


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return value if isinstance(value, int) and abs(value) < _MOST else float(value)


def _numbers(value: Any) -> dict[str, float]:
    return {name: _number(number) for name, number in value.items()}


_text = _is(str)
_READERS = {
    "int": _is(int, lambda value: 0 <= value < _MOST),
    "bool": _is(bool),
    "str": _text,
    "float": _number,
    "tuple[str, ...]": lambda value: tuple(map(_text, _is(list)(value))),
    "Mapping[str, Any]": _is(dict),
    "Mapping[str, str]": lambda value: {name: _text(text) for name, text in value.items()},
    "Mapping[str, float]": _numbers,
    "Mapping[str, Mapping[str, float]]": lambda value: {name: _numbers(numbers) for name, numbers in value.items()},
}
