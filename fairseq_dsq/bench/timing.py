"""Variants timed in turn beside a baseline."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

AUTOCAST = "autocast bf16"
LEVELS = ("[2,2,2,16]", "[16,4,4,16]", "[8,8,8,8]")
Row = dict[str, Any]
Runs = Mapping[str, Callable[[], object]]


class Place(NamedTuple):
    """Where a bench runs.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: of what is quantized and multiplied.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def clock_name(self) -> str:
        """What :meth:`clock` reads."""
        return "processor time" if self.device == "cpu" and torch.get_num_threads() == 1 else "wall time"

    def clock(self) -> float:
        """Seconds: of one thread the processor's, which other processes do not add to; else those that passed."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.clock_name == "processor time" else time.perf_counter()


CPU = Place()


class Settings(NamedTuple):
    """How a bench runs.

    Attributes:
        rounds: how often each variant is timed.
        rivals: names in :data:`fairseq_dsq.bench.RIVALS`, of what is put beside this project's variants.
        fit: bytes of memory that a batch has to fit in, of which the largest is looked for.
    """

    rounds: int
    place: Place = CPU
    rivals: tuple[str, ...] = ()
    fit: int | None = None


class Found(NamedTuple):
    """What a bench found: rows, and what their reader has to know."""

    rows: list[Row]
    notes: tuple[str, ...] = ()


def interleave(
    variants: Runs,
    baseline: Callable[[], object],
    baseline_name: str,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Time every variant and the baseline once a round by a clock, after one round to warm up.

    Returns:
        One row per variant: the ratio of the fastest rounds, the median of the rounds' ratios, seconds; the same
        ratios to the variant :data:`AUTOCAST` where there is one.
    """
    runs = {"": baseline, **variants}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names, order = list(runs), random.Random(0)
    for number in range(rounds + 1):
        order.shuffle(names)  # what runs after what matters to caches and to fresh memory
        for name in names:
            start = clock()
            runs[name]()
            passed = clock() - start
            if number:
                seconds[name].append(passed)
    base, rival = seconds.pop(""), seconds.get(AUTOCAST)
    rows = []
    for name, times in seconds.items():
        least, median = _ratios(times, base)
        row = {"name": name, "ratio_min": least, "ratio_median": median, "over": baseline_name}
        if rival:
            row["over_autocast_min"], row["over_autocast_median"] = _ratios(times, rival)
        rows.append({**row, "seconds_min": min(times), "over_seconds_min": min(base)})
    return rows


def _ratios(times: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Of the fastest rounds, and the median of the rounds' own."""
    return min(times) / min(base), statistics.median(mine / its for mine, its in zip(times, base, strict=True))
