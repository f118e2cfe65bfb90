"""Read the per-epoch statistics that fairseq logs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Epoch:
    """What one epoch's last validation and its training statistics say; None where the log has no value.

    Attributes:
        number: counted from 1.
        level: index of the precision level the epoch trained at (the mean, if it rose within).
        train_loss, valid_loss: in bits, as fairseq logs them.
        arithmetic_relative, dram_relative: of training, against the same GEMMs in 32-bit fixed point.
        stash_bytes: mean bytes packed for one backward pass.
    """

    number: int
    level: float | None
    train_loss: float | None
    valid_loss: float | None
    arithmetic_relative: float | None
    dram_relative: float | None
    stash_bytes: float | None


def read_json_log(path: Path) -> list[Epoch]:
    """The epochs of a log written with ``--log-format json``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no epoch.
    """
    records: dict[int, dict[str, str]] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            start = line.find("{")
            if start < 0 or "_loss" not in line:
                continue
            try:
                record = json.loads(line[start:])
            except json.JSONDecodeError:
                continue  # a line of another kind, or cut off
            if isinstance(record, dict) and "epoch" in record and ("train_loss" in record or "valid_loss" in record):
                records.setdefault(int(record["epoch"]), {}).update(record)
    if not records:
        raise ValueError(f"{path}: holds no epoch, expected a log of fairseq-train --log-format json")

    def number(record: dict[str, str], key: str) -> float | None:
        return float(record[key]) if key in record else None

    return [
        Epoch(
            epoch,
            number(record, "train_dsq_level"),
            number(record, "train_loss"),
            number(record, "valid_loss"),
            number(record, "train_dsq_arithmetic_relative"),
            number(record, "train_dsq_dram_relative"),
            number(record, "train_dsq_stash_bytes"),
        )
        for epoch, record in sorted(records.items())
    ]


def epoch_table(epochs: list[Epoch]) -> str:
    """One row per epoch: level, losses, relative arithmetic and DRAM, stash."""
    lines = ["epoch  level  train loss  valid loss  arithmetic   DRAM  stash MB"]
    for epoch in epochs:
        cells = [
            f"{epoch.number:5d}",
            _cell(epoch.level, 5, ".2g"),
            _cell(epoch.train_loss, 10, ".3f"),
            _cell(epoch.valid_loss, 10, ".3f"),
            _cell(epoch.arithmetic_relative, 10, ".4f"),
            _cell(epoch.dram_relative, 5, ".3f"),
            _cell(None if epoch.stash_bytes is None else epoch.stash_bytes / 1e6, 8, ".2f"),
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _cell(value: float | None, width: int, style: str) -> str:
    return "-".rjust(width) if value is None else format(value, style).rjust(width)
