"""Read what a training left behind: its record, or the lines of fairseq's ``--log-format json``.

A plain fairseq run has no record: its log tells losses and scores, but not which flags it was given.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from fairseq_dsq import formats, record
from fairseq_dsq.cost.metrics import GRADIENT_BYTES, LEVEL, RELATIVE, STASH_BYTES, STATE_BYTES, WEIGHT_BYTES
from fairseq_dsq.plugin.config import DSQConfig, DSQCriterionConfig, defaults, option
from fairseq_dsq.plugin.effects import levels_of, rules_of
from fairseq_dsq.precision import PrecisionConfig, parse_levels
from fairseq_dsq.record import Line, Point, Start
from fairseq_dsq.schedules import own_flags
from fairseq_dsq.text import printable, quoted

# Validation metrics that say how good a model is: fairseq's tasks and criteria log them beside the loss.
QUALITY_METRICS = (
    "bleu", "accuracy", "f1", "acc_and_f1", "mcc", "pearson", "pearson_and_spearman", "spearman", "loss",
)  # fmt: skip
LOWER_IS_BETTER = frozenset({"loss"})
# What the flags that make a precision setup are where a record does not say: all but those of the usual schedule.
DSQ_DEFAULTS = {
    flag: str(value)
    for flag, value in {**defaults(DSQConfig), **defaults(DSQCriterionConfig)}.items()
    if flag.removeprefix("dsq_") not in own_flags("plateau")
}
EXPECTED = f"expected the folder of a run with {record.NAME}, such a file, or a log of fairseq-train --log-format json"
# Of a loss in fairseq's log; its --patience judges that.
LOGGED_DIGITS = 3
# What stands for training's statistics among splits: no --valid-subset can be called so, as one can "train".
_TRAINING = ""
_TRAIN = "train"
# Where a run begins: at the updates of the checkpoint that it goes on from, or with none.
_FROM = re.compile(r"No existing checkpoint found|Loaded checkpoint .* \(epoch \d+ @ (\d{1,12}) updates\)")
_DONE = "done training in"
_MOST_EPOCHS = 10**8
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
_LONGEST_LINE = 1 << 20
_LOG_SUFFIXES = {".log", ".out", ".err", ".txt"}
_LOG_NAMES = {"log", "stdout", "stderr"}
_PLAIN_STEMS = {"train", "training", "hydra_train", "dsq", *_LOG_NAMES}

# (epoch, updates, split, or _TRAINING): metrics
History = dict[tuple[int, float, str], dict[str, float]]


@dataclass(frozen=True)
class Epoch:
    """What one epoch's training statistics and its last validation say; None where nothing says it.

    Attributes:
        number: counted from 1.
        updates: optimizer steps by then.
        ended: whether it is known to the end.
        level: index of the precision level the epoch trained at (the mean, if it rose within); None where that was one
            of other levels than the run's last.
        train_loss, valid_loss: in bits, as fairseq logs them; validation of the first valid subset.
        arithmetic, arithmetic_baseline: of training, in MACs of 32-bit fixed point; the same GEMMs' MACs.
        dram_bytes, dram_baseline_bytes: modelled traffic of training; of the same GEMMs in 32-bit fixed point.
        arithmetic_relative, dram_relative: each over its baseline, as logged.
        stash_bytes: mean bytes packed for one backward pass.
        weight_bytes, gradient_bytes, state_bytes: of all weights as they are held, of their gradients, of the
            optimizer's states.
    """

    number: int
    updates: int
    ended: bool
    level: float | None
    train_loss: float | None
    valid_loss: float | None
    arithmetic: float | None
    arithmetic_baseline: float | None
    dram_bytes: float | None
    dram_baseline_bytes: float | None
    arithmetic_relative: float | None
    dram_relative: float | None
    stash_bytes: float | None
    weight_bytes: float | None = None
    gradient_bytes: float | None = None
    state_bytes: float | None = None


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: of the file or folder, without unprintable characters.
        path: as given.
        flags: the flags that its record holds, as text; empty without a record.
        epochs: in order of their numbers.
        best: the best value of each quality metric over all validations of the first valid subset.
        incomplete: why the run counts as unfinished; empty if it does not.
        trained: (precision, updates at it) one after the other, as known from validation to validation; empty without
            a record.
        levels: the same by the level's index; empty where the run was resumed with other levels.
        notes: what a reader has to know of how it was resumed.
    """

    name: str
    path: Path
    flags: Mapping[str, str]
    epochs: tuple[Epoch, ...]
    best: Mapping[str, float]
    incomplete: str
    trained: tuple[tuple[str, int], ...] = ()
    levels: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()


def read_run(path: Path) -> Run:
    """The run of a folder, of a record or of a log.

    A folder's record stands for it. Without one, its logs are read as one, in the order in which they were begun.

    Raises:
        OSError: something cannot be read.
        ValueError: no epoch in it; the message names the path, what was found and what is expected.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder, {EXPECTED}")
    if path.is_dir():
        own = path / record.NAME
        if own.exists():
            return _recorded(path, own)
        run = _logged(path, sorted(log_files(path), key=_begun))
        if run is None:
            names = sorted(child.name for child in path.iterdir())
            listing = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"{path}: a folder without an epoch in it ({listing or 'empty'}), {EXPECTED}")
        return run
    if path.suffix == Path(record.NAME).suffix:
        return _recorded(path, path)
    run = _logged(path, [path])
    if run is None:
        raise ValueError(f"{path}: {_what_is(path)}, {EXPECTED}")
    return run


def log_files(folder: Path) -> list[Path]:
    """The files of a folder that may be text logs, by their names."""
    return [
        child
        for child in sorted(folder.iterdir())
        if child.is_file() and (child.suffix in _LOG_SUFFIXES or child.name in _LOG_NAMES)
    ]


def levels_of_flags(flags: Mapping[str, str]) -> tuple[PrecisionConfig, ...]:
    """The levels that a record's flags stand for, as those of bfp where their format is no longer known.

    None where they cannot be read.
    """
    flags = {**DSQ_DEFAULTS, **flags}
    try:
        if flags["dsq_format"] in formats.names():
            return levels_of(argparse.Namespace(**flags))
        return parse_levels(flags["dsq_levels"])
    except ValueError:
        return ()


def rules_of_flags(flags: Mapping[str, str], levels: int) -> tuple[PrecisionConfig, ...]:
    """The levels that their rules give to modules, beside so many of all others; none where they cannot be read."""
    try:
        rules = rules_of(argparse.Namespace(**{**DSQ_DEFAULTS, **flags}), levels)
    except ValueError:
        return ()
    return tuple(level for rule in rules for level in rule.levels)


def missing_extra(error: ImportError) -> ValueError:
    """The one line for a package of the extra ``report`` that is not installed."""
    return ValueError(f"{error.name} is not installed: pip install '.[report]' in the clone")


def epoch_table(epochs: Iterable[Epoch]) -> str:
    """One row per epoch: level, losses, relative arithmetic and DRAM, stash."""
    lines = ["epoch  level  train loss  valid loss  arithmetic   DRAM  stash MB"]
    for epoch in epochs:
        cells = [
            f"{epoch.number:5d}",
            _cell(epoch.level, 5, ".2g"),
            _cell(epoch.train_loss, 10, ".3f"),
            _cell(epoch.valid_loss, 10, ".3f"),
            _cell(epoch.arithmetic_relative, 10, ".4f"),
            _cell(epoch.dram_relative, 5, ".3f"),
            _cell(None if epoch.stash_bytes is None else epoch.stash_bytes / 1e6, 8, ".2f"),
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _cell(value: float | None, width: int, style: str) -> str:
    return "-".rjust(width) if value is None else format(value, style).rjust(width)


def _recorded(path: Path, file: Path) -> Run:
    """The run of a record."""
    lines = record.read(file)
    points = [line for line in lines if isinstance(line, Point)]
    if not points:
        raise ValueError(f"{file}: a record that ends before the first validation, {EXPECTED}")
    at = max(index for index, line in enumerate(lines) if isinstance(line, Start))
    start = lines[at]
    assert isinstance(start, Start)
    others, profiles = _of_another_start(lines, start)
    left_out = {LEVEL: {point.epoch for point in others}}
    if len(profiles) > 1:
        left_out |= {
            name: {point.epoch for point in points} for name in (*RELATIVE, *itertools.chain(*RELATIVE.values()))
        }
    history: History = {}
    for point in points:
        train = {name: value for name, value in point.train.items() if point.epoch not in left_out.get(name, ())}
        history[point.epoch, point.update, _TRAINING] = train
        history.update({(point.epoch, point.update, split): dict(values) for split, values in point.valid.items()})
    flags = {name: str(value) for name, value in start.flags.items()}
    flags |= {"arch": start.arch, "criterion": start.criterion, "dsq_cost_profile": start.cost_profile}
    since = [line for line in lines[at:] if isinstance(line, Point)]
    ended = {(point.epoch, float(point.update)) for point in points if point.epoch_ended}
    run = _run(path, flags, history, ended, _unfinished(flags, points[-1], since))
    trained = list(_trained(lines, start.levels))
    known = not others and all(start.levels[number : number + 1] == (precision,) for number, precision, _ in trained)
    # As --dsq-levels has them; of another start's levels, which are none of these, by value.
    shown = {value: str(level) for value, level in zip(start.levels, levels_of_flags(flags), strict=False)}
    notes = []
    if isinstance(lines[0], Start) and lines[0].update:
        notes.append(f"begins at update {lines[0].update}; what earlier updates cost is not in it")
    if others:
        notes.append(f"trained at other levels up to update {others[-1].update}")
    if len(profiles) > 1:
        notes.append(f"charged by several profiles in turn ({', '.join(profiles)}), whose costs do not add up")
    if changed := _changed_flags([line for line in lines if isinstance(line, Start)]):
        notes.append(f"trained with other flags in turn: {', '.join(changed)}")
    return dataclasses.replace(
        run,
        trained=tuple((shown.get(precision, precision), updates) for _, precision, updates in trained),
        levels=tuple((number, updates) for number, _, updates in trained) if known else (),
        notes=tuple(notes),
    )


def _of_another_start(lines: Iterable[Line], last: Start) -> tuple[list[Point], list[str]]:
    """The lines that were written under other levels than the last, and all cost profiles that charged anything."""
    others, profiles, start = list[Point](), dict[str, None](), last
    for line in lines:
        if isinstance(line, Start):
            start = line
            continue
        if start.levels != last.levels:
            others.append(line)
        if any(name in line.train for name in RELATIVE):
            profiles[start.cost_profile] = None
    return others, list(profiles)


def _changed_flags(starts: Iterable[Start]) -> list[str]:
    """Each flag of this package that a resume changed, with its values in turn; levels have a note of their own."""
    values: dict[str, list[str]] = {}
    for start in starts:
        for name, value in start.flags.items():
            turns = values.setdefault(name, [])
            if turns[-1:] != [quoted(value)]:
                turns.append(quoted(value))
    return [
        f"{option(name)} {' then '.join(turns)}"
        for name, turns in values.items()
        if name.startswith("dsq_") and name != "dsq_levels" and len(turns) > 1
    ]


def _trained(lines: Iterable[Line], levels: tuple[str, ...]) -> Iterator[tuple[int, str, int]]:
    """Each level's number and precision in turn, with its updates: a line's was in force since the line before.

    Levels may be equal by value, where rules tell them apart. Of other levels than the last start's a number is that
    of the equal one among these, or -1.
    """
    level, updates, before, own = (0, ""), 0, 0, True
    for line in lines:
        if isinstance(line, Start):
            own = line.levels == levels
        elif line.update > before:
            equal = levels.index(line.precision) if line.precision in levels else -1
            current = line.level if own else equal, line.precision
            if current != level and updates:
                yield *level, updates
                updates = 0
            level, updates = current, updates + line.update - before
        before = line.update
    if updates:
        yield *level, updates


def _unfinished(flags: Mapping[str, str], last: Point, since: Iterable[Point]) -> str:
    """Why a training with these flags and this last line goes on, or was killed; ``since`` it last began or went on."""

    def limit(name: str) -> float:
        return max(0.0, _number(flags.get(name)) or 0.0)

    max_update, max_epoch = limit("max_update"), limit("max_epoch")
    if last.update >= (max_update or math.inf) or limit("stop_time_hours") or _stopped_early(flags, since):
        return ""
    of = f" of {max_epoch:.0f}" if max_epoch else ""
    if not last.epoch_ended:
        return f"epoch {last.epoch}{of} begun and not ended"
    least_lr = _number(flags.get("stop_min_lr"))
    out_of_lr = least_lr is not None and last.train.get("lr", math.inf) <= least_lr
    if (max_epoch and last.epoch >= max_epoch) or out_of_lr:
        return ""
    if max_update:
        return f"ended after {last.update} of {max_update:.0f} updates"
    return f"ended after epoch {last.epoch}{of}" if max_epoch else ""


def _stopped_early(flags: Mapping[str, str], points: Iterable[Point]) -> bool:
    """Whether fairseq's --patience has ended a training: it counts from where the training last went on."""
    patience = _number(flags.get("patience")) or 0
    sign = -1 if flags.get("maximize_best_checkpoint_metric") == "True" else 1
    metric = flags.get("best_checkpoint_metric", "loss")
    best, bad = math.inf, 0
    for point in points:
        for values in list(point.valid.values())[:1]:
            value = values.get(metric, math.nan)
            loss = sign * (round(value, LOGGED_DIGITS) if metric == "loss" else value)
            best, bad = (loss, 0) if loss < best else (best, bad + 1)
    return 0 < patience <= bad


def _logged(path: Path, logs: Iterable[Path]) -> Run | None:
    """The run of fairseq's own logs; what a resumed run logs again replaces what was logged from there on."""
    history: History = {}
    done = False
    for log in logs:
        with open(log, encoding="utf-8", errors="replace") as file:
            while line := file.readline(_LONGEST_LINE):
                if ("checkpoint" in line) and (match := _FROM.search(line)):
                    history = {key: values for key, values in history.items() if key[1] <= float(match[1] or 0)}
                    done = False
                elif '_num_updates"' in line and (found := _read_json(line)):
                    key, values = found
                    history = {earlier: old for earlier, old in history.items() if earlier[:2] <= key[:2]}
                    history[key] = values
                done |= _DONE in line
    if not history:
        return None
    last = max(epoch for epoch, _, _ in history)
    ended = {(epoch, updates) for epoch, updates, split in history if split == _TRAINING}
    return _run(path, {}, history, ended, "" if done else f"epoch {last} is the last in a log without {_DONE!r}")


def _read_json(line: str) -> tuple[tuple[int, float, str], dict[str, float]] | None:
    """What a line of ``--log-format json`` says; None where it is damaged."""
    try:
        found = json.loads(line[line.rfind("{") :])
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("epoch"), int):
        return None
    split = next((key for key in found if key.endswith("_num_updates")), "").removesuffix("_num_updates")
    numbers = {key.removeprefix(split + "_"): _number(value) for key, value in found.items()}
    values = {name: number for name, number in numbers.items() if number is not None}
    updates = values.get("num_updates", -1.0)
    if not (0 <= updates < math.inf and 0 < found["epoch"] < _MOST_EPOCHS):
        return None
    training = split == _TRAIN and "wall" in values  # which no validation has
    return (found["epoch"], updates, _TRAINING if training else split), values


def _run(path: Path, flags: Mapping[str, str], history: History, ended: Set[tuple[int, float]], incomplete: str) -> Run:
    """``ended``: (epoch, updates) of the epochs' ends."""
    splits = [split for _, _, split in history if split != _TRAINING]
    wanted = flags.get("valid_subset", "valid").split(",")[0]
    subset = wanted if wanted in splits or not splits else splits[0]
    (arithmetic, arithmetic_baseline), (dram, dram_baseline) = RELATIVE.values()
    arithmetic_relative, dram_relative = RELATIVE
    epochs, best = [], dict[str, float]()
    for number in sorted({epoch for epoch, _, _ in history}):
        mine = sorted(key for key in history if key[0] == number)
        train = next((history[key] for key in reversed(mine) if key[2] == _TRAINING), {})
        valid = next((history[key] for key in reversed(mine) if key[2] == subset), {})
        epochs.append(
            Epoch(
                number=number,
                updates=int(mine[-1][1]),
                ended=(number, mine[-1][1]) in ended,
                level=train.get(LEVEL),
                train_loss=train.get("loss"),
                valid_loss=valid.get("loss"),
                arithmetic=train.get(arithmetic),
                arithmetic_baseline=train.get(arithmetic_baseline),
                dram_bytes=train.get(dram),
                dram_baseline_bytes=train.get(dram_baseline),
                arithmetic_relative=train.get(arithmetic_relative),
                dram_relative=train.get(dram_relative),
                stash_bytes=train.get(STASH_BYTES),
                weight_bytes=train.get(WEIGHT_BYTES),
                gradient_bytes=train.get(GRADIENT_BYTES),
                state_bytes=train.get(STATE_BYTES),
            )
        )
    for key, values in history.items():
        for metric in QUALITY_METRICS if key[2] == subset else ():
            value = values.get(metric, math.nan)
            better = min if metric in LOWER_IS_BETTER else max
            if math.isfinite(value):
                best[metric] = better(value, best.get(metric, value))
    return Run(_name(path), path, dict(flags), tuple(epochs), best, incomplete)


def _number(value: object) -> float | None:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None


def _begun(path: Path) -> str:
    """When a log was begun, as text that sorts: its first time stamp, and its name where it has none."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for _ in range(1000):
            if match := _TIME.search(file.readline(_LONGEST_LINE)):
                return match[0]
    return path.name


def _what_is(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(8192)
    if not head:
        return "an empty file"
    if b"\0" in head:
        return "binary data"
    first = next((line for line in head.decode("utf-8", "replace").splitlines() if line.strip()), "")
    return f"text without an epoch in it (it begins {printable(first.strip()[:40])!r})"


def _name(path: Path) -> str:
    path = path.resolve()
    if path.is_file():
        path = path.parent if path.stem in _PLAIN_STEMS else path.with_suffix("")
    return printable(path.name) or "/"
