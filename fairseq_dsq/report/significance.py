"""Paired bootstrap tests of runs' translations, by sacreBLEU, and the spread of their seeds."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_dsq.report.runs import Run
from fairseq_dsq.report.scores import stale
from fairseq_dsq.text import printable

SAMPLES = 1000
_SEED = re.compile(r"[-_ ]?seed[-_ ]?\d+$")


@dataclass(frozen=True)
class Translations:
    """What a run's folder has of a test set.

    Attributes:
        hypotheses, references: a sentence each, in the same order.
        signature: sacreBLEU's, of the score beside them.
    """

    hypotheses: tuple[str, ...]
    references: tuple[str, ...]
    signature: str

    @property
    def tokenizer(self) -> str:
        """sacreBLEU's, of the signature."""
        found = re.search(r"\btok:([^|]+)", self.signature)
        return found[1] if found else ""


@dataclass(frozen=True)
class Method:
    """Runs that differ in their seed alone.

    Attributes:
        name: of the runs, without their seeds where that tells them apart.
        runs: indices, in the order of the report.
        seeds: theirs; -1 where none is known.
        values: of the table's primary metric.
        p_values: of the paired test of each run with the baseline's of the same seed, or the baseline; None without
            translations of both, and for the baseline itself.
    """

    name: str
    runs: tuple[int, ...]
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    p_values: tuple[float | None, ...]

    @property
    def mean(self) -> float:
        """Of the values."""
        return sum(self.values) / len(self.values)

    @property
    def spread(self) -> float | None:
        """Highest less lowest value; None of one."""
        return max(self.values) - min(self.values) if len(self.values) > 1 else None


def read_translations(run: Run) -> Translations | None:
    """The translations that a run's folder keeps beside its score of its best checkpoint; None where it has none.

    Raises:
        OSError: a file cannot be read.
        ValueError: a stamp is damaged.
    """
    folder = run.path
    score = folder / "score.json"
    if not score.is_file() or score in stale(run):
        return None
    pairs = [(folder / f"hypotheses{path.suffix}", path) for path in sorted(folder.glob("reference.*"))]
    pairs = [(hypotheses, path) for hypotheses, path in pairs if hypotheses.is_file()]
    try:
        signature = json.loads(score.read_text(encoding="utf-8"))["signature"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not pairs or not isinstance(signature, str):
        return None
    hypotheses, references = (_lines(path) for path in pairs[0])
    return Translations(hypotheses, references, signature) if len(hypotheses) == len(references) else None


def signatures(runs: Sequence[Run], translations: Sequence[Translations | None]) -> list[str]:
    """Notes on how BLEU was measured: one where all runs agree."""
    by_text: dict[str, list[str]] = {}
    for run, found in zip(runs, translations, strict=True):
        if found:
            by_text.setdefault(printable(found.signature), []).append(run.name)
    if len(by_text) == 1:
        return [f"BLEU: {text}" for text in by_text]
    return [f"BLEU of {', '.join(names)}: {text}" for text, names in by_text.items()]


def p_value(baseline: Translations, other: Translations) -> float | None:
    """How likely a difference of BLEU as large is by chance, in a paired bootstrap; None unless measured alike.

    Equal translations have 1; sacreBLEU would say 0.001 of them.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.significance import PairedTest

    alike = (baseline.references, baseline.signature) == (other.references, other.signature)
    if not alike or baseline.tokenizer not in BLEU.TOKENIZERS:
        return None
    if baseline.hypotheses == other.hypotheses:
        return 1.0

    systems: list[tuple[str, Sequence[str]]] = [
        ("baseline", list(baseline.hypotheses)),
        ("other", list(other.hypotheses)),
    ]
    lowercase = "case:lc" in baseline.signature
    metric = BLEU(lowercase, tokenize=baseline.tokenizer, references=[list(baseline.references)])
    _, scores = PairedTest(systems, {"BLEU": metric}, references=None, test_type="bs", n_samples=SAMPLES)()
    result: Any = scores["BLEU"][1]
    return float(result.p_value)


def methods(
    runs: Sequence[Run],
    values: Sequence[float | None],
    translations: Sequence[Translations | None],
    baseline: int | None,
) -> list[Method]:
    """The runs that have a value, those of one method together, each method where its first run stands.

    Args:
        values: of the table's primary metric.
        baseline: index of the run that differences refer to.
    """
    groups: dict[object, list[int]] = {}
    for index, run in enumerate(runs):
        if values[index] is not None:
            groups.setdefault(_alike(run, index), []).append(index)
    own = [] if baseline is None else next((group for group in groups.values() if baseline in group), [])
    by_seed = {_seed(runs[index]): index for index in reversed(own)}
    names = Counter(_name(runs[group[0]]) for group in groups.values())
    found = []
    for group in groups.values():
        name = _name(runs[group[0]])
        tests: list[float | None] = []
        for index in group:
            other = by_seed.get(_seed(runs[index]), baseline)
            mine, its = translations[index], None if other is None else translations[other]
            tests.append(p_value(its, mine) if mine and its and group is not own else None)
        found.append(
            Method(
                name=name if names[name] == 1 else runs[group[0]].name,
                runs=tuple(group),
                seeds=tuple(_seed(runs[index]) for index in group),
                values=tuple(value for index in group if (value := values[index]) is not None),
                p_values=tuple(tests),
            )
        )
    return found


def _name(run: Run) -> str:
    return _SEED.sub("", run.name) or run.name


def _seed(run: Run) -> int:
    text = run.flags.get("seed", "")
    return int(text) if re.fullmatch(r"\d{1,9}", text) else -1


def _alike(run: Run, index: int) -> object:
    """Equal for runs whose records' flags, and names, differ in the seed alone."""
    flags: Mapping[str, str] = run.flags
    if "seed" not in flags:
        return index
    return _name(run), frozenset((name, value) for name, value in flags.items() if name != "seed")


def _lines(path: Path) -> tuple[str, ...]:
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        return tuple(line.rstrip("\n") for line in file)
