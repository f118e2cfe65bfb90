"""What a run's updates cost by another profile: its checkpoint's model runs on shapes alone, at each of its levels."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, optim
from fairseq.data import Dictionary
from fairseq.tasks import TASK_REGISTRY
from torch import nn

from fairseq_dsq import artefact, record
from fairseq_dsq.cost import CostProfile, pricing
from fairseq_dsq.ledger import Work
from fairseq_dsq.plugin import probe
from fairseq_dsq.plugin.held import update_of
from fairseq_dsq.plugin.probe import ModelSpec
from fairseq_dsq.plugin.state import DSQState
from fairseq_dsq.precision import PrecisionConfig
from fairseq_dsq.report.runs import Run
from fairseq_dsq.text import printable


def reprice(run: Run, profiles: list[CostProfile]) -> list[tuple[float, float]]:
    """Relative arithmetic and DRAM traffic of all updates of a run by each profile.

    Every batch has the record's mean number of sentences and of tokens in one, none of them padding; a source is as
    long as its target. Of those that share an update, on one worker or several, each has a part of it.

    Raises:
        ValueError: the run has no record or checkpoint, or one that cannot be run; names it.
    """
    best = run.path / artefact.BEST
    if run.trained and not run.levels:
        raise ValueError(f"{run.path}: got levels that it was resumed without, expected one list, to price it anew")
    if not run.levels or not best.is_file():
        raise ValueError(f"{run.path}: got no {record.NAME} or no {artefact.BEST}, expected both, to price it anew")
    logging.disable(logging.WARNING)  # what is said of the flags of a training that is over
    try:
        return _reprice(run, best, profiles)
    except (RuntimeError, NotImplementedError, AssertionError, KeyError, TypeError, AttributeError) as error:
        line = printable(str(error).partition("\n")[0])
        raise ValueError(f"{best}: cannot be run on shapes alone: {type(error).__name__}: {line}") from None
    finally:
        logging.disable(logging.NOTSET)


def _reprice(run: Run, best: Path, profiles: list[CostProfile]) -> list[tuple[float, float]]:
    state = checkpoint_utils.load_checkpoint_to_cpu(str(best))
    config = state["cfg"]
    model = _model(config, state["model"])
    dsq = model.dsq
    assert isinstance(dsq, DSQState)
    batches = config.optimization.update_freq[0] * config.distributed_training.distributed_world_size
    spec = _batch(run, config.model, batches)
    steps: dict[int, tuple[Work, PrecisionConfig, int]] = {}
    for level, updates in run.levels:
        if level not in steps:
            dsq.context.set_precision(dsq.levels[level], level)
            probe.step(model, spec)
            steps[level] = dsq.context.ledger.drain(), dsq.levels[level], 0
        work, precision, before = steps[level]
        steps[level] = work, precision, before + updates
    update = _update(config, model)
    for work, _, _ in steps.values():
        work.updates = {update: 1 / batches}
    found = []
    for profile in profiles:
        result = pricing.price_trajectory(profile, list(steps.values()))
        found.append((float(result["arithmetic_relative"]), float(result["dram_relative"])))
    return found


def _model(config: Any, weights: Any) -> nn.Module:
    """The model on the meta device, its dictionaries of the size that the weights tell."""
    sizes = [weights[name].shape[0] for name in weights if name.endswith("coder.embed_tokens.weight")]
    dictionaries = [_dictionary(size) for size in sizes]
    task: Any = TASK_REGISTRY[config.task._name](config.task, *dictionaries)
    with torch.device("meta"), probe.NoData():
        model: nn.Module = task.build_model(config.model)
    return model.train()


def _dictionary(size: int) -> Dictionary:
    dictionary = Dictionary()
    for index in range(size - len(dictionary)):
        dictionary.add_symbol(f"token{index}")
    return dictionary


def _batch(run: Run, model: Any, batches: int) -> ModelSpec:
    """A batch of the mean size that the run's record has, of so many in an update: each epoch counts by its updates."""
    lines = record.read(run.path / record.NAME)
    ends = {line.epoch: line for line in lines if isinstance(line, record.Point)}
    first = before = lines[0].update
    sentences = tokens = 0.0
    for end in ends.values():
        if updates := end.update - before:
            sentences += updates * end.train["bsz"]
            tokens += updates * end.train["wpb"]
        before = end.update
    length = max(1, round(tokens / sentences))
    count = max(1, round(sentences / (before - first) / batches))
    return ModelSpec(model.arch, length=length, tokens=length * count)


def _update(config: Any, model: nn.Module) -> Any:
    optimizer = optim.build_optimizer(config.optimizer, [p for p in model.parameters() if p.requires_grad])
    with torch.device("meta"), probe.NoData():
        optimizer.step()
    return update_of(model, optimizer)
