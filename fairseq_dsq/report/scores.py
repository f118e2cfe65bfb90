"""How good a run's model is: what scorers left beside its log, else the best validation."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fairseq_dsq.report.logs import LOWER_IS_BETTER, QUALITY_METRICS, Run, log_files

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
METRICS: Mapping[str, Metric] = {
    GIVEN: Metric("quality (given)", 2),
    "sacrebleu": Metric("BLEU (sacreBLEU)", 2),
    "bleu4": Metric("BLEU4 (fairseq, tokenised)", 2),
    **{f"valid_{name}": _valid_metric(name) for name in QUALITY_METRICS},
}
# The first of these of which a run has anything is what the run is judged by.
_CLASSIFICATION = tuple(f"valid_{name}" for name in QUALITY_METRICS if name not in ("bleu", "loss"))
GROUPS = ((GIVEN,), ("sacrebleu",), ("bleu4",), ("valid_bleu",), _CLASSIFICATION, ("valid_loss",))


def scores(run: Run) -> dict[str, float]:
    """All that is known of a run's quality, by name in :data:`METRICS`.

    Raises:
        OSError: a file of the run's folder cannot be read.
    """
    found = {f"valid_{name}": value for name, value in run.best.items()}
    hits = [hit for path in _score_files(run.path) for hit in _read_scores(path)]
    # Later lines and files stand, but a test set's score over another set's.
    for name, value, _ in sorted(hits, key=lambda hit: hit[2]):
        found[name] = value
    return found


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
        hits.append(("bleu4" if match["kind"] == "4" else "sacrebleu", float(match["score"]), test))
    if text.lstrip().startswith(("{", "[")) and '"BLEU"' in text:
        hits += [("sacrebleu", score, True) for score in _sacrebleu_json(text)]
    return hits


def _sacrebleu_json(text: str) -> list[float]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError:
        return []
    records = [record for record in (records if isinstance(records, list) else [records]) if isinstance(record, dict)]
    scores = [record.get("score") for record in records if record.get("name") == "BLEU"]
    return [float(score) for score in scores if isinstance(score, (int, float)) and math.isfinite(score)]
