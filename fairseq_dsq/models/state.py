"""The precision schedule's state in a model, and how fairseq's validation drives it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fairseq import checkpoint_utils
from torch import Tensor, nn

from fairseq_dsq.flags import flag_error
from fairseq_dsq.models.workers import refuse_lone_workers
from fairseq_dsq.nn import DSQContext
from fairseq_dsq.precision import PrecisionConfig, levels_to_str
from fairseq_dsq.schedule import PrecisionSchedule, ScheduleState

logger = logging.getLogger(__name__)

# With these fairseq drops the best loss of the checkpoint that it starts from, and the schedule does.
RESTARTS = ("finetune_from_model", "reset_meters", "reset_optimizer")


class DSQState(nn.Module):
    """The schedule and its state, as buffers of the model: fairseq's checkpoints carry nothing else of a plugin.

    Args:
        levels: the precision levels; ``level_in_force`` is the index of the current one.
        schedule: decides when the level rises.
        context: where the level in force is put.
        may_restart: the command may begin another training from a checkpoint; only :meth:`begin_training` then refuses
            a level that ``levels`` does not have.
    """

    level: Tensor
    best_loss: Tensor
    bad_validations: Tensor

    def __init__(
        self,
        levels: Sequence[PrecisionConfig],
        schedule: PrecisionSchedule,
        context: DSQContext,
        may_restart: bool = False,
    ) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.schedule = schedule
        self.context = context
        self.may_restart = may_restart
        for name, value in self._buffers_of(ScheduleState()).items():
            self.register_buffer(name, value)
        self._apply_level()
        self.register_load_state_dict_post_hook(DSQState._after_load)

    @staticmethod
    def _buffers_of(state: ScheduleState) -> dict[str, Tensor]:
        return {
            "level": torch.tensor(state.level),
            "best_loss": torch.tensor(state.best_loss, dtype=torch.float64),
            "bad_validations": torch.tensor(state.bad_validations),
        }

    @property
    def state(self) -> ScheduleState:
        """The schedule's state, read from the buffers."""
        return ScheduleState(int(self.level), float(self.best_loss), int(self.bad_validations))

    def validated(self, loss: float) -> None:
        """Tell the schedule a validation loss of the first valid subset."""
        before = self.state
        after = self.schedule.step(before, loss)
        for name, value in self._buffers_of(after).items():
            getattr(self, name).copy_(value)
        if after.level != before.level:
            logger.info(
                f"precision rises from {self.levels[before.level]} to {self.levels[after.level]} after "
                f"{self.schedule.patience} validations without a new best (best loss {after.best_loss})"
            )
            self._apply_level()

    def begin_training(self, restart: bool) -> None:
        """Before the first update: ``restart`` forgets what another training reached, the level and the best loss.

        Raises:
            SystemExit: the checkpoint's level is not among ``levels``, and is not forgotten.
        """
        if not restart:
            self._check_level()
        elif self.state != ScheduleState():
            logger.info(f"the precision schedule starts anew; the checkpoint was at level {int(self.level)}")
            for name, value in self._buffers_of(ScheduleState()).items():
                getattr(self, name).copy_(value)
            self._apply_level()

    def _check_level(self) -> None:
        if not 0 <= int(self.level) < len(self.levels):
            flag_error(
                "--dsq-levels",
                f"got {levels_to_str(self.levels)!r}, expected the more than {int(self.level)} levels that the "
                "checkpoint was trained with",
            )

    def _apply_level(self) -> None:
        # Kept as a number too: reading a buffer on a GPU would wait for it, every step.
        self.level_in_force = int(self.level)
        self.context.set_precision(self.levels[self.level_in_force])

    @staticmethod
    def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
        assert isinstance(module, DSQState)
        if module.may_restart and int(module.level) >= len(module.levels):
            return  # the first level stays in force
        module._check_level()
        module._apply_level()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DSQState:
        # model.half() must not round the best loss.
        best_loss = self.best_loss
        super()._apply(fn, recurse)
        self.best_loss = best_loss.to(self.level.device)
        return self

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> None:
        """Let checkpoints of the float model load strictly: they start at the first level."""
        for buffer, value in self._buffers_of(ScheduleState()).items():
            state_dict.setdefault(f"{name}.{buffer}", value)


def hang_on_training(task: Any) -> None:
    """Have ``task`` tell the model's schedule the loss of the first valid subset of every validation, and of a restart.

    ``post_validate`` runs after each subset and before the checkpoint is written; a task's own is kept.
    """
    if getattr(task, "_dsq_hooked", False):
        return
    own_begin_epoch, begin, own = task.begin_epoch, task.begin_valid_epoch, getattr(task, "post_validate", None)
    started = pending = False

    def begin_epoch(epoch: int, model: nn.Module) -> None:
        nonlocal started
        # fairseq takes its best loss from a checkpoint too, unless a reset or --finetune-from-model forbids it: what
        # another training, perhaps of another task, has reached says nothing of this one.
        if not started:
            refuse_lone_workers()
            state = model.dsq
            assert isinstance(state, DSQState)
            state.begin_training(restart=not hasattr(checkpoint_utils.save_checkpoint, "best"))
        started = True
        own_begin_epoch(epoch, model)

    def begin_valid_epoch(epoch: int, model: nn.Module) -> None:
        nonlocal pending
        pending = True
        begin(epoch, model)

    def post_validate(model: nn.Module, stats: dict[str, Any], agg: Any) -> None:
        nonlocal pending
        if own is not None:
            own(model, stats, agg)
        if pending:
            pending = False
            # As fairseq logs it, so that the log alone explains the level.
            state = model.dsq
            assert isinstance(state, DSQState)
            state.validated(float(stats["loss"]))

    task.begin_epoch = begin_epoch
    task.begin_valid_epoch = begin_valid_epoch
    task.post_validate = post_validate
    task._dsq_hooked = True
