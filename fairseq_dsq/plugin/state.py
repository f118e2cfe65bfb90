"""The precision schedule's state in a model."""

from __future__ import annotations

import logging
import math
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.distributed.utils import get_global_rank
from torch import Tensor, nn

from fairseq_dsq.errors import flag_error
from fairseq_dsq.nn import DSQContext
from fairseq_dsq.precision import PrecisionConfig, levels_to_str
from fairseq_dsq.schedule import PrecisionSchedule, ScheduleState

logger = logging.getLogger(__name__)

_COUNTERS = ("level", "best_loss", "bad_validations", "counted_update")
_IN_FORCE = re.compile(r"in_force (\d+) of ((?:\[[^\[\]]*\] ?)+)")


def formats_of(level: PrecisionConfig) -> str:
    """A level by value, whichever flags spelled it: ``[bfp2,bfp2,bfp2,bfp16]``, the formats of q0 to q3."""
    formats = (level.output_operands, level.stash, level.grad_input_weight, level.grad_output)
    return f"[{','.join(map(str, formats))}]"


@dataclass(frozen=True)
class Record:
    """What a checkpoint's model entries say of the schedule.

    fairseq's checkpoints carry nothing of a plugin but the model's state dict, and fairseq does arithmetic with every
    *value* of that: its EMA multiplies by the decay, its averaging takes means, integers break the one and are floored
    by the other. Neither touches the *names*. So the precision that the weights were scored at stands, by value, in
    the name of an entry: an EMA takes over the training's, and an average of checkpoints of two levels has two lists
    of names, which fairseq refuses. The schedule's counters are float64 entries.

    Attributes:
        levels: the levels by value, lowest first; empty in checkpoints of before they were kept.
        in_force: index of the level that the checkpoint's parameters were validated at.
        schedule: what training goes on with.
        counted_update: the update of the last validation that counted; -1 before the first.
    """

    levels: tuple[str, ...] = ()
    in_force: int = 0
    schedule: ScheduleState = field(default_factory=ScheduleState)
    counted_update: int = -1

    def entries(self) -> dict[str, Tensor]:
        """The entries of a state dict, without a prefix."""
        schedule = self.schedule
        values = (schedule.level, schedule.best_loss, schedule.bad_validations, self.counted_update)
        entries = {
            name: torch.tensor(float(value), dtype=torch.float64) for name, value in zip(_COUNTERS, values, strict=True)
        }
        return {**entries, f"in_force {self.in_force} of {' '.join(self.levels)}": torch.zeros(1)}

    @classmethod
    def of(cls, entries: Mapping[str, Tensor]) -> Record:
        """The inverse of :meth:`entries`; what is missing is as before the first validation.

        Of an average of states, counters are rounded down, and no loss is the best.
        """
        values = {name: float(entries[name]) for name in _COUNTERS if name in entries}
        best = values.get("best_loss", math.inf)
        named = [match for name in entries if (match := _IN_FORCE.fullmatch(name))]
        levels = tuple(named[-1][2].split()) if named else ()
        level = int(values.get("level", 0))
        in_force = int(named[-1][1]) if named else level
        schedule = ScheduleState(
            level=min(max(level, in_force), len(levels) - 1) if levels else level,
            best_loss=math.inf if math.isnan(best) else best,
            bad_validations=int(values.get("bad_validations", 0)),
        )
        return cls(levels, in_force, schedule, int(values.get("counted_update", -1)))

    @staticmethod
    def is_entry(name: str) -> bool:
        """Whether a name, without its prefix, is an entry's."""
        return name in _COUNTERS or _IN_FORCE.fullmatch(name) is not None


class DSQState(nn.Module):
    """The schedule, its state, and the level in force.

    A validation may raise ``state.level``; the raised level comes into force when training goes on, that is when the
    model enters training mode. Until then all valid subsets are scored, and the checkpoint is written, at one level:
    a checkpoint loads at the precision that was scored, and training goes on from it at the raised one.

    Attributes:
        levels: the precision levels.
        schedule: decides when the level rises.
        context: where the level in force is put.
        state: where the schedule stands.
        counted_update: the update of the last validation that counted; -1 before the first.
        level_in_force: index of the level that GEMMs run at.
    """

    def __init__(self, levels: Sequence[PrecisionConfig], schedule: PrecisionSchedule, context: DSQContext) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.schedule = schedule
        self.context = context
        self.state = ScheduleState()
        self.counted_update = -1
        self._values = tuple(map(formats_of, self.levels))
        # By mode (training or evaluation): why a checkpoint's level cannot come into force.
        self._problems: dict[bool, str] = {}
        self._loaded = False
        self._trained_at: list[int] = []
        self._put_in_force(0)

    def validated(self, loss: float, update: int = -1) -> None:
        """Tell the schedule a validation loss of the first valid subset, after ``update`` updates."""
        before = self.state
        self.state = self.schedule.step(before, loss)
        self.counted_update = update
        if self.state.level != before.level:
            logger.info(
                f"precision rises from {self.levels[before.level]} to {self.levels[self.state.level]} after "
                f"{self.schedule.patience} validations without a new best (best loss {self.state.best_loss})"
            )

    def begin_training(self, restart: bool) -> None:
        """Before the first update: ``restart`` forgets what another training reached, the level and the best loss.

        Raises:
            DSQError: the checkpoint's level is not among ``levels``, and is not forgotten.
        """
        if restart:
            if self.state != ScheduleState():
                logger.info(f"the precision schedule starts anew; the checkpoint was at level {self.state.level}")
            self.state, self.counted_update, self._problems = ScheduleState(), -1, {}
        self._refuse_unknown_level(training=True)
        if get_global_rank() == 0:
            self._log_level(self.state.level)
            self._trained_at = [self.state.level]
            weakref.finalize(self, _say_where_it_ended, self._trained_at, self.levels)

    def train(self, mode: bool = True) -> DSQState:
        """As torch's; entering training mode puts a raised level in force.

        Raises:
            DSQError: the level that a checkpoint names is not among ``levels``.
        """
        super().train(mode)
        self._refuse_unknown_level(training=mode)
        if mode:
            self._problems = {}  # what the checkpoint was scored at is over
            if self.level_in_force != self.state.level:
                self._put_in_force(self.state.level)
            if self._trained_at:
                self._trained_at[0] = self.level_in_force
        elif self._loaded and get_global_rank() == 0:
            self._log_level(self.level_in_force)
        self._loaded = False
        return self

    def _refuse_unknown_level(self, training: bool) -> None:
        if problem := self._problems.get(training):
            flag_error("--dsq-levels", problem)

    def _put_in_force(self, level: int) -> None:
        self.level_in_force = level
        self.context.set_precision(self.levels[level])

    def _log_level(self, level: int) -> None:
        precision = self.levels[level]
        logger.info(
            f"precision level in force: {level}, {precision} of --dsq-levels {levels_to_str(self.levels)!r} "
            f"(--dsq-format {precision.format_name})"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        record = Record(self._values, self.level_in_force, self.state, self.counted_update)
        destination.update({prefix + name: value for name, value in record.entries().items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Nothing is missing from the float model's checkpoints: they say nothing of a schedule."""
        own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        unexpected_keys += [prefix + name for name in own if not Record.is_entry(name)]
        self._loaded = strict
        if not own:
            return
        record = Record.of(own)
        self._problems = {}
        level = self._find(record, record.schedule.level, training=True)
        in_force = self._find(record, record.in_force, training=False)
        self.counted_update = record.counted_update
        self.state = ScheduleState(level, record.schedule.best_loss, record.schedule.bad_validations)
        if not self._problems.get(False):
            self._put_in_force(in_force)

    def _find(self, record: Record, level: int, training: bool) -> int:
        """The own index of a record's level; where there is none, its index there, and a problem."""
        if not record.levels:  # of before the levels were kept: an index is all it has
            if 0 <= level < len(self.levels):
                return level
        else:
            value = record.levels[level]
            alike = [index for index, own in enumerate(self._values) if own == value]
            if alike:
                return level if level in alike else alike[0]
        if level >= len(self.levels):
            expected = f"the more than {level} levels that the checkpoint was trained with"
        else:
            expected = "the level that the checkpoint was trained with"
        if record.levels:
            expected += f", {record.levels[level]} among them"
        self._problems[training] = (
            f"got {levels_to_str(self.levels)!r}, expected {expected} (these are {' '.join(self._values)}; "
            "--finetune-from-model and --reset-meters start the schedule anew)"
        )
        return level


def _say_where_it_ended(trained_at: list[int], levels: Sequence[PrecisionConfig]) -> None:
    """At the end of training: the levels that it never reached. Called when the state is dropped, or Python ends."""
    unreached = tuple(levels[trained_at[0] + 1 :])
    if unreached:
        logger.warning(
            f"training ended at precision level {trained_at[0]}, {levels[trained_at[0]]}: it never rose to "
            f"{levels_to_str(unreached)}"
        )
