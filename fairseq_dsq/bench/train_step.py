"""A training step over float32: forward with its criterion, backward, clipping, Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY
from fairseq.data import Dictionary
from torch import nn

from fairseq_dsq.bench.timing import LEVELS, Row, interleave
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
    flags: str | None, tokens: int, make_optimizer: Callable[..., Any] = torch.optim.Adam
) -> tuple[Callable[[], object], nn.Module]:
    """A training step of the model: forward with its criterion, backward, clipping, Adam; float32 without flags."""
    torch.manual_seed(0)
    prefix = "" if flags is None else "dsq_"
    arch = ARCH if flags is None else ARCH.replace("transformer", "transformer_dsq")
    spec = probe.ModelSpec(arch, flags or "", tokens=tokens)
    model = probe.build(spec, "cpu")
    sample = probe.sample(model, spec)
    criterion = criterion_of(f"{prefix}label_smoothed_cross_entropy", label_smoothing=0.1)
    optimizer = make_optimizer(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        criterion(model, sample)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step, model


def run(rounds: int) -> list[Row]:
    runs = {}
    for scope in ("gemm", "all"):
        for text in LEVELS:
            name = text if scope == "gemm" else f"{text} scope all"
            runs[name] = training_step(f"--dsq-levels {text} --dsq-stash-scope {scope}", TOKENS)[0]
    return interleave(runs, training_step(None, TOKENS)[0], "float32", rounds)
