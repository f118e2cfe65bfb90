"""What ``fairseq-dsq bench all --out DIR`` measured, as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fairseq_dsq.report.tables import MISSING, escape_markdown, fixed, markdown_table
from fairseq_dsq.text import printable


class _Column(NamedTuple):
    label: str
    unit: float = 1.0
    digits: int = 0


_COLUMNS = {
    "name": _Column("What"),
    "ratio_min": _Column("Ratio of the fastest", digits=3),
    "ratio_median": _Column("Median ratio", digits=3),
    "over": _Column("Over"),
    "over_autocast_min": _Column("Over autocast bf16, fastest", digits=3),
    "over_autocast_median": _Column("Over autocast bf16, median", digits=3),
    "seconds_min": _Column("ms", 1e-3, 3),
    "over_seconds_min": _Column("What it is over (ms)", 1e-3, 3),
    "bytes": _Column("MB", 1e6, 2),
    "over_bytes": _Column("What it is over (MB)", 1e6, 2),
    "state_bytes": _Column("States (MB)", 1e6, 2),
    "fit_bytes": _Column("In (MB)", 1e6, 2),
    "measured_tokens": _Column("Largest batch, measured (tokens)"),
    "peak_bytes": _Column("Its peak (MB)", 1e6, 2),
    "too_many_tokens": _Column("Did not fit (tokens)"),
    "modelled_tokens": _Column("Largest batch, modelled (tokens)"),
}


@dataclass(frozen=True)
class Bench:
    """One bench.

    Attributes:
        name, what: its name, and what it compares.
        version, command: of this package, and what ran.
        machine: processor, kernels, threads, torch and the like, in words.
        notes: what a reader has to know.
        rows: by column.
    """

    name: str
    what: str
    version: str
    command: str
    machine: Mapping[str, Any]
    notes: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]


def read(folder: Path) -> tuple[Bench, ...]:
    """The benches in a folder, by name.

    Raises:
        ValueError: there is none, or one is damaged; names it.
    """
    found = [_read(path) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise ValueError(f"{folder}: got no NAME.json in it, expected a folder that fairseq-dsq bench all --out wrote")
    return tuple(found)


def _read(path: Path) -> Bench:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        texts = {key: printable(str(document[name])) for key, name in
                 (("name", "bench"), ("what", "what"), ("version", "version"), ("command", "command"))}  # fmt: skip
        machine = {printable(str(key)): value for key, value in document["machine"].items()}
        rows = tuple({printable(str(key)): value for key, value in row.items()} for row in document["rows"])
        return Bench(
            **texts, machine=machine, notes=tuple(printable(str(note)) for note in document["notes"]), rows=rows
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{path}: got a file that fairseq-dsq bench did not write, expected its JSON") from None


def lines(bench: Bench) -> list[list[str]]:
    """Of the bench's table, its header first."""
    keys = list(dict.fromkeys(key for row in bench.rows for key in row))
    header = [_COLUMNS[key].label if key in _COLUMNS else key.replace("_", " ").capitalize() for key in keys]
    return [header, *([_cell(key, row.get(key)) for key in keys] for row in bench.rows)]


def _cell(key: str, value: Any) -> str:
    column = _COLUMNS.get(key, _Column(key))
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return printable(str(value))
    return fixed(value / column.unit, column.digits)


def below(bench: Bench) -> list[str]:
    """What stands below the table: its notes, what ran, and where."""
    machine = ", ".join(f"{key} {printable(str(value))}" for key, value in bench.machine.items())
    notes = [f"{note[0].upper()}{note[1:]}." for note in bench.notes if note]
    return [*notes, f"{bench.command}, version {bench.version}. {machine[:1].upper()}{machine[1:]}."]


def markdown(benches: Sequence[Bench]) -> str:
    """The tables as Markdown."""
    parts = []
    for bench in benches:
        parts += [f"**{escape_markdown(bench.name)}**: {escape_markdown(bench.what)}", markdown_table(lines(bench), 1)]
        parts += map(escape_markdown, below(bench))
    return "".join(f"\n{part}\n" for part in parts)
