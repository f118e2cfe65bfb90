"""A training step over float32: forward with its criterion, backward, clipping, Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY
from fairseq.data import Dictionary
from torch import nn

from fairseq_dsq.bench.timing import CPU, LEVELS, Place, Row, interleave
from fairseq_dsq.plugin import probe

ARCH, TOKENS = "transformer_iwslt_de_en", 2048
ROUNDS = 5


def criterion_of(name: str, **settings: Any) -> Any:
    """fairseq's criterion of a name, or this project's."""

    class Task:
        target_dictionary = Dictionary()

    config = CRITERION_DATACLASS_REGISTRY[name](sentence_avg=False, **settings)
    return CRITERION_REGISTRY[name].build_criterion(config, Task())


def training_step(
    flags: str | None,
    tokens: int,
    make_optimizer: Callable[..., Any] = torch.optim.Adam,
    place: Place = CPU,
    arch: str | None = None,
    length: int = 32,
) -> tuple[Callable[[], object], nn.Module]:
    """A training step of the model: forward with its criterion, backward, clipping, Adam; float32 without flags.

    Under autocast where ``place`` has another dtype.
    """
    torch.manual_seed(0)
    prefix = "" if flags is None else "dsq_"
    arch = arch or ARCH
    arch = arch if flags is None else arch.replace("transformer", "transformer_dsq")
    spec = probe.ModelSpec(arch, flags or "", tokens=tokens, length=length)
    model = probe.build(spec, "cpu").to(place.device)
    sample = probe.sample(model, spec)
    criterion = criterion_of(f"{prefix}label_smoothed_cross_entropy", label_smoothing=0.1)
    optimizer = make_optimizer(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(place.device, place.dtype, enabled=place.dtype is not torch.float32):
            loss = criterion(model, sample)[0]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step, model


def run(rounds: int, place: Place = CPU) -> list[Row]:
    runs = {}
    for scope in ("gemm", "all"):
        for text in LEVELS:
            name = text if scope == "gemm" else f"{text} scope all"
            flags = f"--dsq-levels {text} --dsq-stash-scope {scope}"
            runs[name] = training_step(flags, TOKENS, place=place)[0]
    baseline = training_step(None, TOKENS, place=place)[0]
    return interleave(runs, baseline, str(place.dtype).removeprefix("torch."), rounds, place.clock)
