"""What flags will not do, said before training: flags without effect, and schedules that cannot rise."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from fairseq_dsq import formats
from fairseq_dsq.cost import load_profile
from fairseq_dsq.formats import FormatOptions
from fairseq_dsq.nn import GemmConfig, Rotation
from fairseq_dsq.plugin.config import DSQConfig, defaults, option
from fairseq_dsq.plugin.modes import flag_of
from fairseq_dsq.precision import GemmKind, PrecisionConfig, Rule, parse_levels, parse_rules
from fairseq_dsq.schedules import Policy, own_flags
from fairseq_dsq.schedules.cyclic import Cyclic
from fairseq_dsq.schedules.plateau import Plateau, PlateauState
from fairseq_dsq.schedules.updates import Updates

THE_LEVELS = ("dsq_format", "dsq_levels")
ROTATED: tuple[GemmKind, ...] = ("grad_input", "grad_weight")
OF_CODES = ("dsq_weight_format", "dsq_weight_scale")


@dataclass(frozen=True)
class TrainingFlags:
    """fairseq-train's flags that say when it validates and when it stops; 0 where it knows no limit."""

    train_subset: str = "train"
    validate_interval: int = 1
    validate_interval_updates: int = 0
    validate_after_updates: int = 0
    disable_validation: bool = False
    max_epoch: int = 0
    max_update: int = 0
    patience: int = -1
    update_freq: tuple[int, ...] = (1,)
    skip_remainder_batch: bool = False

    @classmethod
    def of(cls, args: Any) -> TrainingFlags | None:
        """From a model's configuration: argparse's has the flags of all of fairseq, OmegaConf's hangs in a tree.

        None where it shows no such flags: a model that was built outside of fairseq-train.
        """
        values = {field.name: flag_of(args, field.name) for field in fields(cls)}
        found = {name: value for name, value in values.items() if value is not None}
        if "validate_interval" not in found:
            return None
        if "update_freq" in found:
            found["update_freq"] = tuple(found["update_freq"])
        return cls(**found)

    def validates(self, update: int, ended_epoch: int | None) -> bool:
        """Whether training validates after ``update`` updates, at the end of ``ended_epoch`` if one ends there."""
        interval = self.validate_interval_updates
        return (ended_epoch is not None and ended_epoch % self.validate_interval == 0) or (
            interval > 0 and update % interval == 0
        )

    def updates_by(self, epoch: int, batches: int) -> int:
        """How many updates are done when ``epoch`` ends, of epochs of so many batches."""
        own = self.update_freq[:epoch]
        ended = sum(self._updates_of_epoch(batches, count) for count in own)
        return ended + (epoch - len(own)) * self._updates_of_epoch(batches, self.update_freq[-1])

    def _updates_of_epoch(self, batches: int, of_update: int) -> int:
        """fairseq's iterators: without the remainder they drop a last batch in any case, then an unfinished update."""
        return max(0, batches - 1) // of_update if self.skip_remainder_batch else math.ceil(batches / of_update)

    def validations(self, epoch: int, batches: int, done: int, enough: int) -> int:
        """How many validations will count from ``done`` of an epoch's batches on; counted up to ``enough``."""
        if self.disable_validation:
            return 0
        if not (self.max_epoch or self.max_update):
            return enough
        update = self.updates_by(epoch - 1, batches)
        update += math.ceil(done / self.update_freq[min(epoch, len(self.update_freq)) - 1])
        first = max(update + 1, self.validate_after_updates)
        last_epoch = self.max_epoch or self.max_update  # an epoch has an update at least
        last = min(self.updates_by(last_epoch, batches), self.max_update or math.inf)
        # No loop over updates or epochs, of which there may be billions: both kinds of validation lie at even steps.
        interval, every = self.validate_interval_updates, self.validate_interval
        count = max(0, int(last // interval) - (first - 1) // interval) if interval > 0 else 0
        epochs = range(epoch + -epoch % every, last_epoch + 1, every)
        ends = functools.partial(self.updates_by, batches=batches)
        found = epochs[bisect.bisect_left(epochs, first, key=ends) : bisect.bisect_right(epochs, last, key=ends)]
        # Epochs' ends that are among the counted are fewer than enough, or the counted are enough: twice that decides.
        count += sum(interval <= 0 or ends(each) % interval > 0 for each in found[: 2 * enough])
        return min(count, enough)


def levels_of(args: Any) -> tuple[PrecisionConfig, ...]:
    """The levels that the flags in ``args`` stand for.

    Raises:
        ValueError: levels that are malformed or not of the format.
    """
    flags: Any = DSQConfig.of(args)
    return parse_levels(flags.dsq_levels, flags.dsq_format, options_of(flags))


def rules_of(args: Any, levels: int) -> tuple[Rule, ...]:
    """The rules that the flags in ``args`` stand for, beside so many levels.

    Raises:
        ValueError: a rule that is malformed or not of the format.
    """
    flags: Any = DSQConfig.of(args)
    return parse_rules(flags.dsq_rules, levels, flags.dsq_format, options_of(flags))


def options_of(flags: Any) -> FormatOptions:
    """How ``--dsq-format`` reads the q that are bits."""
    box_size = int(flags.dsq_box_size) if flags.dsq_box_size.isdigit() else flags.dsq_box_size or None
    return FormatOptions(flags.dsq_sign_bit == "extra", flags.dsq_fixed_scale, flags.dsq_scale, box_size)


def schedule_warnings(
    flags: TrainingFlags,
    schedule: Policy[Any],
    state: Any,
    epoch: int,
    batches: int | None,
    done: int,
) -> Iterator[str]:
    """One line for each reason why a training with levels left will not reach them.

    Args:
        epoch, done: where training begins, and how many of that epoch's batches lie behind.
        batches: of an epoch; None if that is not known.
    """
    if isinstance(schedule, Updates):
        given = f"--dsq-raise-at {schedule.raise_at}"
        yield from _late_warnings(flags, given, schedule.at, schedule.in_epochs, batches)
    if isinstance(schedule, Cyclic):
        at = [schedule.cycle * number for number in range(1, schedule.num_levels)]
        yield from _late_warnings(flags, f"--dsq-cycle {schedule.cycle}", at, False, batches)
    if isinstance(schedule, Plateau) and state.level + 1 < schedule.num_levels:
        yield from _plateau_warnings(flags, schedule, state, epoch, batches, done)


def _late_warnings(
    flags: TrainingFlags, given: str, points: Sequence[int], in_epochs: bool, batches: int | None
) -> Iterator[str]:
    """One line for each limit that ends training before a point: so many updates are done, or such an epoch begins."""

    def updates(number: int, of_epochs: bool) -> int:
        return number if batches is None or not of_epochs else flags.updates_by(number, batches)

    for name, of_epochs in (("max_epoch", True), ("max_update", False)):
        limit = getattr(flags, name)
        if limit <= 0 or (batches is None and of_epochs != in_epochs):
            continue
        end = updates(limit, of_epochs)
        late = [str(point) for point in points if end <= updates(point - in_epochs, in_epochs)]
        if late:
            ends = f"{option(name)} {limit}" + (f" ({end} updates)" if of_epochs > in_epochs else "")
            yield f"{given}: {ends} ends training before {', '.join(late)}"


def _plateau_warnings(
    flags: TrainingFlags, schedule: Plateau, state: PlateauState, epoch: int, batches: int | None, done: int
) -> Iterator[str]:
    rises = schedule.num_levels - 1 - state.level
    needed = schedule.patience - state.bad_validations + (state.best_loss == math.inf)
    takes = f"the {needed} that --dsq-patience {schedule.patience} takes"
    if schedule.raise_on_divergence:
        needed, takes = 1, "the 1 that --dsq-raise-on-divergence takes"
    if flags.disable_validation:
        yield f"--disable-validation: no validation is scored, so the precision never rises from level {state.level}"
    elif batches is not None and (count := flags.validations(epoch, batches, done, needed)) < needed:
        limits = ("max_epoch", "max_update", "validate_interval", "validate_interval_updates", "validate_after_updates")
        given = ", ".join(f"{option(name)} {value}" for name in limits if (value := getattr(flags, name)) > 0)
        yield f"{given}: {count} validations will count, fewer than {takes}; the precision stays at level {state.level}"
    if not schedule.raise_on_divergence and 0 < flags.patience <= schedule.patience * rises - state.bad_validations:
        yield (
            f"--patience {flags.patience}: training stops after that many validations without a new best, and the "
            f"{rises} levels left take {schedule.patience * rises - state.bad_validations} of them at --dsq-patience "
            f"{schedule.patience}: expected a --patience above that, or none"
        )


def unpriced_formats(args: Any, levels: Sequence[PrecisionConfig]) -> Iterator[str]:
    """A line that names the formats that the cost profile in use does not price, if there are any.

    Args:
        args: with every flag of :class:`DSQConfig`; and with ``--dsq-cost-profile`` where the criterion charges.
        levels: what they stand for.
    """
    if profile := flag_of(args, "dsq_cost_profile"):
        ruled = [level for rule in rules_of(args, len(levels)) for level in rule.levels]
        yield from filter(None, [load_profile(profile).says_of_unpriced([*levels, *ruled])])


def idle_flags(args: Any, levels: Sequence[PrecisionConfig]) -> Iterator[str]:
    """One line for each ``--dsq-*`` flag that was given a value of its own and has no effect beside the others.

    Args:
        args: with every flag of :class:`DSQConfig`.
        levels: what they stand for.
    """
    own = defaults(DSQConfig)

    def given(why: str, *names: str) -> Iterator[str]:
        for name in names:
            value = getattr(args, name)
            if value != own[name]:
                yield f"{option(name)} {value}: has no effect{why}"

    def idle(flag: str) -> bool:
        """Whether the levels, and the rules', are the same without the flag."""
        without = replace(DSQConfig.of(args), **{flag: own[flag]})
        try:
            others = [*levels_of(without), *(each for rule in rules_of(without, len(levels)) for each in rule.levels)]
        except ValueError:
            return False
        return [level.formats for level in others] == [level.formats for level in [*levels, *ruled]]

    schedule = defaults(DSQConfig, "schedule")
    own_schedule = {f"dsq_{name}" for name in own_flags(args.dsq_schedule)} | {"dsq_schedule"}
    if len(levels) > 1:
        others = [name for name in schedule if name not in own_schedule]
        yield from given(f" with --dsq-schedule {args.dsq_schedule}", *others)
    else:
        yield from given(" with one level in --dsq-levels", *schedule)
    rising = [levels, *(rule.levels for rule in rules_of(args, len(levels)) if len(rule.levels) > 1)]
    for number in range(len(levels) - 1):
        if all(each[number].formats == each[number + 1].formats for each in rising):
            yield f"--dsq-levels {args.dsq_levels}: levels {number} and {number + 1} are the same: a rise has no effect"
    ruled = [level for rule in rules_of(args, len(levels)) for level in rule.levels]
    used = {held for level in [*levels, *ruled] for pair in level.formats for held in pair}
    if args.dsq_weights == "float":
        yield from given(" with --dsq-weights float", *OF_CODES)
    if used <= {formats.Float32()}:
        said = {*THE_LEVELS, "dsq_weights", *OF_CODES, *schedule}
        others = [name for name in own if name not in said]
        yield from given(" with --dsq-format float32, which rounds nothing", *others)
        return
    rotation = Rotation.of(args.dsq_rotate, 0)
    configs = [GemmConfig(level, rotation=rotation) for level in [*levels, *ruled]]
    if rotation and not any(config.rotates(kind) for config in configs for kind in ROTATED):
        yield from given(": the operands of these GEMMs are float32", "dsq_rotate")
    if all(held.group == "tensor" for held in used - {formats.Float32()}):
        yield from given(": no q's format has boxes", "dsq_box_dim")
    if args.dsq_attention_matmul == "off":
        yield from given(" with --dsq-attention-matmul off", "dsq_value_boxes")
    elif all(level.operands("output")[1].by_row() is None for level in [*levels, *ruled]):
        yield from given(": no format of attention's values has a scale for a row", "dsq_value_boxes")
    of_bits = [flag for flag in defaults(DSQConfig, "levels") if flag != "dsq_levels"]
    if not any(level.has_bits for level in [*levels, *ruled]):
        yield from given(": no q is bits of --dsq-format", *of_bits)
        return
    for flag in of_bits:
        if flag not in THE_LEVELS and idle(flag):
            yield from given(f" with --dsq-format {args.dsq_format}", flag)
