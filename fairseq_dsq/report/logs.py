"""Read what a training run of fairseq left behind: text logs and TensorBoard event files.

Text logs may hold any mix of ``--log-format json``, ``simple`` and ``tqdm``, as captured from standard output or
written by ``--log-file``. They are streamed: memory grows with the number of validations only.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from fairseq_dsq.cost.metrics import LEVEL, RELATIVE, STASH_BYTES
from fairseq_dsq.plugin.config import DSQConfig, DSQCriterionConfig, defaults
from fairseq_dsq.text import printable

# Validation metrics that say how good a model is: fairseq's tasks and criteria log them beside the loss.
QUALITY_METRICS = (
    "bleu", "accuracy", "f1", "acc_and_f1", "mcc", "pearson", "pearson_and_spearman", "spearman", "loss",
)  # fmt: skip
LOWER_IS_BETTER = frozenset({"loss"})
# What the flags that make a precision setup are where a log does not say: all but those of the schedule.
DSQ_DEFAULTS = {
    flag: str(value)
    for flag, value in {**defaults(DSQConfig), **defaults(DSQCriterionConfig)}.items()
    if flag not in defaults(DSQConfig, "schedule")
}
EXPECTED = (
    "expected a log of fairseq-train (--log-format json, simple or tqdm), "
    "the folder of a run that holds one, or TensorBoard event files"
)

_KEPT = {
    "loss",
    LEVEL,
    STASH_BYTES,
    *RELATIVE,
    *(name for pair in RELATIVE.values() for name in pair),
    *QUALITY_METRICS,
}
_TRAIN = "train"
_SCALAR_FLAGS = (
    *DSQ_DEFAULTS, "arch", "max_epoch", "max_update", "patience", "stop_time_hours", "valid_subset", "fp16", "bf16",
)  # fmt: skip
_FLAG = re.compile(
    rf"(?<![\w-])'?({'|'.join(_SCALAR_FLAGS)})'?(?:=|: )"
    r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s,)}\]]+)"""
)
_SIMPLE = re.compile(r"epoch (\d{1,8}) \| (?:valid on '(.*?)' subset \| )?(\w+ .*)")
# A configuration of fairseq-generate or fairseq-validate: they read a checkpoint.
_EVALUATES = re.compile(r"'common_eval': \{[^{}]*'path': ['\"]")
# Where a run begins: at the updates of the checkpoint that it goes on from, or with none.
_FROM = re.compile(r"No existing checkpoint found|Loaded checkpoint .* \(epoch \d+ @ (\d{1,12}) updates\)")
_BEGIN = re.compile(r"begin training epoch (\d{1,8})")
_MOST_EPOCHS = 10**8
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
_LONGEST_LINE = 1 << 20
_LOG_SUFFIXES = {".log", ".out", ".err", ".txt"}
_LOG_NAMES = {"log", "stdout", "stderr"}
_PLAIN_STEMS = {"train", "training", "hydra_train", *_LOG_NAMES}


@dataclass(frozen=True)
class Epoch:
    """What one epoch's training statistics and its last validation say; None where the log has no value.

    Attributes:
        number: counted from 1.
        updates: optimizer steps at its end.
        level: index of the precision level the epoch trained at (the mean, if it rose within).
        train_loss, valid_loss: in bits, as fairseq logs them; validation of the first valid subset.
        arithmetic, arithmetic_baseline: of training, in MACs of 32-bit fixed point; the same GEMMs' MACs.
        dram_bytes, dram_baseline_bytes: modelled traffic of training; of the same GEMMs in 32-bit fixed point.
        arithmetic_relative, dram_relative: each over its baseline, as logged.
        stash_bytes: mean bytes packed for one backward pass.
    """

    number: int
    updates: int | None
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


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: of the file or folder, without unprintable characters.
        path: as given.
        flags: those flags of fairseq-train that the log shows and a report needs, as text.
        epochs: in order of their numbers.
        best: the best value of each quality metric over all validations of the first valid subset.
        incomplete: why the run counts as unfinished; empty if it does not.
    """

    name: str
    path: Path
    flags: Mapping[str, str]
    epochs: tuple[Epoch, ...]
    best: Mapping[str, float]
    incomplete: str


def read_run(path: Path) -> Run:
    """The run that a log file, a TensorBoard event file or a folder holds.

    A folder's text logs are read as one, in the order in which they were begun; its event files count only if they
    hold more epochs.

    Raises:
        OSError: something cannot be read.
        ValueError: no epoch in it; the message names the path, what was found and what is expected.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder, {EXPECTED}")
    if path.is_file() and "tfevents" not in path.name:
        collector = _Collector()
        collector.read_text(path)
        if not collector.records:
            raise ValueError(f"{path}: {_what_is(path, collector)}, {EXPECTED}")
        return collector.run(path)
    collectors = []
    if path.is_dir():
        text = _Collector()
        for log in sorted(log_files(path), key=_begun):
            text.read_text(log)
        collectors.append(text)
    board = _board(path)
    if board:
        events = _Collector()
        events.read_events(board)
        collectors.append(events)
    best = max(collectors, key=lambda collector: len(collector.epoch_numbers()), default=None)
    if best is None or not best.records:
        names = sorted(child.name for child in path.iterdir()) if path.is_dir() else []
        listing = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        found = f"a folder without an epoch in it ({listing or 'empty'})" if path.is_dir() else "no training scalars"
        raise ValueError(f"{path}: {found}, {EXPECTED}")
    return best.run(path)


def log_files(folder: Path) -> list[Path]:
    """The files of a folder that may be text logs, by their names."""
    return [
        child
        for child in sorted(folder.iterdir())
        if child.is_file() and (child.suffix in _LOG_SUFFIXES or child.name in _LOG_NAMES)
    ]


def missing_extra(error: ImportError) -> ValueError:
    """The one line for a package of the extra ``report`` that is not installed."""
    return ValueError(f"{error.name} is not installed: pip install 'fairseq_dsq[report]'")


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


@dataclass
class _Collector:
    """Statistics in the order in which they were logged.

    ``records`` maps (epoch, updates, split) to values. What a resumed run logs again replaces what was logged from
    there on. Event files have no epoch numbers: theirs are 0 until :meth:`number_epochs`.
    """

    flags: dict[str, str] = field(default_factory=dict)
    records: dict[tuple[int, float, str], dict[str, float]] = field(default_factory=dict)
    begun: int | None = None
    done: bool = False

    def add(self, epoch: int, updates: float, split: str, values: Mapping[str, float]) -> None:
        for later in [key for key in self.records if key[:2] > (epoch, updates)]:
            del self.records[later]
        self.records[epoch, updates, split] = dict(values)
        if split == _TRAIN:
            self.begun = None

    def read_text(self, path: Path) -> None:
        with open(path, "rb") as raw:
            if b"\0" in raw.read(8192):
                return
        with open(path, encoding="utf-8", errors="replace") as file:
            while line := file.readline(_LONGEST_LINE):
                self.read_line(line)

    def _begin_at(self, updates: float) -> None:
        """Forget what an earlier run in the same folder logged beyond where this one begins."""
        self.records = {key: values for key, values in self.records.items() if key[1] <= updates}
        self.begun, self.done = None, False

    def read_line(self, line: str) -> None:
        if ("checkpoint" in line) and (match := _FROM.search(line)):
            self._begin_at(float(match[1] or 0))
        elif "epoch" in line:
            if '_num_updates"' in line:
                self._read_json(line)
            elif "'optimization': {" in line:
                self._read_config(line)
            elif match := _BEGIN.search(line):
                self.begun, self.done = int(match[1]), False
            elif match := _SIMPLE.search(line):
                self._read_simple(line, match)
        elif "Start iterating over samples" in line:
            self.begun, self.done = self.begun or self._last_trained() + 1, False
        elif "done training in" in line:
            self.begun, self.done = None, True

    def _read_json(self, line: str) -> None:
        try:
            record = json.loads(line[line.rfind("{") :])
        except (ValueError, RecursionError):
            return  # cut off, or damaged
        if not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
            return
        split = next((key for key in record if key.endswith("_num_updates")), "").removesuffix("_num_updates")
        fields = {key.removeprefix(split + "_"): value for key, value in record.items()}
        updates = _count(fields.get("num_updates"))
        if updates is not None and 0 < record["epoch"] < _MOST_EPOCHS:
            self.add(record["epoch"], updates, split, _kept(fields))

    def _read_simple(self, line: str, match: re.Match[str]) -> None:
        fields: dict[str, str] = {}
        for piece in match[3].split(" | "):
            name, _, value = piece.strip().partition(" ")
            fields[name] = value
        updates = _count(fields.get("num_updates"))
        # A line that was cut off, by a kill or because another process appended to it, lacks what comes last.
        whole = _number(fields.get("wall")) is not None if match[2] is None else line.endswith("\n")
        if updates is not None and whole:
            self.add(int(match[1]), updates, match[2] or _TRAIN, _kept(fields))

    def _read_config(self, line: str) -> None:
        if _EVALUATES.search(line):
            return
        flags: dict[str, str] = {}
        for match in _FLAG.finditer(line):
            text = match[2]
            flags.setdefault(match[1], _unquoted(text))
        model = re.search(r"'model': \{'_name': '([^']*)'", line)
        if model:
            flags.setdefault("arch", model[1])
        criterion = re.search(r"'criterion': \{'_name': '([^']*)'", line)
        if criterion:
            flags["criterion"] = criterion[1]
        self.flags = flags or self.flags  # of the last run in the log

    def read_events(self, folder: Path) -> None:
        """Event files below ``folder``, one subfolder per split.

        Raises:
            ValueError: tensorboard is not installed.
        """
        try:
            from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
                EventAccumulator,
            )
        except ImportError as error:
            raise missing_extra(error) from None
        groups: dict[tuple[float, str], dict[str, float]] = {}
        times: dict[tuple[float, str], float] = {}
        for split in sorted(child.name for child in folder.iterdir() if child.is_dir() and child.name != "train_inner"):
            accumulator = EventAccumulator(str(folder / split), size_guidance={"scalars": 0, "tensors": 0})
            accumulator.Reload()
            for tag in sorted(_KEPT & set(accumulator.Tags()["scalars"])):
                for event in sorted(accumulator.Scalars(tag), key=lambda event: event.wall_time):
                    key = (float(event.step), split)
                    # As the text logs round; events hold float32.
                    groups.setdefault(key, {})[tag] = float(f"{event.value:g}")
                    times[key] = max(times.get(key, 0.0), event.wall_time)
            if "sys.argv/text_summary" in accumulator.Tags()["tensors"]:
                argv = accumulator.Tensors("sys.argv/text_summary")[-1].tensor_proto.string_val[0].decode()
                self.flags.update(_flags_of_command(argv))
        for key in sorted(groups, key=lambda key: times[key]):
            self.add(0, key[0], key[1], groups[key])
        self._number_epochs()

    def _number_epochs(self) -> None:
        ends = sorted(updates for _, updates, split in self.records if split == _TRAIN)
        self.records = {
            (1 + sum(end < updates for end in ends), updates, split): values
            for (_, updates, split), values in self.records.items()
        }

    def epoch_numbers(self) -> list[int]:
        return sorted({epoch for epoch, _, _ in self.records})

    def _last_trained(self) -> int:
        return max((epoch for epoch, _, split in self.records if split == _TRAIN), default=0)

    def _valid_subset(self) -> str:
        logged = [split for _, _, split in self.records if split != _TRAIN]
        wanted = self.flags.get("valid_subset", "valid").split(",")[0]
        return wanted if wanted in logged or not logged else logged[0]

    def _incomplete(self) -> str:
        if self.done or not self.records:
            return ""
        last, latest = self._last_trained(), self.epoch_numbers()[-1]
        begun = self.begun or (latest if latest > last else None)
        max_epoch = int(_count(self.flags.get("max_epoch")) or 0)
        of = f" of {max_epoch}" if max_epoch else ""
        if begun:
            return f"epoch {begun}{of} begun and not ended"
        max_update = _number(self.flags.get("max_update")) or math.inf
        may_stop = any((_number(self.flags.get(flag)) or 0) > 0 for flag in ("patience", "stop_time_hours"))
        if last < max_epoch and max(updates for _, updates, _ in self.records) < max_update and not may_stop:
            return f"ended after epoch {last} of {max_epoch}"
        return ""

    def run(self, path: Path) -> Run:
        subset = self._valid_subset()
        epochs, best = [], dict[str, float]()
        for number in self.epoch_numbers():
            mine = sorted(key for key in self.records if key[0] == number)
            train = next((self.records[key] for key in reversed(mine) if key[2] == _TRAIN), {})
            valid = next((self.records[key] for key in reversed(mine) if key[2] == subset), {})
            (arithmetic, arithmetic_baseline), (dram, dram_baseline) = RELATIVE.values()
            relative = list(RELATIVE)
            epochs.append(
                Epoch(
                    number=number,
                    updates=int(mine[-1][1]),
                    level=train.get(LEVEL),
                    train_loss=train.get("loss"),
                    valid_loss=valid.get("loss"),
                    arithmetic=train.get(arithmetic),
                    arithmetic_baseline=train.get(arithmetic_baseline),
                    dram_bytes=train.get(dram),
                    dram_baseline_bytes=train.get(dram_baseline),
                    arithmetic_relative=train.get(relative[0]),
                    dram_relative=train.get(relative[1]),
                    stash_bytes=train.get(STASH_BYTES),
                )
            )
        for key, values in self.records.items():
            for metric in QUALITY_METRICS if key[2] == subset else ():
                value = values.get(metric, math.nan)
                better = min if metric in LOWER_IS_BETTER else max
                if math.isfinite(value):
                    best[metric] = better(value, best.get(metric, value))
        return Run(_name(path), path, dict(self.flags), tuple(epochs), best, self._incomplete())


def _kept(fields: Mapping[str, object]) -> dict[str, float]:
    numbers = {name: _number(fields[name]) for name in _KEPT if name in fields}
    return {name: number for name, number in numbers.items() if number is not None}


def _number(value: object) -> float | None:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None


def _count(value: object) -> float | None:
    """A number that counts something."""
    number = _number(value)
    return number if number is not None and 0 <= number < math.inf else None


def _unquoted(text: str) -> str:
    """A flag's value as the configuration shows it; a string that Python does not read is taken as it stands."""
    if text[0] not in "'\"":
        return text
    try:
        return str(ast.literal_eval(text))
    except (SyntaxError, ValueError):
        return text


def _flags_of_command(command: str) -> dict[str, str]:
    """Flags of a command line that was joined by spaces: a flag's value reaches up to the next flag."""
    flags = {}
    for piece in re.split(r"\s--(?=[a-z])", " " + command)[1:]:
        name, *value = re.split("[ =]", piece.strip(), maxsplit=1)
        flags[name.replace("-", "_")] = value[0] if value else "True"
    known = (*_SCALAR_FLAGS, "criterion")
    return {name: value for name, value in flags.items() if name in known}


def _begun(path: Path) -> str:
    """When a log was begun, as text that sorts: its first time stamp, else what the file system says."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for _ in range(1000):
            if match := _TIME.search(file.readline(_LONGEST_LINE)):
                return match[0]
    return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def _board(path: Path) -> Path | None:
    """The folder whose subfolders (train, valid, ...) hold the event files that ``path`` stands for."""
    if path.is_file():
        path = path.parent
    candidates: Iterator[Path] = iter([path])
    if path.is_dir():
        parents = [path.parent] if any(path.glob("*tfevents*")) else []
        candidates = iter([path, *parents, *sorted(child for child in path.iterdir() if child.is_dir())])
    return next((folder for folder in candidates if any((folder / _TRAIN).glob("*tfevents*"))), None)


def _what_is(path: Path, collector: _Collector) -> str:
    with open(path, "rb") as file:
        head = file.read(8192)
    if not head:
        return "an empty file"
    if b"\0" in head:
        return "binary data"
    if collector.begun:
        return f"a log that ends within epoch {collector.begun}, before its first validation"
    if collector.flags:
        return "a log that ends before its first epoch"
    first = next((line for line in head.decode("utf-8", "replace").splitlines() if line.strip()), "")
    return f"text without an epoch in it (it begins {printable(first.strip()[:40])!r})"


def _name(path: Path) -> str:
    path = path.resolve()
    if path.is_file():
        path = path.parent if path.stem in _PLAIN_STEMS or "tfevents" in path.name else path.with_suffix("")
    return printable(path.name) or "/"
