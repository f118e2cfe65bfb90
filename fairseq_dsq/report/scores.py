"""How good a run's model is: what scorers left beside its log, else the best validation."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_dsq import artefact
from fairseq_dsq.glue import TASKS, metrics
from fairseq_dsq.report.runs import LOWER_IS_BETTER, QUALITY_METRICS, Run, log_files

_TAIL_BYTES = 1 << 16
_SCORE_SUFFIXES = {".json", ".bleu", ".score"}
_LINE = re.compile(
    r"^(?:.*\bGenerate (?P<subset>\S+) with beam=\d+: )?BLEU(?P<kind>4|[|+]\S+)? = (?P<score>\d+(?:\.\d+)?)\b", re.M
)


@dataclass(frozen=True)
class Metric:
    """A column of the table.

    Attributes:
        label: with unit and source.
        digits: after the point, in text.
        higher_is_better: False for losses.
    """

    label: str
    digits: int
    higher_is_better: bool = True


def _valid_metric(name: str) -> Metric:
    if name in LOWER_IS_BETTER:
        return Metric(f"best valid {name} (bits; lower is better)", 3, higher_is_better=False)
    if name == "bleu":
        return Metric("best valid BLEU (--eval-bleu)", 2)
    return Metric(f"best valid {name.replace('_', ' ')} (%)", 1)


GIVEN = "given"
_GLUE = {
    f"glue_{metric}{suffix}": Metric(f"{metric}{suffix.replace('_', ' ')} (GLUE dev, %)", 1)
    for task in TASKS.values()
    for metric in task.metrics
    for _, suffix in task.dev
}
METRICS: Mapping[str, Metric] = {
    GIVEN: Metric("quality (given)", 2),
    "sacrebleu": Metric("BLEU (sacreBLEU)", 2),
    "bleu4": Metric("BLEU4 (fairseq, tokenised)", 2),
    **_GLUE,
    **{f"valid_{name}": _valid_metric(name) for name in QUALITY_METRICS},
}
# The first of these of which a run has anything is what the run is judged by.
_CLASSIFICATION = tuple(f"valid_{name}" for name in QUALITY_METRICS if name not in ("bleu", "loss"))
GROUPS = ((GIVEN,), ("sacrebleu",), ("bleu4",), tuple(_GLUE), ("valid_bleu",), _CLASSIFICATION, ("valid_loss",))


def scores(run: Run) -> dict[str, float]:
    """All that is known of a run's quality, by name in :data:`METRICS`.

    Raises:
        OSError: a file of the run's folder cannot be read.
    """
    found = {f"valid_{name}": value for name, value in run.best.items()}
    others = stale(run)
    hits = [hit for path in _score_files(run.path) if path not in others for hit in _read_scores(path)]
    # Later lines and files stand, but a test set's score over another set's.
    for name, value, _ in sorted(hits, key=lambda hit: hit[2]):
        found[name] = value
    return found


def stale(run: Run) -> list[Path]:
    """The files of a run's folder that scored another checkpoint than its checkpoint_best.pt, by their stamps.

    Raises:
        OSError: a file cannot be read.
        ValueError: a stamp is damaged.
    """
    best = run.path / artefact.BEST
    if not best.is_file():
        return []
    scored = {path: (artefact.read(path) or {}).get(artefact.CHECKPOINT) for path in _score_files(run.path)}
    now = artefact.checksum(best) if any(scored.values()) else None
    return [path for path, checkpoint in scored.items() if checkpoint not in (None, now)]


def judged_by(found: Mapping[str, float]) -> tuple[str, ...]:
    """The names among ``found`` that a run with these scores is judged by."""
    for group in GROUPS:
        names = tuple(name for name in group if name in found)
        if names:
            return names
    return ()


def _score_files(path: Path) -> list[Path]:
    if path.is_file():
        return [] if "tfevents" in path.name else [path]
    named = [child for child in sorted(path.iterdir()) if child.is_file() and child.suffix in _SCORE_SUFFIXES]
    return [*log_files(path), *named]


def _read_scores(path: Path) -> list[tuple[str, float, bool]]:
    """(name, value, whether it is a test set's as far as one can tell) of what a scorer wrote at a file's end."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    hits = []
    for match in _LINE.finditer(text):
        test = match["subset"] is None or match["subset"].startswith("test")
        name = "bleu4" if match["kind"] == "4" else "sacrebleu"
        hits += [(name, score, test) for score in _numbers([float(match["score"])])]
    if text.lstrip().startswith(("{", "[")) and '"BLEU"' in text:
        hits += [("sacrebleu", score, True) for score in _numbers(r.get("score") for r in _records(text, "BLEU"))]
    if f'"{metrics.RESULT}"' in text:
        hits += [(name, score, True) for name, score in _glue_scores(text)]
    return hits


def _records(text: str, name: str) -> list[dict[str, Any]]:
    """The JSON objects of a file that call themselves ``name``."""
    try:
        records = json.loads(text)
    except (ValueError, RecursionError):
        return []
    records = records if isinstance(records, list) else [records]
    return [record for record in records if isinstance(record, dict) and record.get("name") == name]


def _glue_scores(text: str) -> Iterator[tuple[str, float]]:
    for record in _records(text, metrics.RESULT):
        values = record.get("scores")
        if isinstance(values, dict):
            for name in _GLUE:
                yield from ((name, score) for score in _numbers([values.get(name.removeprefix("glue_"))]))


def _numbers(values: Iterable[object]) -> list[float]:
    """Those that are finite."""
    numbers = []
    for value in values:
        with contextlib.suppress(ValueError, OverflowError):  # an integer beyond float
            if isinstance(value, (int, float)) and math.isfinite(value):
                numbers.append(float(value))
    return numbers
