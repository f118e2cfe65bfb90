"""The paper's Figure 1: settings under the roof of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from fairseq_dsq.cost.hardware import Hardware
from fairseq_dsq.cost.roofline import Group
from fairseq_dsq.report.figures import INK, MARKERS, PALETTE, WIDTH, save, style

NAME = "roofline"


def draw(hardware: Hardware, points: Sequence[tuple[str, Group]], title: str, folder: Path) -> list[Path]:
    """Write ``roofline.png`` and ``roofline.svg``: one roof per width of operands, one point per setting.

    Args:
        hardware: gives the roofs.
        points: (label, all of a step's operators).
        title: above the axes.
        folder: where to write; made if missing.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    intensities = [group.intensity for _, group in points]
    ridges = [hardware.macs_per_s(bits) / hardware.bytes_per_s for bits in hardware.tera_ops_per_s]
    low, high = min(*intensities, *ridges) / 4, max(*intensities, *ridges) * 4
    with style():
        figure = Figure(figsize=(WIDTH, 0.72 * WIDTH), layout="constrained")
        axes = figure.add_subplot()
        x = np.geomspace(low, high, 256)
        for bits in sorted(hardware.tera_ops_per_s, reverse=True):
            peak = hardware.macs_per_s(bits)
            axes.plot(x, np.minimum(peak, x * hardware.bytes_per_s) / 1e12, color=INK, linewidth=0.9, alpha=0.6)
            axes.annotate(f"{bits} bits", (high, peak / 1e12), ha="right", va="bottom", fontsize=7)
        for index, (label, group) in enumerate(points):
            axes.plot(
                group.intensity,
                group.macs_per_s / 1e12,
                linestyle="none",
                marker=MARKERS[index % len(MARKERS)],
                color=PALETTE[index % len(PALETTE)],
                markersize=7,
                label=label,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("arithmetic intensity (MACs per byte of DRAM traffic)")
        axes.set_ylabel("attainable performance (TMAC/s)")
        axes.set_title(title, fontsize=8)
        axes.legend(loc="upper left", fontsize=8)
        return save(figure, folder, NAME)
