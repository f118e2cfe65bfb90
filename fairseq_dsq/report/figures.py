"""Figures of training runs: loss and level, cumulative cost, quality against cost.

The only module, with its siblings in ``report``, that imports matplotlib. Same input gives the same bytes:
:func:`save` and :func:`inline_svg` serve every figure of the package.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fairseq_dsq.report.runs import Epoch, Run
from fairseq_dsq.report.scores import METRICS
from fairseq_dsq.report.tables import Row, Table, levels

# Text, axes and grid: currentColor in a page. No other element may have this colour.
INK = "#1b1b1c"
# Okabe and Ito's colour-blind-safe palette, with others for its yellow and black (lost on white or on dark pages).
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#7a5cd6")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 4.8  # inches
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "figure.dpi": 100,
}
_POINT: dict[str, Any] = {"linestyle": "none", "markersize": 7, "markeredgecolor": INK, "markeredgewidth": 0.5}


@contextmanager
def style() -> Iterator[None]:
    """The look of the package's figures, from drawing to saving."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes in the PNG alone.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name.png`` and ``name.svg``, on white.

    Raises:
        OSError: the folder cannot be written to.
    """
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    with style():
        figure.savefig(png, dpi=200, facecolor="white", metadata={"Software": None})
    svg.write_text(_svg(figure, name, transparent=False), encoding="utf-8")
    return [png, svg]


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an ``<svg>`` element for a page: transparent, its ink in ``currentColor``, ids begin with ``name``.

    Args:
        label: what it shows, for those who do not see it.
    """
    text = _svg(figure, name, transparent=True)
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", text)
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text, count=1)
    escaped = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{escaped}"', 1)


def _svg(figure: Figure, name: str, transparent: bool) -> str:
    buffer = io.StringIO()
    with style(), matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=transparent,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return buffer.getvalue()


def loss_figure(runs: Sequence[Run], labels: Sequence[str]) -> Figure:
    """Training loss (dashed) and validation loss over epochs; below them the level of the runs that have several."""
    rising = [len(levels(run)) > 1 or any(epoch.level for epoch in run.epochs) for run in runs]
    with style():
        figure, axes = _panels(dict(enumerate(labels)), [2.6, 0.8] if any(rising) else [2.6])
        for index, run in enumerate(runs):
            look = _look(index)
            _curve(
                axes[0],
                run.epochs,
                lambda epoch: epoch.train_loss,
                color=look["color"],
                linestyle=(0, (3, 2)),
                alpha=0.7,
            )
            _curve(axes[0], run.epochs, lambda epoch: epoch.valid_loss, **look, markevery=_every(run))
            if rising[index]:
                _curve(
                    axes[1], run.epochs, lambda epoch: epoch.level, **look, drawstyle="steps-mid", markevery=_every(run)
                )
        axes[0].set_ylabel("loss (bits)")
        if any(rising):
            axes[1].set_ylabel("level")
            axes[1].yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
            axes[1].margins(y=0.25)
        _epoch_axis(axes[-1], runs)
        kinds = [
            Line2D([], [], color=INK, label="valid"),
            Line2D([], [], color=INK, linestyle=(0, (3, 2)), alpha=0.7, label="train"),
        ]
        axes[0].legend(handles=kinds, loc="upper right")
        _legend(figure, dict(enumerate(labels)))
    return figure


def cost_figure(runs: Sequence[Run], labels: Sequence[str]) -> Figure | None:
    """Arithmetic and DRAM traffic modelled up to each epoch's end; None without dsq metrics."""
    drawn = {i: labels[i] for i, run in enumerate(runs) if any(epoch.arithmetic is not None for epoch in run.epochs)}
    if not drawn:
        return None
    with style():
        figure, axes = _panels(drawn, [1.9, 1.9])
        quantities: list[tuple[str, Callable[[Epoch], float | None], float]] = [
            ("arithmetic (10⁹ MACs\nof 32-bit fixed point)", lambda epoch: epoch.arithmetic, 1e9),
            ("DRAM traffic (GB)", lambda epoch: epoch.dram_bytes, 1e9),
        ]
        for axis, (title, quantity, unit) in zip(axes, quantities, strict=True):
            ends = []
            for index, run in enumerate(runs):
                values = [
                    (epoch.number, value / unit) for epoch in run.epochs if (value := quantity(epoch)) is not None
                ]
                if not values:
                    continue
                numbers, costs = zip(*values, strict=True)
                sums = list(itertools.accumulate(costs))
                axis.plot(numbers, sums, **_look(index), markevery=_every(run))
                ends.append(sums[-1])
            if max(ends) > 5 * min(ends) > 0:
                axis.set_yscale("log")
                _plain_log(axis.yaxis)
            else:
                axis.set_ylim(bottom=0)
            axis.set_ylabel(title)
        _epoch_axis(axes[-1], runs)
        _legend(figure, drawn)
    return figure


def pareto_figure(table: Table, labels: Sequence[str]) -> Figure | None:
    """Quality against relative arithmetic and DRAM, the Pareto front drawn; None unless two runs have both."""
    metric = table.primary
    rows = [(i, row) for i, row in enumerate(table.rows) if row.arithmetic is not None and metric in row.scores]
    if metric is None or len(rows) < 2:
        return None
    drawn = {i: labels[i] for i, _ in rows}
    with style():
        figure, axes = _panels(drawn, [2.2, 2.2], share=False)
        costs: list[tuple[str, Callable[[Row], float]]] = [
            ("arithmetic, relative to 32-bit fixed point", lambda row: row.arithmetic or 0.0),
            ("DRAM traffic, relative to 32-bit fixed point", lambda row: row.dram or 0.0),
        ]
        for axis, (title, cost) in zip(axes, costs, strict=True):
            points = [(cost(row), row.scores[metric]) for _, row in rows]
            front = pareto_front(points, METRICS[metric].higher_is_better)
            xs, ys = zip(*(points[i] for i in front), strict=True)
            axis.plot(
                xs, ys, color=INK, alpha=0.5, linewidth=1, linestyle=(0, (4, 2)), drawstyle="steps-post", zorder=1
            )
            for (index, _), (x, y) in zip(rows, points, strict=True):
                axis.plot([x], [y], **_look(index), **_POINT)
            if max(x for x, _ in points) > 5 * min(x for x, _ in points):
                axis.set_xscale("log")
                _plain_log(axis.xaxis)
            axis.margins(0.1, 0.15)
            axis.set_xlabel(title)
            axis.set_ylabel(METRICS[metric].label.replace(" (", "\n("))
        axes[0].legend(
            handles=[Line2D([], [], color=INK, alpha=0.5, linewidth=1, linestyle=(0, (4, 2)), label="Pareto front")],
            loc="best",
        )
        _legend(figure, drawn, **_POINT)
    return figure


def pareto_front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[int]:
    """Indices of the (cost, quality) points that no other beats, by rising cost.

    A point is beaten by one that is no worse in both and better in one; of equal points the first stays.
    """
    sign = 1.0 if higher_is_better else -1.0
    front: list[int] = []
    best = float("-inf")
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1], i)):
        if sign * points[index][1] > best:
            best = sign * points[index][1]
            front.append(index)
    return front


def _look(index: int) -> dict[str, Any]:
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}


def _every(run: Run) -> int:
    return 1 + len(run.epochs) // 25


def _curve(axis: Axes, epochs: Sequence[Epoch], value: Callable[[Epoch], float | None], **look: Any) -> None:
    points = [(epoch.number, y) for epoch in epochs if (y := value(epoch)) is not None]
    axis.plot([x for x, _ in points], [y for _, y in points], **look)


def _plain_log(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _epoch_axis(axis: Axes, runs: Sequence[Run]) -> None:
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len({epoch.number for run in runs for epoch in run.epochs}) == 1:
        axis.set_xlim(runs[0].epochs[0].number - 1, runs[0].epochs[0].number + 1)


def _columns(drawn: Mapping[int, str]) -> int:
    longest = max(map(len, drawn.values()))
    return 1 if longest > 34 or len(drawn) == 1 else 2 if longest > 20 else 3


def _panels(drawn: Mapping[int, str], heights: Sequence[float], share: bool = True) -> tuple[Figure, list[Axes]]:
    """Panels one above the other, and below them room for a legend of what is drawn."""
    rows = -(-len(drawn) // _columns(drawn))
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.55 + 0.19 * rows), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=share, squeeze=False, height_ratios=list(heights))
    return figure, [row[0] for row in axes]


def _legend(figure: Figure, drawn: Mapping[int, str], **look: Any) -> None:
    handles = [Line2D([], [], **_look(i), **look, label=label) for i, label in drawn.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=_columns(drawn))
