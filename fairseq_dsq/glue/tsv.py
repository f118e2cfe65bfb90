"""Read a task's TSV files as GLUE ships them: UTF-8, a header line (CoLA: none), tabs, no quoting."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fairseq_dsq.glue.tasks import GlueTask
from fairseq_dsq.text import printable, shortened

_SHOWN = 60


class _Broken(ValueError):
    """A row that a task which ships broken rows may have: skipped there, an error elsewhere."""


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        sentences: one or two, without white space around them.
        label: one of the task's labels, or a score as text.
    """

    sentences: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Table:
    """A file's rows in their order, and the numbers of the lines that were skipped as broken."""

    rows: tuple[Row, ...]
    skipped: tuple[int, ...] = ()


def read(task: GlueTask, path: Path) -> Table:
    """The rows of a TSV file.

    Columns are found by name, so that others may stand between them. Of QQP alone, which GLUE ships with such rows
    (line breaks and tabs within questions, empty questions), rows with another number of fields than the header and
    rows with an empty question are skipped, as fairseq's own preparation skips the former.

    Raises:
        OSError: the file cannot be read.
        ValueError: a column or field is missing, a sentence is empty, a label unknown, a score no number in range, or
            the text no UTF-8; the message names file, line, value and what is expected.
    """
    rows, skipped = [], []
    lines = _lines(path)
    header = task.header
    if not header:
        first = next(lines, None)
        if first is None:
            raise ValueError(f"{path}: an empty file, expected a header with {', '.join(_columns(task))}")
        header = tuple(first[1].removeprefix("\ufeff").split("\t"))
        for column in _columns(task):
            if column not in header:
                raise ValueError(
                    f"{path}:1: got the columns {_shown(', '.join(header))}, expected {column!r} among them"
                )
    places = [header.index(column) for column in _columns(task)]
    for number, line in lines:
        try:
            rows.append(_row(task, header, places, line.split("\t")))
        except _Broken as error:
            if not task.ships_broken_rows:
                raise ValueError(f"{path}:{number}: {error}") from None
            skipped.append(number)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no rows, expected some")
    return Table(tuple(rows), tuple(skipped))


def _columns(task: GlueTask) -> tuple[str, ...]:
    return (*task.sentences, task.label)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines. Only a line feed ends a line: sentences may hold other separators."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8").rstrip("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: got byte {raw[error.start]:#x}, expected UTF-8") from None


def _row(task: GlueTask, header: tuple[str, ...], places: list[int], fields: list[str]) -> Row:
    if len(fields) != len(header):
        raise _Broken(f"got {len(fields)} fields ({_shown(' | '.join(fields))}), expected {len(header)}")
    *sentences, label = (fields[place].strip() for place in places)
    for column, sentence in zip(task.sentences, sentences, strict=True):
        if not sentence:
            raise _Broken(f"column {column!r}: got an empty sentence, expected text")
    return Row(tuple(sentences), _score(task, label) if task.is_regression else _label(task, label))


def _label(task: GlueTask, text: str) -> str:
    if text not in task.labels:
        raise ValueError(f"column {task.label!r}: got {_shown(text)!r}, expected one of {', '.join(task.labels)}")
    return text


def _score(task: GlueTask, text: str) -> str:
    # Not what float() reads besides: 1_0, the digits of other scripts, nan.
    if (
        not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.ASCII | re.I)
        or not 0 <= float(text) <= task.max_score
    ):
        raise ValueError(f"column {task.label!r}: got {_shown(text)!r}, expected a number from 0 to {task.max_score:g}")
    return text


def _shown(text: str) -> str:
    return shortened(printable(text), _SHOWN)
