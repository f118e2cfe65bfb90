"""Python time of a training step whose dimensions are all small, over fairseq's float step.

A GPU has done with so little before the next launch comes: what is left is what the host takes. Beside this machine's
kernels stands a GPU that is not there, where Triton is installed: its launches, and how often the host would wait for
it more often than for fairseq's float step. It multiplies nothing, and the float step of as many tokens that its time
is divided by does: the ratio is the smaller for it.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

import torch

from fairseq_dsq.bench.mocked_gpu import Waits, mocked_gpu
from fairseq_dsq.bench.timing import LEVELS, Found, Settings, interleave
from fairseq_dsq.bench.train_step import criterion_of
from fairseq_dsq.plugin import probe

DIMENSIONS = " ".join(
    f"--{side}-embed-dim 32 --{side}-ffn-embed-dim 64 --{side}-attention-heads 2" for side in ("encoder", "decoder")
)
# Tokens of a sentence: boxes of 16 divide the one, and not the other.
ALIGNED, RAGGED = 32, 37
ROUNDS = 5


def shrunken_step(flags: str | None, length: int = ALIGNED, device: str = "cpu") -> Callable[[], object]:
    """Forward with its criterion and backward of transformer_iwslt_de_en with small dimensions; float without flags."""
    torch.manual_seed(0)
    arch, prefix = ("transformer_iwslt_de_en", "") if flags is None else ("transformer_dsq_iwslt_de_en", "dsq_")
    spec = probe.ModelSpec(arch, f"{DIMENSIONS} {flags or ''}", vocabulary=96, length=length, tokens=8 * length)
    model = probe.build(spec, device)
    sample = probe.sample(model, spec)
    criterion = criterion_of(f"{prefix}label_smoothed_cross_entropy", label_smoothing=0.1)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        criterion(model, sample)[0].backward()

    return step


def launches(flags: str, length: int = ALIGNED) -> dict[str, int]:
    """A step's launches of Triton kernels by name, once it is warm and has learned which weights go together."""
    with mocked_gpu() as counted:
        step = shrunken_step(flags, length)
        step()
        counted.clear()
        step()
        return dict(counted)


def waits(flags: str | None) -> int:
    """How often the host waits for the GPU in a step's forward and backward, once it is warm."""

    def count() -> int:
        step = shrunken_step(flags, device="meta")
        counts = []
        for _ in range(3):  # it learns which weights go together, then notes once where they lie
            mode = Waits()
            with mode:
                step()
            counts.append(mode.count)
        return counts[-1]

    if flags is None:
        return count()
    with mocked_gpu(meta=True):
        return count()


def run(settings: Settings) -> Found:
    baseline = shrunken_step(None)
    flags = {text: f"--dsq-levels {text}" for text in LEVELS}
    flags |= {"[2,2,2,16] scope all": "--dsq-levels [2,2,2,16] --dsq-stash-scope all"}
    flags |= {"fixed [16,4,4,16]": "--dsq-format fixed --dsq-levels [16,4,4,16]"}
    here = {"--dsq-format float32": shrunken_step("--dsq-format float32")}
    here |= {name: shrunken_step(given) for name, given in flags.items()}
    rows = interleave(here, baseline, "fairseq's float step", settings.rounds, time.process_time)
    if importlib.util.find_spec("triton") is None:
        return Found(rows, ("a mocked GPU's launches: left out, as Triton is not installed",))
    least = waits(None)
    for length in (ALIGNED, RAGGED):
        float_step = shrunken_step(None, length)
        with mocked_gpu():
            there = {name: shrunken_step(given, length) for name, given in flags.items()}
            named = {f"mocked GPU {name}, {length} tokens": step for name, step in there.items()}
            mocked = interleave(named, float_step, "fairseq's float step", settings.rounds, time.process_time)
        for row, name in zip(mocked, there, strict=True):
            row["launches"] = sum(launches(flags[name], length).values())
            row["waits"] = waits(flags[name]) - least
        rows += mocked
    return Found(rows)
