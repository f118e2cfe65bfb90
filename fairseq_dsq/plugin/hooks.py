"""How fairseq's training drives the precision schedule of a model: what a task calls beside its own methods."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

from fairseq import checkpoint_utils
from fairseq.distributed.utils import get_global_rank, get_global_world_size
from fairseq.logging import metrics
from torch import nn

from fairseq_dsq.cost import CostProfile
from fairseq_dsq.ledger import Update
from fairseq_dsq.plugin.effects import TrainingFlags, idle_flags, schedule_warnings, unpriced_formats
from fairseq_dsq.plugin.held import known_update, log_update
from fairseq_dsq.plugin.modes import flag_of
from fairseq_dsq.plugin.recorder import Recorder, goes_on, loss_of, recorder
from fairseq_dsq.plugin.state import DSQState, observers
from fairseq_dsq.plugin.workers import refuse_lone_workers

logger = logging.getLogger(__name__)

# A flag of fairseq's that its trainer hands on to the training's iterator alone.
_OF_TRAINING = "update_epoch_batch_itr"


class _Hooks:
    """What a task calls beside its own methods while it trains a DSQ model."""

    def __init__(self, task: Any, args: Any) -> None:
        self.task = task
        self.args = args
        self.flags = TrainingFlags.of(args)
        self.epoch_itr: Any = None
        self.epoch = 0
        self.started = self.pending = False
        self.counts = True
        self.state: DSQState | None = None
        self.recorder: Recorder | None = None
        self.own_begin_epoch, self.own_begin_valid_epoch = task.begin_epoch, task.begin_valid_epoch
        self.own_reduce_metrics = getattr(task, "reduce_metrics", None)
        self.own_post_validate = getattr(task, "post_validate", None)
        self.own_get_batch_iterator = getattr(task, "get_batch_iterator", None)
        self.own_optimizer_step = getattr(task, "optimizer_step", None)
        self.own_get_checkpoint_dict = getattr(task, "get_checkpoint_dict", None)
        self.updates: dict[Any, tuple[Update, int]] = {}
        self.made: tuple[Any, Update, int, CostProfile | None] | None = None

    def get_batch_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """The task's; the training's is remembered, since it knows where an epoch ends."""
        assert self.own_get_batch_iterator is not None
        iterator = self.own_get_batch_iterator(*args, **kwargs)
        # Not by the dataset: a validation may be of the training's.
        if _OF_TRAINING in kwargs:
            self.epoch_itr = iterator
        return iterator

    def begin_epoch(self, epoch: int, model: nn.Module) -> None:
        # fairseq takes its best loss from a checkpoint too, unless a reset or --finetune-from-model forbids it: what
        # another training, perhaps of another task, has reached says nothing of this one. Without validation, there is
        # none to take.
        if not self.started:
            refuse_lone_workers()
            state = _state(model)
            has_best = hasattr(checkpoint_utils.save_checkpoint, "best")
            state.begin_training(restart=not has_best and not goes_on(self.args, state.updates))
            if get_global_rank() == 0:
                self._warn(state, epoch)
            self.recorder = recorder(self.args, model, epoch, state.updates)
        self.started, self.epoch, self.state = True, epoch, _state(model)
        self.state.epoch = epoch
        observers[self.state] = weakref.WeakMethod(self._record_rest)
        # An iterator of fairseq's refers to itself, and holds a process that loads and its pipes until Python looks for
        # such, which it does seldom; under --update-epoch-batch-itr, which an exact resume needs, each epoch makes one.
        gc.collect()
        self.own_begin_epoch(epoch, model)

    def _warn(self, state: DSQState, epoch: int) -> None:
        for warning in idle_flags(self.args, state.levels):
            logger.warning(warning)
        for line in unpriced_formats(self.args, state.levels):
            logger.info(line)
        if self.flags is None:
            return
        if flag_of(self.args, "dsq_cost_profile") is None:
            logger.info("--criterion: logs neither the level nor costs, which the criterions dsq_<criterion> alone do")
        if get_global_world_size() > 1 and any(count > 1 for count in self.flags.update_freq):
            logger.warning(
                "--update-freq above 1 with several workers: where a worker's last batch and an empty one fall into "
                "one update, fairseq leaves that batch out of the update's size, log and costs"
            )
        subsets = str(flag_of(self.args, "valid_subset")).split(",")
        if self.flags.train_subset in subsets and not flag_of(self.args, _OF_TRAINING):
            logger.warning(
                f"--valid-subset {','.join(subsets)}: fairseq reads {self.flags.train_subset} by one iterator for "
                "training and validation, which ends the epoch; --update-epoch-batch-itr True gives each its own"
            )
        batches = None if self.epoch_itr is None else len(self.epoch_itr)
        done = 0 if self.epoch_itr is None else self.epoch_itr.iterations_in_epoch
        for warning in schedule_warnings(self.flags, state.schedule, state.state, epoch, batches, done):
            logger.warning(warning)

    def optimizer_step(self, optimizer: Any, model: nn.Module, update_num: int) -> None:
        """The task's. Where a gradient overflows it raises, or under --amp another try follows, and not its metrics."""
        assert self.own_optimizer_step is not None
        self.own_optimizer_step(optimizer, model=model, update_num=update_num)
        state = _state(model)
        if state.cost_profile is None:
            state.context.ledger.drain()  # nobody charges what ran
        self.made = optimizer, *known_update(model, optimizer, self.updates), state.cost_profile

    def reduce_metrics(self, logging_outputs: Any, criterion: Any) -> None:
        """Runs after each update that counts, too: it is logged, and an epoch's end, which a validation may replace."""
        assert self.own_reduce_metrics is not None
        self.own_reduce_metrics(logging_outputs, criterion)
        train = metrics.get_meters("train")
        if not any(meters is train for meters in metrics.get_active_aggregators()):
            return
        if self.made is not None:
            log_update(*self.made)
            self.made = None
        if self.recorder is None or self.state is None:
            return
        if self._ends():
            self.recorder.add(self.state, self.epoch, ended=True, counts=False)

    def get_checkpoint_dict(self) -> dict[str, Any]:
        """Runs before each checkpoint, and where training stops; what no validation has recorded is recorded here."""
        self._record_rest(self._ends())
        return {} if self.own_get_checkpoint_dict is None else dict(self.own_get_checkpoint_dict())

    def _record_rest(self, ended: bool = False) -> None:
        """A line of the updates since the last one, if there are any; an epoch's last one has its own."""
        if self.recorder is not None and self.state is not None and self.recorder.behind:
            self.recorder.add(self.state, self.epoch, ended, counts=False)

    def begin_valid_epoch(self, epoch: int, model: nn.Module) -> None:
        self.epoch, self.pending = epoch, True
        self.own_begin_valid_epoch(epoch, model)

    def post_validate(self, model: nn.Module, stats: dict[str, Any], agg: Any) -> None:
        """Runs after each valid subset, and before the checkpoint is written."""
        if self.own_post_validate is not None:
            self.own_post_validate(model, stats, agg)
        state = _state(model)
        if self.pending:
            self.pending, self.counts = False, self._validated(state, stats, agg)
        if self.recorder is not None and self.recorder.validated(stats, agg):
            self.recorder.add(state, self.epoch, self._ends(), self.counts)

    def _validated(self, state: DSQState, stats: dict[str, Any], agg: Any) -> bool:
        """Tell the schedule of a validation of the first subset; returns whether it counts."""
        update = int(stats.get("num_updates", -1))
        if update >= 0 and update == state.counted_update:
            return False  # fairseq validates again where a gradient overflowed and no update came between
        ended_epoch = self.epoch if self._ends() else None
        if self.flags is None or self.epoch_itr is None or self.flags.validates(update, ended_epoch):
            state.validated(loss_of(stats, agg), update)
            return True
        # fairseq also validates where it stops or saves, where an undisturbed training would not.
        logger.info("a stop or a save asked for this validation: it does not count in the precision schedule")
        return False

    def _ends(self) -> bool:
        """Whether the update before was the epoch's last one."""
        return self.epoch_itr is not None and bool(self.epoch_itr.end_of_epoch())


def _state(model: nn.Module) -> DSQState:
    state = model.dsq
    assert isinstance(state, DSQState)
    return state


def hang_on_training(task: Any, args: Any) -> None:
    """Have ``task`` tell the model's schedule where training begins, and the loss of every validation that counts.

    Of a validation the first valid subset's loss counts. The task's own hooks are kept.

    Args:
        args: the model's configuration; where it shows no flags of fairseq-train, every validation counts.
    """
    if hooks := getattr(task, "_dsq_hooks", None):
        hooks.args, hooks.flags = args, TrainingFlags.of(args)
        return
    hooks = task._dsq_hooks = _Hooks(task, args)
    names = ["begin_epoch", "begin_valid_epoch", "post_validate", "get_checkpoint_dict"]
    names += [name for name in ("get_batch_iterator", "optimizer_step", "reduce_metrics") if hasattr(task, name)]
    for name in names:
        setattr(task, name, getattr(hooks, name))
