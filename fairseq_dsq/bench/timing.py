"""Variants timed in turn beside a baseline."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

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

    def clock(self) -> float:
        """Seconds of wall time, once the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


CPU = Place()


def interleave(
    variants: Runs,
    baseline: Callable[[], object],
    baseline_name: str,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Time every variant and the baseline once a round by a clock, after one round to warm up.

    Returns:
        One row per variant: the ratio of the fastest rounds, the median of the rounds' ratios, seconds.
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
    base = seconds.pop("")
    return [
        {
            "name": name,
            "ratio_min": min(times) / min(base),
            "ratio_median": statistics.median(mine / theirs for mine, theirs in zip(times, base, strict=True)),
            "over": baseline_name,
            "seconds_min": min(times),
            "over_seconds_min": min(base),
        }
        for name, times in seconds.items()
    ]
