"""A training step over float32, beside what its user may pick instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY
from fairseq.data import Dictionary
from torch import Tensor, nn

from fairseq_dsq.bench.rivals import Rival, rivals
from fairseq_dsq.bench.timing import CPU, LEVELS, Found, Place, Settings, interleave
from fairseq_dsq.plugin import probe

ARCH, TOKENS = "transformer_iwslt_de_en", 2048
ROUNDS = 5


def criterion_of(name: str, **settings: Any) -> Any:
    """fairseq's criterion of a name, or this project's."""

    class Task:
        target_dictionary = Dictionary()

    config = CRITERION_DATACLASS_REGISTRY[name](sentence_avg=False, **settings)
    return CRITERION_REGISTRY[name].build_criterion(config, Task())


@dataclass(frozen=True)
class TrainingStep:
    """Forward with its criterion, backward, clipping, Adam.

    Attributes:
        sample: the batch.
        place: where it runs; under autocast where its dtype is not float32.
    """

    model: nn.Module
    sample: dict[str, Any]
    criterion: Any
    optimizer: torch.optim.Optimizer
    place: Place

    def loss(self, model: nn.Module | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Of the forward pass, through ``model`` (the same, compiled) and under autocast to ``dtype`` where given."""
        dtype = dtype or self.place.dtype
        with torch.autocast(self.place.device, dtype, enabled=dtype is not torch.float32):
            loss: Tensor = self.criterion(self.model if model is None else model, self.sample)[0]
        return loss

    def __call__(self, model: nn.Module | None = None, dtype: torch.dtype | None = None) -> None:
        self.optimizer.zero_grad()
        self.loss(model, dtype).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def training_step(
    flags: str | None,
    tokens: int,
    make_optimizer: Callable[..., Any] = torch.optim.Adam,
    place: Place = CPU,
    arch: str | None = None,
    length: int = 32,
    fairseq_flags: str = "",
) -> TrainingStep:
    """A training step of the model; float32 without flags.

    Args:
        fairseq_flags: of the model, float or not.
    """
    torch.manual_seed(0)
    prefix = "" if flags is None else "dsq_"
    arch = arch or ARCH
    arch = arch if flags is None else arch.replace("transformer", "transformer_dsq")
    spec = probe.ModelSpec(arch, f"{fairseq_flags} {flags or ''}".strip(), tokens=tokens, length=length)
    model = probe.build(spec, "cpu").to(place.device)
    sample = probe.sample(model, spec)
    criterion = criterion_of(f"{prefix}label_smoothed_cross_entropy", label_smoothing=0.1)
    return TrainingStep(model, sample, criterion, make_optimizer(model.parameters(), lr=1e-6), place)


def _by_rival(step: TrainingStep, rival: Rival) -> Callable[[], object]:
    model = cast(nn.Module, torch.compile(step.model)) if rival.compiled else None

    def run() -> None:
        with rival.around():
            step(model, rival.dtype)

    return run


def run(settings: Settings) -> Found:
    place = settings.place
    runs: dict[str, Callable[[], object]] = {}
    for scope in ("gemm", "all"):
        for text in LEVELS:
            name = text if scope == "gemm" else f"{text} scope all"
            flags = f"--dsq-levels {text} --dsq-stash-scope {scope}"
            runs[name] = training_step(flags, TOKENS, place=place)
    baseline = training_step(None, TOKENS, place=place)
    at_hand, notes = rivals(settings)
    runs |= {rival.name: _by_rival(baseline, rival) for rival in at_hand}  # on the baseline's own model
    rows = interleave(runs, baseline, str(place.dtype).removeprefix("torch."), settings.rounds, place.clock)
    return Found(rows, notes)
