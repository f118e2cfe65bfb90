"""The precision schedule's state in a model."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from fairseq.distributed.utils import get_global_rank
from torch import Tensor, nn

from fairseq_dsq.cost import CostProfile
from fairseq_dsq.errors import flag_error
from fairseq_dsq.nn import DSQContext, weight_bytes
from fairseq_dsq.plugin.config import option
from fairseq_dsq.precision import PrecisionConfig, levels_to_str
from fairseq_dsq.schedules import Policy, State

logger = logging.getLogger(__name__)

_IN_FORCE = re.compile(r"in_force (\d+) of ((?:\[[^\[\]]*\] ?)+)")


@dataclass(frozen=True)
class SavedSchedule:
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
    schedule: State = field(default_factory=State)
    counted_update: int = -1

    def entries(self) -> dict[str, Tensor]:
        """The entries of a state dict, without a prefix."""
        counters = {**dataclasses.asdict(self.schedule), "counted_update": self.counted_update}
        entries = {name: torch.tensor(float(value), dtype=torch.float64) for name, value in counters.items()}
        return {**entries, f"in_force {self.in_force} of {' '.join(self.levels)}": torch.zeros(1)}

    @classmethod
    def of(cls, entries: Mapping[str, Tensor], start: State) -> SavedSchedule:
        """The inverse of :meth:`entries`; what is missing is as in ``start``, before the first validation.

        Of an average of states, counters are rounded down, and no loss is the best.
        """
        values = {name: float(value) for name, value in entries.items() if name.isidentifier()}
        named = [match for name in entries if (match := _IN_FORCE.fullmatch(name))]
        levels = tuple(named[-1][2].split()) if named else ()
        known = {
            name: type(default)(values[name])
            for name, default in dataclasses.asdict(start).items()
            if not math.isnan(values.get(name, math.nan))
        }
        level = known.get("level", 0)
        in_force = int(named[-1][1]) if named else level
        known["level"] = min(max(level, in_force), len(levels) - 1) if levels else level
        return cls(levels, in_force, dataclasses.replace(start, **known), int(values.get("counted_update", -1)))

    @staticmethod
    def is_entry(name: str) -> bool:
        """Whether a name, without its prefix, may be an entry's; another policy's say nothing here."""
        return name.isidentifier() or _IN_FORCE.fullmatch(name) is not None


# What is called before another level comes into force in training, kept alive by others: no attribute, which copies of
# a model would have.
observers: weakref.WeakKeyDictionary[DSQState, weakref.WeakMethod[Callable[[], None]]] = weakref.WeakKeyDictionary()


class DSQState(nn.Module):
    """The schedule, its state, and the level in force.

    A validation may change ``state.level``; the new level comes into force when training goes on, that is when the
    model enters training mode. Until then all valid subsets are scored, and the checkpoint is written, at one level:
    a checkpoint loads at the precision that was scored, and training goes on from it at the new one. What an update
    changes comes into force before the next update, so that a checkpoint between them is at what was trained, too.

    Attributes:
        levels: the precision levels.
        schedule: decides when the level changes.
        context: where the level in force is put.
        state: where the schedule stands.
        counted_update: the update of the last validation that counted; -1 before the first.
        level_in_force: index of the level that GEMMs run at.
        updates: those done, as fairseq says before each one and when it loads a checkpoint.
        epoch: of the next update.
        cost_profile: what the criterion in use charges by; None without one that charges.
    """

    def __init__(self, levels: Sequence[PrecisionConfig], schedule: Policy[Any], context: DSQContext) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.schedule = schedule
        self.context = context
        self.state: State = schedule.start()
        self.counted_update = -1
        self.updates = self.epoch = 0
        self.cost_profile: CostProfile | None = None
        self._begun = False
        self._asked = (-1, -1)  # updates and epoch
        self._values = tuple(level.by_value for level in self.levels)
        # By mode (training or evaluation): why a checkpoint's level cannot come into force.
        self._problems: dict[bool, str] = {}
        self._loaded = False
        self._trained_at: list[int] = []
        self._weight_bytes: dict[torch.dtype, int] = {}
        self._put_in_force(0)

    def validated(self, loss: float, update: int = -1) -> None:
        """Tell the schedule a validation loss of the first valid subset, after ``update`` updates."""
        before = self.state
        self.state = self.schedule.on_validation(before, loss)
        self.counted_update = update
        self._say_change(before.level, self.schedule.why(before, self.state))

    def weight_bytes(self, model: nn.Module) -> int:
        """Bytes of the model's weights as they are held, added up once for each dtype that it is cast to."""
        dtype = next(model.parameters()).dtype
        if dtype not in self._weight_bytes:
            self._weight_bytes[dtype] = weight_bytes(model)
        return self._weight_bytes[dtype]

    def set_num_updates(self, num_updates: int) -> None:
        """fairseq's hook, before each batch of an update; also when it loads a checkpoint, even for fine-tuning."""
        self.updates = num_updates
        if not self._begun or self._asked == (num_updates, self.epoch):
            return
        self._asked = (num_updates, self.epoch)
        before = self.state.level
        self.state = self.schedule.on_update(self.state, num_updates, self.epoch)
        self._say_change(before, f"after {num_updates} updates")
        self._keep_up()

    def _say_change(self, before: int, why: str) -> None:
        level = self.state.level
        if level != before:
            verb = "rises" if level > before else "falls"
            logger.info(f"precision {verb} from {self.levels[before]} to {self.levels[level]} {why}")

    def begin_training(self, restart: bool) -> None:
        """Before the first update: ``restart`` forgets what another training reached, the level and the best loss.

        Raises:
            DSQError: the checkpoint's level is not among ``levels``, and is not forgotten; or the schedule's function
                cannot be imported.
        """
        try:
            self.schedule.prepare()
        except ValueError as error:
            refuse_field(error)
        self._begun = True
        if not self.updates:  # a checkpoint without an optimizer's state, of which fairseq takes no count
            self.counted_update = -1
        if restart:
            if self.state != self.schedule.start():
                logger.info(f"the precision schedule starts anew; the checkpoint was at level {self.state.level}")
            self.state, self.counted_update, self._problems = self.schedule.start(), -1, {}
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
            self._keep_up()
        elif self._loaded and get_global_rank() == 0:
            self._log_level(self.level_in_force)
        self._loaded = False
        return self

    def _refuse_unknown_level(self, training: bool) -> None:
        if problem := self._problems.get(training):
            flag_error("--dsq-levels", problem)

    def _keep_up(self) -> None:
        """Train at the schedule's level."""
        if self.level_in_force != self.state.level:
            if (held := observers.get(self)) and (observe := held()):
                observe()
            self._put_in_force(self.state.level)
        if self._trained_at:
            self._trained_at[0] = max(self._trained_at[0], self.level_in_force)

    def _put_in_force(self, level: int) -> None:
        self.level_in_force = level
        self.context.set_precision(self.levels[level], level)

    def _log_level(self, level: int) -> None:
        precision = self.levels[level]
        logger.info(
            f"precision level in force: {level}, {precision} of --dsq-levels {levels_to_str(self.levels)!r} "
            f"(--dsq-format {precision.format_name})"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        record = SavedSchedule(self._values, self.level_in_force, self.state, self.counted_update)
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
        unexpected_keys += [prefix + name for name in own if not SavedSchedule.is_entry(name)]
        self._loaded = strict
        if not own:
            return
        record = SavedSchedule.of(own, self.schedule.start())
        self._problems = {}
        level = self._find(record, record.schedule.level, training=True)
        in_force = self._find(record, record.in_force, training=False)
        self.counted_update = record.counted_update
        self.state = dataclasses.replace(record.schedule, level=level)
        if not self._problems.get(False):
            self._put_in_force(in_force)

    def _find(self, record: SavedSchedule, level: int, training: bool) -> int:
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


def refuse_field(error: ValueError) -> NoReturn:
    """Refuse a flag; the error's message begins with its name, as a policy or an optimizer has it.

    Raises:
        DSQError: always.
    """
    name, _, message = str(error).partition(": ")
    flag_error(option(f"dsq_{name}"), message)


def _say_where_it_ended(trained_at: list[int], levels: Sequence[PrecisionConfig]) -> None:
    """At the end of training: the levels that it never reached. Called when the state is dropped, or Python ends."""
    unreached = tuple(levels[trained_at[0] + 1 :])
    if unreached:
        logger.warning(
            f"training ended at precision level {trained_at[0]}, {levels[trained_at[0]]}: it never rose to "
            f"{levels_to_str(unreached)}"
        )
