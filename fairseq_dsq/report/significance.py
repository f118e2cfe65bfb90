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
_SEED = re.compile(r"[-_ ]?seed[-_ ]?\d+(?=(\.\w+)?$)")  # at the end of a name, or before a file's suffix


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
        differences: of each value from that of the run's partner, see :func:`partners`; None where it has none.
        p_values: of the paired test of each run with its partner; None without translations of both.
    """

    name: str
    runs: tuple[int, ...]
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    differences: tuple[float | None, ...]
    p_values: tuple[float | None, ...]

    @property
    def mean(self) -> float:
        """Of the values."""
        return sum(self.values) / len(self.values)

    @property
    def difference(self) -> float | None:
        """The mean of the differences; None without any."""
        known = [value for value in self.differences if value is not None]
        return sum(known) / len(known) if known else None

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
    """The p-value of sacreBLEU's paired bootstrap of BLEU; None unless measured alike.

    It is the share of samples in which the absolute difference lies above its mean by more than the difference itself:
    one-sided in effect, half of a two-sided p-value, and about 0.43 where nothing but noise differs. Equal translations
    have 1; sacreBLEU would say 0.001 of them.
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


def partners(runs: Sequence[Run], baseline: int | None) -> list[int | None]:
    """For each run, the index of the one that it is compared with, which differs in the method alone if possible.

    That is the baseline's of the same seed, or else the baseline; None for the baseline's own method.
    """
    if baseline is None:
        return [None] * len(runs)
    method = _alike(runs[baseline], baseline)
    own = [index for index, run in enumerate(runs) if _alike(run, index) == method]
    by_seed = {_seed(runs[index]): index for index in reversed(own)}
    return [None if index in own else by_seed.get(_seed(run), baseline) for index, run in enumerate(runs)]


def methods(
    runs: Sequence[Run],
    values: Sequence[float | None],
    translations: Sequence[Translations | None],
    partners: Sequence[int | None],
) -> list[Method]:
    """The runs that have a value, those of one method together, each method where its first run stands.

    Args:
        values: of the table's primary metric.
        partners: of the runs, see :func:`partners`.
    """
    groups: dict[object, list[int]] = {}
    for index, run in enumerate(runs):
        if values[index] is not None:
            groups.setdefault(_alike(run, index), []).append(index)
    names = Counter(_name(runs[group[0]]) for group in groups.values())
    found = []
    for group in groups.values():
        name = _name(runs[group[0]])
        differences: list[float | None] = []
        tests: list[float | None] = []
        for index in group:
            other = partners[index]
            mine, its = values[index], None if other is None else values[other]
            differences.append(None if mine is None or its is None else mine - its)
            text, against = translations[index], None if other is None else translations[other]
            tests.append(p_value(against, text) if text and against else None)
        found.append(
            Method(
                name=name if names[name] == 1 else runs[group[0]].name,
                runs=tuple(group),
                seeds=tuple(_seed(runs[index]) for index in group),
                values=tuple(value for index in group if (value := values[index]) is not None),
                differences=tuple(differences),
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
    """Equal for runs whose records' flags, and paths, differ in the seed alone."""
    flags: Mapping[str, str] = run.flags
    if "seed" not in flags:
        return index
    parts = tuple(_SEED.sub("", part) or part for part in run.path.resolve().parts)
    return parts, frozenset((name, value) for name, value in flags.items() if name != "seed")


def _lines(path: Path) -> tuple[str, ...]:
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        return tuple(line.rstrip("\n") for line in file)
