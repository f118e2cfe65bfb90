"""One self-contained page: table, figures, epochs, benches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from fairseq_dsq.report import benches, tables
from fairseq_dsq.report.benches import Bench
from fairseq_dsq.report.figures import inline_svg
from fairseq_dsq.report.runs import Epoch, Run
from fairseq_dsq.report.tables import Table, fixed

TEMPLATE = "page.html.jinja"
_EPOCH_HEADER = (
    "Epoch", "Updates", "Level", "Train loss (bits)", "Valid loss (bits)", "Arithmetic", "DRAM", "Stash (MB)"
)  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """A figure with its file name (without suffix) and what it shows, in a sentence."""

    name: str
    caption: str
    figure: Figure


def page(
    table: Table,
    runs: Sequence[Run],
    drawings: Sequence[Drawing],
    skipped: Sequence[str],
    command: str,
    measured: Sequence[Bench] = (),
) -> str:
    """The page as text, without any reference to the outside."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE).render(
        header=tables.header(table),
        rows=[tables.cells(table, row) for row in table.rows],
        left=len(tables.header(table)) - len(table.metrics) - 2,
        notes=tables.all_notes(table),
        further=tables.further(table),
        benches=[
            {"name": bench.name, "what": bench.what, "lines": benches.lines(bench), "below": benches.below(bench)}
            for bench in measured
        ],
        drawings=[
            {"caption": each.caption, "svg": Markup(inline_svg(each.figure, each.name, each.caption))}
            for each in drawings
        ],
        epoch_header=_EPOCH_HEADER,
        runs=[
            {
                "name": run.name,
                "label": table.label(row),
                "path": str(run.path),
                "notes": row.notes,
                "epochs": [_epoch_cells(epoch) for epoch in run.epochs],
            }
            for run, row in zip(runs, table.rows, strict=True)
        ],
        skipped=skipped,
        command=command,
    )


def _epoch_cells(epoch: Epoch) -> list[str]:
    def text(value: float | None, digits: int, unit: float = 1.0) -> str:
        return "-" if value is None else fixed(value / unit, digits)

    whole_level = epoch.level is None or epoch.level == int(epoch.level)
    return [
        str(epoch.number),
        str(epoch.updates),
        text(epoch.level, 0 if whole_level else 2),
        text(epoch.train_loss, 3),
        text(epoch.valid_loss, 3),
        text(epoch.arithmetic_relative, 4),
        text(epoch.dram_relative, 3),
        text(epoch.stash_bytes, 2, 1e6),
    ]
