"""Bytes kept for backward, and peak memory, over float32; the largest batch that fits in a given memory.

Beside this project stand activation checkpointing (fairseq's ``--checkpoint-activations``) and autocast to bfloat16.
What checkpointing computes again in backward is not among its bytes kept; it is in its peak.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from fairseq_dsq.bench import train_step
from fairseq_dsq.bench.rivals import CHECKPOINTING
from fairseq_dsq.bench.timing import AUTOCAST, LEVELS, Found, Place, Row, Settings
from fairseq_dsq.bench.train_step import training_step
from fairseq_dsq.nn import STASH_SCOPES, StashScope
from fairseq_dsq.plugin import footprint, probe
from fairseq_dsq.plugin.held import saved_bytes
from fairseq_dsq.precision import PrecisionConfig, parse_q

TOKENS, LARGE_BATCH, LENGTH, LEVEL = 2048, 16384, 32, "[2,2,2,16]"
ROUNDS = 1
# The search for the largest batch: sentences of its first step, its most steps, and how near it comes.
FIRST_BATCH, MOST_STEPS, NEAR = 32, 8, 0.02


class Variant(NamedTuple):
    """A way to train.

    Attributes:
        flags: this project's; None in float.
        fairseq_flags: fairseq's own, of the model.
        autocast: to bfloat16.
        level, scope: of this project's stash.
    """

    name: str
    flags: str | None = None
    fairseq_flags: str = ""
    autocast: bool = False
    level: str = ""
    scope: StashScope = "gemm"


def _ours(level: str, scope: StashScope) -> Variant:
    flags = f"--dsq-levels {level} --dsq-stash-scope {scope}"
    return Variant(f"{scope} {level}", flags, level=level, scope=scope)


FLOAT32 = Variant("float32")
RIVALS = {
    "autocast": Variant(AUTOCAST, autocast=True),
    CHECKPOINTING: Variant("--checkpoint-activations", fairseq_flags="--checkpoint-activations"),
}
OURS = [_ours(level, scope) for level in LEVELS[:2] for scope in STASH_SCOPES]
WEIGHED_WHOLE = _ours(LEVEL, "all")


def _step(variant: Variant, arch: str, tokens: int, device: str) -> train_step.TrainingStep:
    place = Place(device, torch.bfloat16 if variant.autocast else torch.float32)
    return training_step(
        variant.flags, tokens, place=place, arch=arch, length=LENGTH, fairseq_flags=variant.fairseq_flags
    )


def _peak(variant: Variant, arch: str, tokens: int, device: str, threads: int) -> int:
    """Peak bytes of this process, which makes nothing else than a step once it has the optimizer's states.

    Resident memory on a CPU; on a GPU what torch has given out.
    """
    torch.set_num_threads(threads)
    step = _step(variant, arch, tokens, device)
    for parameter in step.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _peak_resident()


def _peak_resident() -> int:
    """Peak resident bytes of this program: a process inherits ``ru_maxrss`` of the one that started it."""
    return 1024 * _kilobytes("/proc/self/status", "VmHWM")


def _kilobytes(path: str, name: str) -> int:
    lines = Path(path).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def peak(variant: Variant, tokens: int, device: str) -> int:
    """As :func:`_peak`, of a process of its own: memory that is freed may stay with the process that used it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, variant, train_step.ARCH, tokens, device, torch.get_num_threads()).result()


def _free(device: str) -> int:
    """Bytes that a process can get."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return 1024 * _kilobytes("/proc/meminfo", "MemAvailable")


def run(settings: Settings) -> Found:
    device = settings.place.device
    if settings.fit is not None and settings.fit > _free(device):
        raise ValueError(f"--fit: got {settings.fit} bytes, expected at most {_free(device)}, which are free here: its "
                         "steps are real")  # fmt: skip

    def weigh(name: str, ours: float, float32: float) -> Row:
        return {"name": name, "ratio_min": ours / float32, "ratio_median": ours / float32, "over": "float32",
                "bytes": int(ours), "over_bytes": int(float32)}  # fmt: skip

    def saved(variant: Variant) -> int:
        step = _step(variant, train_step.ARCH, TOKENS, device)
        return saved_bytes(step.loss, step.model)

    others = [variant for name, variant in RIVALS.items() if name in settings.rivals]
    float32 = saved(FLOAT32)
    rows = [weigh(f"saved bytes {variant.name}", saved(variant), float32) for variant in (*OURS, *others)]
    whole = [WEIGHED_WHOLE, *others]
    peaks = [min(peak(variant, LARGE_BATCH, device) for _ in range(settings.rounds)) for variant in (FLOAT32, *whole)]
    what = "peak resident" if device == "cpu" else "peak allocated"
    rows += [weigh(f"{what} {variant.name}", own, peaks[0]) for variant, own in zip(whole, peaks[1:], strict=True)]
    notes = [
        f"saved bytes: of {TOKENS} tokens, without what checkpointing computes again; {what}: of a whole process that "
        f"makes a step of {LARGE_BATCH} tokens once the optimizer has its states"
    ]
    if settings.fit is not None:
        rows += [_fitting(variant, settings.fit, device) for variant in (FLOAT32, *whole)]
        notes.append(
            f"fit: the largest batch in {settings.fit:,} bytes. Measured: by real steps, each in a process of its own, "
            f"until one at most {NEAR:.0%} larger did not fit or {MOST_STEPS} were made; with its {what}. Modelled: "
            "as by fairseq-dsq cost --memory --fit, of tensors that stay, without what a process and its operators take"
        )
    return Found(rows, tuple(notes))


def _fitting(variant: Variant, limit: int, device: str) -> Row:
    batch, own, above = largest_batch(lambda batch: peak(variant, batch * LENGTH, device), limit)
    return {
        "name": f"fit {variant.name}",
        "fit_bytes": limit,
        "measured_tokens": batch * LENGTH,
        "peak_bytes": own,
        "too_many_tokens": above and above * LENGTH,
        "modelled_tokens": _modelled_tokens(variant, limit),
    }


def largest_batch(peak_of: Callable[[int], int], limit: int) -> tuple[int, int | None, int | None]:
    """The largest batch found whose peak is at most ``limit``.

    What is tried next is a little less than where a line through the two peaks that are nearest to the limit meets it.

    Returns:
        Sentences (0 where not one fits), their peak, the smallest batch tried that does not fit.
    """
    peaks: dict[int, int] = {}
    fits, above, batch = 0, None, FIRST_BATCH
    while batch and len(peaks) < MOST_STEPS:
        peaks[batch] = peak_of(batch)
        if peaks[batch] <= limit:
            fits = batch
        else:
            above = batch
        if above is not None and above - fits <= max(1, NEAR * above):
            break
        if len(peaks) == 1:
            batch = 3 * batch if fits else batch // 4
            continue
        (first, low), (second, high) = sorted(peaks.items(), key=lambda item: abs(item[1] - limit))[:2]
        per_sentence = (high - low) / (second - first)
        guess = first + (limit - low) / per_sentence if per_sentence > 0 else 2 * fits + 1
        batch = max(int((1 - NEAR / 2) * guess), fits + max(1, int(NEAR * fits)))
        batch = batch if above is None else min(batch, above - 1)
    return fits, peaks.get(fits), above


def _modelled_tokens(variant: Variant, limit: int) -> int | None:
    """None of what the model does not know: checkpointing and autocast."""
    if variant.autocast or variant.fairseq_flags:
        return None
    spec = probe.ModelSpec(train_step.ARCH, tokens=LENGTH, length=LENGTH)
    if not variant.level:
        return footprint.Step(spec).largest_batch(limit) * LENGTH
    level = PrecisionConfig(parse_q(variant.level))
    return footprint.Step(footprint.quantized(spec, variant.scope), level).largest_batch(limit) * LENGTH
