"""Bytes kept for backward, and peak resident memory, over float32."""

from __future__ import annotations

import multiprocessing
import resource

import torch

from fairseq_dsq.bench.timing import LEVELS, Row
from fairseq_dsq.bench.train_step import TOKENS, training_step
from fairseq_dsq.plugin.held import saved_bytes

LARGE_BATCH, LEVEL = 16384, "[2,2,2,16]"
ROUNDS = 1


def _peak_resident(flags: str | None, threads: int) -> int:
    """Peak resident bytes of a process that makes two steps on a large batch."""
    torch.set_num_threads(threads)
    step, _ = training_step(flags, LARGE_BATCH)
    for _ in range(2):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(rounds: int) -> list[Row]:
    def weigh(name: str, ours: float, float32: float) -> Row:
        return {"name": name, "ratio_min": ours / float32, "ratio_median": ours / float32, "over": "float32",
                "bytes": int(ours), "over_bytes": int(float32)}  # fmt: skip

    def flags(scope: str, level: str = LEVEL) -> str:
        return f"--dsq-levels {level} --dsq-stash-scope {scope}"

    float32 = saved_bytes(*training_step(None, TOKENS))
    rows = [
        weigh(f"saved bytes {scope} {level}", saved_bytes(*training_step(flags(scope, level), TOKENS)), float32)
        for level in LEVELS[:2]
        for scope in ("all", "gemm")
    ]
    # A process of its own for each: memory that is freed may stay with the process that used it.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = [
            min(pool.apply(_peak_resident, (choice, torch.get_num_threads())) for _ in range(rounds))
            for choice in (None, flags("all"))
        ]
    return [*rows, weigh(f"peak resident all {LEVEL}", peaks[1], peaks[0])]
