"""Keeps a training's record while fairseq trains: what stands in it, and which it goes on with."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fairseq.distributed.utils import get_global_rank, get_global_world_size
from fairseq.logging import metrics
from fairseq.logging.meters import AverageMeter, StopwatchMeter, TimeMeter
from omegaconf import DictConfig
from torch import nn

from fairseq_dsq import artefact, record
from fairseq_dsq.cost.hardware import processor
from fairseq_dsq.gemm.native import isa
from fairseq_dsq.plugin.checkpoints import LAST, with_suffix
from fairseq_dsq.plugin.config import DSQConfig, DSQCriterionConfig, DSQOptimizerConfig, defaults
from fairseq_dsq.plugin.modes import flag_of
from fairseq_dsq.plugin.state import DSQState
from fairseq_dsq.record import Point, Start

logger = logging.getLogger(__name__)

# fairseq's flags that say what was trained, when it ends and how a validation is judged.
FAIRSEQ_FLAGS = (
    "max_epoch", "max_update", "patience", "stop_time_hours", "best_checkpoint_metric",
    "maximize_best_checkpoint_metric", "valid_subset", "seed", "fp16", "bf16", "amp",
    "checkpoint_activations", "stop_min_lr",
)  # fmt: skip
_RESETS = ("reset_optimizer", "reset_lr_scheduler", "reset_meters", "reset_dataloader")
_TIMERS = (TimeMeter, StopwatchMeter)


class Recorder:
    """Appends to the record in ``--save-dir``: only the first worker has one, and none under ``--no-save``.

    Args:
        args: a model's configuration.
        epoch: that begins, or goes on.
        updates: done by then, as fairseq counts them.

    Attributes:
        update: of the last line.
        unvalidated: where the last line begins in the file, if it has no validation.
    """

    def __init__(self, args: Any, model: nn.Module, epoch: int, updates: int) -> None:
        self.path = Path(flag_of(args, "save_dir")) / record.NAME
        self.subsets = str(flag_of(args, "valid_subset") or "valid").split(",")
        self.begun = time.monotonic()
        self.valid: list[dict[str, float]] = []
        self.update = updates
        self.unvalidated: int | None = None
        source, stopped = _source(args, updates)
        said = record.begin(self.path, _start(args, model, epoch, updates), source, stopped)
        if said:
            logger.warning(said)

    @property
    def behind(self) -> bool:
        """Whether updates were made since the last line."""
        train = metrics.get_meters("train") or {}
        return "num_updates" in train and (train["num_updates"].smoothed_value or 0) > self.update

    def validated(self, stats: Mapping[str, Any], meters: Mapping[str, Any]) -> bool:
        """Take in a validation of the next of the subsets, as fairseq logs it, but its loss, which is not rounded.

        Returns whether it was the last one.
        """
        self.valid.append({**_numbers(stats, meters), "loss": loss_of(stats, meters)})
        return len(self.valid) == len(self.subsets)

    def add(self, state: DSQState, epoch: int, ended: bool, counts: bool) -> None:
        """Write a line, with what was validated since the last one, and in its place where it is of the same update."""
        train = metrics.get_meters("train")
        numbers = _numbers(train.get_smoothed_values(), train)
        level = state.level_in_force
        point = Point(
            update=int(numbers.get("num_updates", 0)),
            epoch=epoch,
            epoch_ended=ended,
            counts=counts,
            level=level,
            precision=state.levels[level].by_value,
            train=numbers,
            valid=dict(zip(self.subsets, self.valid, strict=False)),
            wall_s=round(time.monotonic() - self.begun, 3),
        )
        begins = record.append(self.path, point, self.unvalidated if point.update == self.update else None)
        self.unvalidated = None if point.valid else begins
        self.valid, self.update = [], point.update


def loss_of(stats: Mapping[str, Any], meters: Mapping[str, Any] | None) -> float:
    """A validation's loss, before fairseq rounds it to three digits for its log.

    Workers agree on it: each has the sums of all.
    """
    meter = None if meters is None else meters.get("loss")
    return float(meter.avg if isinstance(meter, AverageMeter) else stats["loss"])


def recorder(args: Any, model: nn.Module, epoch: int, updates: int) -> Recorder | None:
    """The recorder of a training that begins, where it has a record."""
    if get_global_rank() != 0 or not flag_of(args, "save_dir") or flag_of(args, "no_save"):
        return None
    return Recorder(args, model, epoch, updates)


def goes_on(args: Any, updates: int) -> bool:
    """Whether training goes on from a checkpoint of ``updates`` updates, of which nothing was reset."""
    return bool(flag_of(args, "save_dir")) and _source(args, updates)[0] is not None


def _source(args: Any, updates: int) -> tuple[Path | None, bool]:
    """The record beside the checkpoint that training goes on from, and whether that is the last of its own folder.

    None where training begins anew: without a checkpoint, with one that was reset, or fine-tuning.
    """
    own, restored = Path(flag_of(args, "save_dir")), flag_of(args, "restore_file") or LAST
    if not updates or any(flag_of(args, name) for name in _RESETS):
        return None, False
    if restored == LAST:
        if (own / with_suffix(LAST, flag_of(args, "checkpoint_suffix") or "")).exists():
            return own / record.NAME, True
        restored = flag_of(args, "continue_once")
    return (Path(restored).parent / record.NAME if restored else None), False


def _start(args: Any, model: nn.Module, epoch: int, update: int) -> Start:
    criterion = args._get_root()["criterion"]["_name"] if isinstance(args, DictConfig) else args.criterion
    first = next(model.parameters())
    machine = {
        "processor": processor(),
        "device": torch.cuda.get_device_name(first.device) if first.is_cuda else first.device.type,
        "torch": torch.__version__,
        "cpu_kernels": isa(),
        "workers": str(get_global_world_size()),
    }
    flags = (*defaults(DSQConfig), *defaults(DSQOptimizerConfig), *FAIRSEQ_FLAGS)
    return Start(
        schema=record.SCHEMA,
        update=update,
        epoch=epoch,
        version=artefact.version(),
        arch=str(getattr(args, "arch", None) or getattr(args, "_name", "")),
        criterion=str(criterion),
        cost_profile=str(flag_of(args, "dsq_cost_profile") or DSQCriterionConfig.dsq_cost_profile),
        levels=tuple(level.by_value for level in model.dsq.levels),  # type: ignore[union-attr]
        flags={name: _flag(flag_of(args, name)) for name in flags},
        machine=machine,
    )


def _flag(value: Any) -> str | int | float | bool | None:
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _numbers(values: Mapping[str, Any], meters: Mapping[str, Any]) -> dict[str, float]:
    """What fairseq logs but for times and speeds, which no two trainings share."""
    found = {}
    for name, value in values.items():
        if isinstance(meters.get(name), _TIMERS) or value is None:
            continue
        try:
            found[name] = value if isinstance(value, (int, float)) else float(value)
        except (TypeError, ValueError, RuntimeError):
            continue  # a list or a tensor of several
    return found
