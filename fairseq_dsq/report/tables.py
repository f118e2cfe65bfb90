"""Table 1 of arXiv 2303.05295 from training runs: quality beside modelled arithmetic and DRAM traffic."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from fairseq_dsq import formats
from fairseq_dsq.cost import CostProfile, load_profile
from fairseq_dsq.cost.published import printed
from fairseq_dsq.precision import PrecisionConfig, levels_to_str
from fairseq_dsq.report.runs import DSQ_DEFAULTS, Run, levels_of_flags, rules_of_flags
from fairseq_dsq.report.scores import METRICS, judged_by
from fairseq_dsq.report.significance import Method, Translations, methods, partners, signatures
from fairseq_dsq.text import printable

FLOAT32, PLAIN = "Float32", "fairseq"
_FORMAT_LABELS = {"bfp": "BFP", "fixed": "Fixed"}
_FORMAT_NAMES = {"bfp": "BFP", "fixed": "Fixed-point"}
MISSING = "-"
# The sums of a log have six digits: what lies this close to half a unit was half a unit.
_LOGGED_PLACES = 5


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        name: tells the run from all others of its table.
        method, setup: as the paper labels them.
        scores: by name in :data:`fairseq_dsq.report.scores.METRICS`.
        differences: of those scores from the partner's, where both have them.
        partner: the name of the run that they are from: the baseline's of the same seed, or the baseline.
        arithmetic, dram: of the whole training, over the same GEMMs in 32-bit fixed point; None without dsq metrics.
        arithmetic_total, dram_total: MACs of 32-bit fixed point; bytes.
        weight_bytes, gradient_bytes, state_bytes: held at the end of the training; None where nothing says it.
        stash_bytes: packed for one backward pass, the mean of the epoch that packed most.
        epochs: how many were trained, the last one perhaps in part.
        levels: (precision, updates at it) one after the other, of a run that has several to go through.
        notes: what a reader has to know.
    """

    name: str
    method: str
    setup: str
    scores: Mapping[str, float]
    differences: Mapping[str, float]
    partner: str | None
    arithmetic: float | None
    dram: float | None
    arithmetic_total: float | None
    dram_total: float | None
    weight_bytes: float | None
    gradient_bytes: float | None
    state_bytes: float | None
    stash_bytes: float | None
    epochs: int
    levels: tuple[tuple[str, int], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Further:
    """A table below the first.

    Attributes:
        title: in a page.
        lines: cells, the header first; only the first ``left`` columns are text.
        note: what its numbers are.
    """

    title: str
    lines: list[list[str]]
    note: str
    left: int = 1


@dataclass(frozen=True)
class Table:
    """What a report says in numbers.

    Attributes:
        rows: in the order of the runs.
        metrics: the columns of quality, names in :data:`fairseq_dsq.report.scores.METRICS`.
        primary: the one of them that most runs are judged by; None without any.
        baseline: the name of the run that differences refer to.
        named: whether method and setup do not tell the rows apart.
        notes: what a reader has to know, beside the rows' own.
        methods: the rows by method, all seeds together.
        priced: by profile, relative arithmetic and DRAM traffic of each row; None where it could not be priced.
    """

    rows: tuple[Row, ...]
    metrics: tuple[str, ...]
    primary: str | None
    baseline: str | None
    named: bool
    notes: tuple[str, ...]
    methods: tuple[Method, ...] = ()
    priced: Mapping[str, tuple[tuple[float, float] | None, ...]] = dataclasses.field(default_factory=dict)

    def label(self, row: Row) -> str:
        """What a legend calls a row: method and setup, and the run's name where others share these."""
        setup = "" if row.setup == MISSING or row.method == FLOAT32 else f" {row.setup}"
        alike = sum((other.method, other.setup) == (row.method, row.setup) for other in self.rows)
        return f"{row.method}{setup}{f' ({row.name})' if alike > 1 else ''}"


def tell_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, those of one name renamed: by the whole file name, by the folders above it, else by a number."""
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault(run.name, []).append(index)
    names = [run.name for run in runs]
    for name, group in groups.items():
        if len(group) == 1:
            continue
        for depth, whole in itertools.product(range(8), (False, True)):
            longer = [_longer_name(runs[index].path.resolve(), name, depth, whole) for index in group]
            if len(set(longer)) == len(group):
                for index, text in zip(group, longer, strict=True):
                    names[index] = text
                break
    taken: Counter[str] = Counter()
    for index, name in enumerate(names):
        taken[name] += 1
        names[index] = name if taken[name] == 1 else f"{name} ({taken[name]})"
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _longer_name(path: Path, name: str, depth: int, whole: bool) -> str:
    """A run's name after ``depth`` folders; ``whole`` with what the name left out of the path's end."""
    places = (path, *path.parents)
    above = next((i for i, place in enumerate(places) if name in (printable(place.name), printable(place.stem))), 0)
    parts = path.parts[1:]
    at = len(parts) - 1 - above
    return printable("/".join([*parts[max(0, at - depth) : at], *(parts[at:] if whole else [name])]))


def levels(run: Run) -> tuple[PrecisionConfig, ...]:
    """The precision levels that a run was given; none where nothing of it rounds, or without a record."""
    given = levels_of_flags(run.flags) if run.flags else ()
    codes = run.flags.get("dsq_weights", DSQ_DEFAULTS["dsq_weights"]) != DSQ_DEFAULTS["dsq_weights"]
    return given if codes or any(level.rounds for level in (*given, *rules_of_flags(run.flags, len(given)))) else ()


def describe(run: Run) -> tuple[str, str]:
    """(method, precision setup) from the flags in a run's record; a log alone does not tell them."""
    flags = run.flags
    if not flags:
        return PLAIN if _costs(run) is None else run.name, MISSING
    flags = {**DSQ_DEFAULTS, **flags}
    name, given = flags["dsq_format"], levels(run)
    if not given:
        return (FLOAT32, "[32,32,32,32]") if levels_of_flags(flags) else (run.name, flags["dsq_levels"])
    options = [
        f"{flag.removeprefix('dsq_').replace('_', ' ')} {flags[flag]}"
        for flag, default in DSQ_DEFAULTS.items()
        if flag not in ("dsq_format", "dsq_levels") and flags[flag] != default
    ]
    if not any(level.rounds for level in given):
        return f"{FLOAT32}, partly quantized", ", ".join([FLOAT32.lower(), *options])
    setup = ", ".join([levels_to_str(given), *options])
    families = [name]
    if not any(level.has_bits for level in given):
        families = [member.family for level in given for pair in level.members for member in pair]
    label = "/".join(dict.fromkeys(_FORMAT_LABELS.get(family, family) for family in families))
    if len(given) > 1:
        return f"DSQ ({label})", setup
    q = given[0].q
    if len(set(q)) > 1:
        return f"Stashing ({label})", setup
    return (q[0] if isinstance(q[0], str) else f"{_FORMAT_NAMES.get(name, name)} {q[0]}"), setup


def make_table(
    runs: Sequence[Run],
    scores: Sequence[Mapping[str, float]],
    baseline: int | None = None,
    translations: Sequence[Translations | None] | None = None,
) -> Table:
    """The table of runs whose names differ.

    Args:
        scores: what is known of each run's quality, by name in :data:`fairseq_dsq.report.scores.METRICS`.
        baseline: index of the run that differences refer to; default: the first in float.
        translations: of each run, which are tested in pairs.
    """
    described = [describe(run) for run in runs]
    judged = [judged_by(found) for found in scores]
    votes = Counter(name for names in judged for name in names)
    metrics = [name for name in METRICS if name in votes]
    notes = []
    floats = [i for i, (method, _) in enumerate(described) if method in (FLOAT32, PLAIN)]
    reference = next(iter(floats), None) if baseline is None else baseline
    compared = partners(runs, reference)
    if baseline is None and any(compared[index] is not None for index in floats):
        notes.append(f"differences are from {runs[floats[0]].name}, the first of {len(floats)} float runs")
    profiles = {_profile_of(run) for run in runs if _costs(run)}
    if len(profiles) > 1:
        notes.append(f"the runs' costs follow different profiles ({', '.join(sorted(profiles))})")
    if priced := [name for name in sorted(profiles) if (found := _profile(name)) and found.prices_updates]:
        notes.append(f"DRAM by profile {', '.join(priced)} includes updates, relative to Adam's in float32")
    for name in sorted(profiles):
        if profile := _profile(name):
            notes += filter(None, [profile.says_of_unpriced(_priced_levels(runs, name))])
    for run in runs:
        trained = [each.level for each in run.epochs if each.level is not None]
        trained += [level for level, _ in run.levels]
        if trained and (unreached := levels(run)[math.ceil(max(trained)) + 1 :]):
            notes.append(f"the precision of {run.name} never rose to {levels_to_str(unreached)}")
    rows = []
    for index, run in enumerate(runs):
        other = compared[index]
        base = {} if other is None else scores[other]
        costs = _costs(run) or (None, None, None, None)
        rows.append(
            Row(
                name=run.name,
                method=described[index][0],
                setup=described[index][1],
                scores={name: scores[index][name] for name in metrics if name in scores[index]},
                differences={
                    name: scores[index][name] - base[name] for name in metrics if name in scores[index] and name in base
                },
                partner=None if other is None else runs[other].name,
                arithmetic=costs[0],
                dram=costs[2],
                arithmetic_total=costs[1],
                dram_total=costs[3],
                weight_bytes=_last(epoch.weight_bytes for epoch in run.epochs),
                gradient_bytes=_last(epoch.gradient_bytes for epoch in run.epochs),
                state_bytes=_last(epoch.state_bytes for epoch in run.epochs),
                stash_bytes=max(
                    (known for epoch in run.epochs if (known := epoch.stash_bytes) is not None), default=None
                ),
                epochs=sum(epoch.train_loss is not None for epoch in run.epochs),
                levels=_levels(run),
                notes=_notes(run),
            )
        )
    primary = max(metrics, key=lambda name: votes[name], default=None)
    values = [found.get(primary) if primary else None for found in scores]
    translations = translations or [None] * len(runs)
    return Table(
        rows=tuple(rows),
        metrics=tuple(metrics),
        primary=primary,
        baseline=None if reference is None else runs[reference].name,
        named=len(set(described)) < len(described),
        notes=(*notes, *signatures(runs, translations)),
        methods=tuple(methods(runs, values, translations, compared)),
    )


def _levels(run: Run) -> tuple[tuple[str, int], ...]:
    """(precision, updates) of a run that has several levels."""
    several = len(levels(run)) > 1 or len({precision for precision, _ in run.trained}) > 1
    return run.trained if several else ()


def _profile(name: str) -> CostProfile | None:
    """A profile, where it is still found."""
    try:
        return load_profile(name)
    except (ValueError, OSError):
        return None


def _priced_levels(runs: Sequence[Run], profile: str) -> Iterator[PrecisionConfig]:
    """The levels of the runs whose costs follow a profile; a format that is no longer known is left out."""
    for run in runs:
        known = {**DSQ_DEFAULTS, **run.flags}["dsq_format"] in formats.names()
        if known and _profile_of(run) == profile:
            given = levels(run)
            yield from (*given, *rules_of_flags(run.flags, len(given)))


def find(runs: Sequence[Run], wanted: str) -> int:
    """The index of the run with this name or path.

    Raises:
        ValueError: there is none.
    """
    for index, run in enumerate(runs):
        if wanted == run.name or Path(wanted) == run.path:
            return index
    raise ValueError(f"got {wanted!r}, expected one of the runs: {', '.join(run.name for run in runs)}")


def _profile_of(run: Run) -> str:
    return run.flags.get("dsq_cost_profile", DSQ_DEFAULTS["dsq_cost_profile"])


def _costs(run: Run) -> tuple[float, float, float, float] | None:
    """Relative and absolute arithmetic, relative and absolute DRAM, of what was trained."""
    sums = [0.0, 0.0, 0.0, 0.0]
    for epoch in run.epochs:
        values = (epoch.arithmetic, epoch.arithmetic_baseline, epoch.dram_bytes, epoch.dram_baseline_bytes)
        sums = [total + (value or 0.0) for total, value in zip(sums, values, strict=True)]
    if not sums[1] or not sums[3]:
        return None
    return sums[0] / sums[1], sums[0], sums[2] / sums[3], sums[2]


def _last(values: Iterable[float | None]) -> float | None:
    """The last one that is known."""
    known = [value for value in values if value is not None]
    return known[-1] if known else None


def _notes(run: Run) -> tuple[str, ...]:
    notes = [*([f"incomplete: {run.incomplete}"] if run.incomplete else []), *run.notes]
    first, last = run.epochs[0].number, run.epochs[-1].number
    if first > 1 and not run.trained:
        notes.append(f"begins at epoch {first}; what earlier epochs cost is not in it")
    ended = {epoch.number for epoch in run.epochs if epoch.ended}
    if lost := [str(number) for number in range(first, last) if number not in ended]:
        notes.append(f"the end of epoch {', '.join(lost)} was not logged; what it cost is not in it")
    return tuple(notes)


def fixed(value: float, digits: int, sign: bool = False) -> str:
    """A number with so many digits after the point, halves away from zero (0.125 gives 0.13)."""
    if not math.isfinite(value):
        return str(value)
    return format(Decimal(printed(value, digits, _LOGGED_PLACES)) + 0, "+f" if sign else "f")


def relative(value: float | None) -> str:
    """A relative cost with the paper's digits: two after the point, three below 0.1 (it prints 0.45 and 0.012)."""
    if value is None:
        return MISSING
    text = fixed(value, 3)
    return text if float(text) < 0.1 else fixed(value, 2)


def header(table: Table) -> list[str]:
    """The column titles."""
    quality = [METRICS[name].label for name in table.metrics]
    return [*(["Run"] if table.named else []), "Method", "Precision setup", *quality, "Arithmetic", "DRAM"]


def cells(table: Table, row: Row) -> list[str]:
    """A row's text."""
    quality = []
    for name in table.metrics:
        text = fixed(row.scores[name], METRICS[name].digits) if name in row.scores else MISSING
        if name in row.differences:
            text += f" ({fixed(row.differences[name], METRICS[name].digits, sign=True)})"
        quality.append(text)
    method = f"{row.method} *" if row.notes else row.method
    costs = [relative(row.arithmetic), relative(row.dram)]
    return [*([row.name] if table.named else []), method, row.setup, *quality, *costs]


def all_notes(table: Table) -> list[str]:
    """What stands below the table."""
    costs = any(row.arithmetic is not None for row in table.rows)
    notes = []
    if costs:
        notes.append(
            "Arithmetic and DRAM: modelled, of the whole training, relative to the same GEMMs in 32-bit fixed point."
        )
    if compared := {row.partner for row in table.rows if row.differences}:
        same_seed = "" if compared == {table.baseline} else f"{table.baseline}'s method at the same seed, else from "
        notes.append(f"In brackets: the difference from {same_seed}{table.baseline}.")
    notes += [f"{note[0].upper()}{note[1:]}." for note in table.notes]
    notes += [f"* {row.name}: {'; '.join(row.notes)}." for row in table.rows if row.notes]
    return notes


HELD_NOTE = (
    "Held (MB, 10^6 bytes): weights as they are held, gradients and optimizer states at the end of the training, the "
    "stash of one backward pass in the epoch that packed most; measured."
)


def held(table: Table) -> list[list[str]]:
    """Lines of the table of what the runs hold, its header first; none where no run says more than its stash."""
    parts = [(row.weight_bytes, row.gradient_bytes, row.state_bytes, row.stash_bytes) for row in table.rows]
    if not any(value is not None for row in parts for value in row[:3]):
        return []
    lines = [["Held (MB)", "Weights", "Gradients", "States", "Stash", "Sum"]]
    for row, values in zip(table.rows, parts, strict=True):
        known = [value for value in values if value is not None]
        total = sum(known) if len(known) == len(values) else None
        texts = [MISSING if value is None else fixed(value / 1e6, 2) for value in (*values, total)]
        lines.append([table.label(row), *texts])
    return lines


SEEDS_NOTE = (
    "Mean of the seeds; spread: the highest less the lowest. Difference: that from {baseline}'s run of the same seed, "
    "else its first, the mean of the seeds; in brackets: the lowest and the highest. p: of sacreBLEU's paired "
    "bootstrap against that run (1,000 samples), for each seed. It is one-sided in effect, half of a two-sided one, "
    "and 0.43 where two runs do not differ; it compares two trained models, and knows nothing of what a seed changes."
)


def seeds(table: Table) -> list[list[str]]:
    """Lines of the table of methods, its header first; none where all have one seed and nothing could be tested."""
    tested = any(value is not None for method in table.methods for value in method.p_values)
    if table.primary is None or not (tested or any(len(method.runs) > 1 for method in table.methods)):
        return []
    digits = METRICS[table.primary].digits
    lines = [["Method", "Seeds", METRICS[table.primary].label, "Spread", "Difference", *(["p"] if tested else [])]]
    for method in table.methods:
        p_values = ", ".join(MISSING if value is None else fixed(value, 3) for value in method.p_values)
        known = any(value is not None for value in method.p_values)
        line = [
            method.name,
            " ".join(str(seed) if seed >= 0 else MISSING for seed in method.seeds),
            fixed(method.mean, digits),
            MISSING if method.spread is None else fixed(method.spread, digits),
            _difference(method, digits),
        ]
        lines.append([*line, *([p_values if known else MISSING] if tested else [])])
    return lines


def _difference(method: Method, digits: int) -> str:
    """The mean difference from the baseline and, of several, the lowest and the highest."""
    if method.difference is None:
        return MISSING
    known = [value for value in method.differences if value is not None]
    mean, low, high = (fixed(value, digits, sign=True) for value in (method.difference, min(known), max(known)))
    return mean if len(known) == 1 else f"{mean} ({low}, {high})"


LEVELS_NOTE = (
    "Share of the updates at each level, and after how many updates it changed, as of the lines of the record."
)
_MOST_CHANGES = 6


def trained_levels(table: Table) -> list[list[str]]:
    """Lines of the table of levels, its header first; none where no run has several."""
    lines = [["Levels", "Shares", "Changed after", "Updates"]]
    for row in table.rows:
        if not row.levels:
            continue
        shares: Counter[str] = Counter()
        for level, updates in row.levels:
            shares[level] += updates
        total = sum(shares.values())
        ends = list(itertools.accumulate(updates for _, updates in row.levels))[:-1]
        changes = ", ".join(map(str, ends[:_MOST_CHANGES])) or "never"
        if len(ends) > _MOST_CHANGES:
            changes += f", ... ({len(ends)} times)"
        text = ", ".join(f"{level} {fixed(100 * updates / total, 1)} %" for level, updates in shares.items())
        lines.append([table.label(row), text, changes, str(total)])
    return lines if len(lines) > 1 else []


PRICED_NOTE = (
    "The same updates by several profiles, relative to 32-bit fixed point: the model of each run's checkpoint on full "
    "batches of the run's mean size, without padding."
)


def priced(table: Table) -> list[list[str]]:
    """Lines of the table of other profiles' costs, its header first; none where no profile was asked for."""
    if not table.priced:
        return []
    lines = [["Priced by", *(f"{name}: {cost}" for name in table.priced for cost in ("arithmetic", "DRAM"))]]
    for index, row in enumerate(table.rows):
        costs = [by_row[index] or (None, None) for by_row in table.priced.values()]
        lines.append([table.label(row), *(relative(value) for pair in costs for value in pair)])
    return lines


def further(table: Table) -> list[Further]:
    """The tables below the first, those that have anything to say."""
    baseline = next((m.name for m in table.methods if table.baseline in {table.rows[i].name for i in m.runs}), "float")
    found = [
        Further("Seeds", seeds(table), SEEDS_NOTE.format(baseline=baseline), 2),
        Further("Levels", trained_levels(table), LEVELS_NOTE, 3),
        Further("Other profiles", priced(table), PRICED_NOTE),
        Further("Held in memory", held(table), HELD_NOTE),
    ]
    return [each for each in found if each.lines]


def markdown(table: Table) -> str:
    """The tables and their notes as Markdown, columns aligned."""
    lines = [header(table)] + [cells(table, row) for row in table.rows]
    parts = [markdown_table(lines, _left(table)), *map(escape_markdown, all_notes(table))]
    for each in further(table):
        parts += [markdown_table(each.lines, each.left), escape_markdown(each.note)]
    return "\n\n".join(parts) + "\n"


def _left(table: Table) -> int:
    """How many of the first columns are text."""
    return len(header(table)) - len(table.metrics) - 2


def markdown_table(lines: list[list[str]], left: int) -> str:
    """A table whose first ``left`` columns are text; the first line is its header."""
    lines = [[escape_markdown(cell) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    padded = [
        [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])


def tex(table: Table) -> str:
    """The tables as LaTeX for the package booktabs."""
    lines = [header(table), *(cells(table, row) for row in table.rows)]
    parts = [_tex(lines, _left(table), all_notes(table))]
    return "".join([*parts, *(_tex(each.lines, each.left, [each.note]) for each in further(table))])


def _tex(lines: list[list[str]], left: int, notes: Sequence[str]) -> str:
    columns = "l" * left + "r" * (len(lines[0]) - left)
    rows = [" & ".join(map(escape_tex, line)) + r" \\" for line in lines]
    # After a row's end a bracket would be its optional argument.
    rows = [f"{{[}}{row[1:]}" if row.startswith("[") else row for row in rows]
    notes = [f"% {' '.join(note.split())}" for note in notes]
    body = [rows[0], r"\midrule", *rows[1:]]
    return (
        "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}", *notes])
        + "\n"
    )


def csv_text(table: Table) -> str:
    """The table as CSV, unrounded, units in the header."""
    names = ["run", "method", "precision_setup"]
    for name in table.metrics:
        names += [METRICS[name].label, f"{METRICS[name].label}: difference from the baseline"]
    names += [
        "arithmetic (relative to 32-bit fixed point)",
        "DRAM traffic (relative to 32-bit fixed point)",
        "arithmetic (MACs of 32-bit fixed point)",
        "DRAM traffic (bytes)",
        "weights (bytes)",
        "gradients (bytes)",
        "states (bytes)",
        "stash (bytes)",
        "epochs",
        "updates by level",
        "notes",
    ]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    for row in table.rows:
        quality = [part.get(name) for name in table.metrics for part in (row.scores, row.differences)]
        costs = [row.arithmetic, row.dram, row.arithmetic_total, row.dram_total]
        costs += [row.weight_bytes, row.gradient_bytes, row.state_bytes, row.stash_bytes]
        trained = "; ".join(f"{level} {updates}" for level, updates in row.levels)
        writer.writerow([row.name, row.method, row.setup, *quality, *costs, row.epochs, trained, "; ".join(row.notes)])
    return buffer.getvalue()


def to_json(table: Table, runs: Sequence[Run], skipped: Sequence[str], benches: Sequence[Any] = ()) -> str:
    """One object: ``runs`` with their flags and epochs, ``summary`` with the table's rows; unrounded, NaN as null.

    Args:
        benches: dataclasses, which are put beside them.
    """
    document = {
        "runs": [{**dataclasses.asdict(run), "path": str(run.path)} for run in runs],
        "summary": {
            "baseline": table.baseline,
            "metrics": {name: dataclasses.asdict(METRICS[name]) for name in table.metrics},
            "rows": [dataclasses.asdict(row) for row in table.rows],
            "methods": [
                {
                    **dataclasses.asdict(method),
                    "mean": method.mean,
                    "spread": method.spread,
                    "difference": method.difference,
                }
                for method in table.methods
            ],
            "priced": table.priced,
            "notes": all_notes(table),
        },
        "skipped": list(skipped),
        **({"bench": [dataclasses.asdict(bench) for bench in benches]} if benches else {}),
    }
    return json.dumps(_finite(document), indent=1, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def escape_tex(text: str) -> str:
    """Text as LaTeX shows it, in a table's cell."""
    return "".join(_TEX.get(character, character) for character in text)


def escape_markdown(text: str) -> str:
    """Text as Markdown shows it, in a table's cell; what needs no escape stays legible in a terminal."""
    text = re.sub(r"[\\`|<>&#~$]", r"\\\g<0>", text)
    text = re.sub(r"\](?=[(\[:])", r"\\]", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<! )\*|\*(?=\S)", r"\\\g<0>", text)
