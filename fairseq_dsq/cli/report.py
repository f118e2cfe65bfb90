"""Compare training runs: quality beside modelled arithmetic and DRAM traffic, as a table, figures and a page."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fairseq_dsq import artefact, data_files
from fairseq_dsq.cli import blame
from fairseq_dsq.cost import load_profile
from fairseq_dsq.cost.profiles import FOLDER
from fairseq_dsq.report import benches, tables
from fairseq_dsq.report.benches import Bench
from fairseq_dsq.report.runs import Run, missing_extra, read_run
from fairseq_dsq.report.scores import GIVEN, scores, stale
from fairseq_dsq.report.significance import read_translations
from fairseq_dsq.report.tables import Table
from fairseq_dsq.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN",
        help="the folder of a run (its dsq.jsonl; output of fairseq-generate or sacreBLEU), a dsq.jsonl, or, of plain "
        "fairseq, a log of --log-format json or a folder with one",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", metavar="RUN", help="the run that differences refer to (default: the first in float)"
    )
    parser.add_argument(
        "--quality",
        action="append",
        default=[],
        metavar="RUN=VALUE",
        help="a run's quality, higher is better; repeatable",
    )
    parser.add_argument(
        "--profile", action="append", default=[], metavar="NAME",
        help=f"price the updates by this profile too: {', '.join(data_files.names(FOLDER))}, or the path of one's own; "
        "repeatable; needs the runs' checkpoints",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write table.md, .csv and .tex, figures as PNG and SVG, and index.html"
    )
    parser.add_argument(
        "--bench", type=Path, metavar="DIR", help="add what fairseq-dsq bench all --out DIR measured, as tables"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, unrounded, in place of the table")


def main(args: argparse.Namespace) -> int:
    with blame("--bench"):
        measured = benches.read(args.bench) if args.bench else ()
    runs, skipped = _read(args.runs)
    for path in (path for run in runs for path in stale(run)):
        skipped.append(printable(f"{path}: scored another checkpoint than the run's {artefact.BEST}"))
        print(f"fairseq-dsq report: skipped {skipped[-1]}", file=sys.stderr)
    found = [scores(run) for run in runs]
    for text in args.quality:
        index, value = _given(text, runs)
        found[index][GIVEN] = value
    baseline = None if args.baseline is None else _index("--baseline", args.baseline, runs)
    table = tables.make_table(runs, found, baseline, [read_translations(run) for run in runs])
    if args.profile:
        table = dataclasses.replace(table, priced=_priced(args.profile, runs, skipped))
    written = _write(args, table, runs, skipped, measured) if args.out else []
    if args.json:
        print(tables.to_json(table, runs, skipped, measured))
    else:
        print(tables.markdown(table) + benches.markdown(measured), end="")
    if written:
        print(
            ("" if args.json else "\n") + f"wrote {args.out}: {', '.join(written)}",
            file=sys.stderr if args.json else None,
        )
    return 0


def _read(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    runs, skipped = [], []
    seen = set()
    for path in paths:
        try:
            if path.resolve() in seen:
                raise ValueError(f"{path}: given twice")
            seen.add(path.resolve())
            runs.append(read_run(path))
        except (ValueError, OSError) as error:
            skipped.append(printable(str(error)))
            print(f"fairseq-dsq report: skipped {skipped[-1]}", file=sys.stderr)
    if not runs:
        raise ValueError(f"no run left: {len(skipped)} of {len(skipped)} skipped")
    return tables.tell_apart(runs), skipped


def _priced(
    names: Sequence[str], runs: Sequence[Run], skipped: list[str]
) -> dict[str, tuple[tuple[float, float] | None, ...]]:
    """By profile, the relative costs of each run; one that cannot be priced is named."""
    from fairseq_dsq.cli.repricing import reprice

    with blame("--profile"):
        profiles = {profile.name: profile for profile in map(load_profile, names)}
        if len(profiles) < len(names):
            raise ValueError(f"got {' '.join(names)}, expected profiles whose names differ: {', '.join(profiles)}")
    rows: list[list[tuple[float, float]] | None] = []
    for run in runs:
        try:
            rows.append(reprice(run, list(profiles.values())))
        except (ValueError, OSError) as error:
            rows.append(None)
            skipped.append(printable(str(error)))
            print(f"fairseq-dsq report: not priced: {skipped[-1]}", file=sys.stderr)
    return {name: tuple(None if row is None else row[index] for row in rows) for index, name in enumerate(profiles)}


def _index(flag: str, name: str, runs: Sequence[Run]) -> int:
    try:
        return tables.find(runs, name)
    except ValueError as error:
        raise ValueError(f"argument {flag}: {error}") from None


def _given(text: str, runs: Sequence[Run]) -> tuple[int, float]:
    name, _, value = text.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not name or not math.isfinite(number):
        raise ValueError(f"argument --quality: got {text!r}, expected RUN=VALUE with a finite number")
    return _index("--quality", name, runs), number


def _write(
    args: argparse.Namespace, table: Table, runs: Sequence[Run], skipped: Sequence[str], measured: Sequence[Bench]
) -> list[str]:
    """Write everything into the folder; returns the names of the files."""
    try:
        from fairseq_dsq.report import figures, html
    except ImportError as error:
        raise missing_extra(error) from None
    labels = [table.label(row) for row in table.rows]
    level = "; below, the precision level" if any(len(tables.levels(run)) > 1 for run in runs) else ""
    candidates = [
        ("loss", f"Validation loss (solid) and training loss (dashed){level}.",
         figures.loss_figure(runs, labels)),
        ("cost", "Arithmetic and DRAM traffic modelled up to the end of each epoch.",
         figures.cost_figure(runs, labels)),
        ("quality", "Quality against what the whole training cost; points on the dashed front are beaten by no other.",
         figures.pareto_figure(table, labels)),
    ]  # fmt: skip
    drawings = [html.Drawing(name, caption, figure) for name, caption, figure in candidates if figure is not None]
    texts = {
        "index.html": html.page(table, runs, drawings, skipped, _command(args), measured),
        "table.md": tables.markdown(table) + benches.markdown(measured),
        "table.csv": tables.csv_text(table),
        "table.tex": tables.tex(table),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (args.out / name).write_text(text, encoding="utf-8", errors="replace")
    images = [path.name for drawing in drawings for path in figures.save(drawing.figure, args.out, drawing.name)]
    return [*texts, *images]


def _command(args: argparse.Namespace) -> str:
    words = ["fairseq-dsq", "report", *map(str, args.runs)]
    if args.baseline is not None:
        words += ["--baseline", args.baseline]
    for text in args.quality:
        words += ["--quality", text]
    for name in args.profile:
        words += ["--profile", name]
    if args.user_dir is not None:
        words += ["--user-dir", args.user_dir]
    if args.bench is not None:
        words += ["--bench", str(args.bench)]
    return printable(shlex.join([*words, "--out", str(args.out)]))
