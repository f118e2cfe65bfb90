"""What a recipe comes to: its runs, each a few commands, and how far they are."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fairseq_dsq import artefact, record
from fairseq_dsq.recipes.training import LOG


@dataclass(frozen=True)
class Step:
    """One command of fairseq-dsq.

    Attributes:
        arguments: after ``fairseq-dsq``.
        before: printed before its output.
        failure: said where it ends with code 1.
    """

    arguments: tuple[str, ...]
    before: str = ""
    failure: str = ""


def step(*arguments: object, before: str = "", failure: str = "") -> Step:
    """A command of these arguments."""
    return Step(tuple(map(str, arguments)), before, failure)


@dataclass(frozen=True)
class Plan:
    """A recipe's commands.

    Attributes:
        name: the recipe's.
        prepare: the data, before all runs.
        runs: by folder, in the order in which they are begun.
        result: the file that a run ends with, in its folder.
        report: the table of all runs, if they are one's rows.
    """

    name: str
    prepare: Step
    runs: dict[Path, tuple[Step, ...]]
    result: str
    report: Step | None = None

    def commands(self) -> list[Step]:
        """All of them, in order."""
        steps = [self.prepare, *(step for steps in self.runs.values() for step in steps)]
        return steps if self.report is None else [*steps, self.report]

    def is_done(self, folder: Path) -> bool:
        """Whether a run has its result; its commands tell whether that is the one that is asked for now."""
        return artefact.stamp(folder / self.result).is_file() and artefact.stamp(folder / LOG).is_file()


@dataclass(frozen=True)
class Progress:
    """How far a plan is.

    Attributes:
        done, running, left: runs.
        run_s: mean of those that are done, training and scoring; None before the first.
        left_s: until all are; None likewise.
    """

    done: int
    running: int
    left: int
    run_s: float | None = None
    left_s: float | None = None

    def __str__(self) -> str:
        total = self.done + self.running + self.left
        text = f"{self.done} of {total} runs done, {self.running} running, {self.left} left"
        if self.run_s is None or self.left_s is None or not self.running + self.left:
            return text
        return f"{text}; about {_duration(self.left_s)} ({_duration(self.run_s)} a run)"


def progress(plan: Plan, jobs: int, running: Collection[Path] = ()) -> Progress:
    """How far the runs of a plan are, from what lies in their folders.

    Args:
        jobs: how many are trained at a time.
        running: those that are known to be.
    """
    done = [folder for folder in plan.runs if plan.is_done(folder)]
    rest = [folder for folder in plan.runs if folder not in done]
    at_work = [folder for folder in rest if folder in running or artefact.is_locked(folder)]
    left = len(rest) - len(at_work)
    times = [_trained_s(folder) + _scored_s(folder, plan.result) for folder in done]
    if not done:
        return Progress(0, len(at_work), left)
    mean = sum(times) / len(times)
    seconds = sum(max(0.0, mean - _trained_s(folder)) for folder in rest)
    return Progress(len(done), len(at_work), left, mean, seconds / min(jobs, max(1, len(rest))))


def _trained_s(folder: Path) -> float:
    """Seconds of training by a run's record; stops, and what they lost, are left out."""
    try:
        lines = record.read(folder / record.NAME)
    except (OSError, ValueError):
        return 0.0
    total = last = 0.0
    for line in lines:
        if isinstance(line, record.Start):
            total, last = total + last, 0.0
        else:
            last = line.wall_s
    return total + last


def _scored_s(folder: Path, result: str) -> float:
    """Seconds from the end of the training to the score; none where it came much later, as after a stop."""
    trained, scored = (artefact.stamp(folder / name).stat().st_mtime for name in (LOG, result))
    return scored - trained if 0 < scored - trained < max(600.0, _trained_s(folder)) else 0.0


def _duration(seconds: float) -> str:
    """Minutes, or hours and minutes."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
