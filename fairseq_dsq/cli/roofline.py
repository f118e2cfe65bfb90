"""What bounds a training step, arithmetic or memory, by the Roofline model; draws the paper's Figure 1."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tabulate import tabulate

from fairseq_dsq import data_files
from fairseq_dsq.cli import blame
from fairseq_dsq.cli.arguments import add_format_argument, add_model_arguments, check_format, find_model
from fairseq_dsq.cost.hardware import FOLDER, Hardware, load_hardware, measure
from fairseq_dsq.cost.pricing import STASHING, Step, price_settings
from fairseq_dsq.cost.published import roofline_table
from fairseq_dsq.cost.roofline import Group, shares, total
from fairseq_dsq.precision import PrecisionConfig, parse_levels

DEFAULT_MODEL, DEFAULT_HARDWARE, DEFAULT_LEVELS = "opt-1.3b", "a100-sxm-80gb", "[2,2,2,16] [16,4,4,16]"
PUBLISHED_MODEL = "opt-1.3b"
MEASURE = "measure"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, "--model", default=DEFAULT_MODEL)
    parser.add_argument(
        "--hardware",
        default=DEFAULT_HARDWARE,
        metavar="NAME",
        help=f"{', '.join(data_files.names(FOLDER))}, the path of a file of one's own, or {MEASURE}: this machine's "
        f"CPU (default: {DEFAULT_HARDWARE})",
    )
    parser.add_argument(
        "--save-hardware", type=Path, metavar="FILE", help="write the hardware as a file for --hardware"
    )
    add_format_argument(parser)
    parser.add_argument(
        "--levels", default=DEFAULT_LEVELS, metavar="LEVELS", help=f"DSQ's levels (default: '{DEFAULT_LEVELS}')"
    )
    parser.add_argument(
        "--float-bits",
        type=int,
        choices=(16, 32),
        default=16,
        help="width of floats: of everything without quantization, and of what is not a GEMM (default: 16)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="draw roofline.png and roofline.svg there")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _load(name: str) -> Hardware:
    try:
        data_files.find(FOLDER, name)
    except ValueError as error:
        raise ValueError(f"{error}, or {MEASURE}") from None
    return load_hardware(name)


def main(args: argparse.Namespace) -> int:
    check_format(args.format)
    with blame("--hardware"):
        hardware = measure() if args.hardware == MEASURE else _load(args.hardware)
    if args.save_hardware:
        args.save_hardware.write_text(OmegaConf.to_yaml(dataclasses.asdict(hardware)), encoding="utf-8")
    try:
        PrecisionConfig(STASHING, args.format)
    except ValueError:
        raise ValueError(
            f"--format: got {args.format}, expected one of any width, such as bfp: settings of 16 and 4 bits stand "
            "beside the levels"
        ) from None
    with blame("--levels"):
        levels = parse_levels(args.levels, args.format)
    spec = find_model(args, "--model")
    from fairseq_dsq.plugin import probe

    work = probe.trace(spec)
    with blame("--model"):
        elements = probe.traffic(spec)
    rows = price_settings(work, elements, levels, args.format, hardware, args.float_bits)
    published = roofline_table() if args.model == PUBLISHED_MODEL else {}
    batch = f"{args.model}, {spec.tokens} tokens in sequences of {spec.length}"
    if args.json:
        print(json.dumps(_as_json(args, spec, hardware, rows, published), indent=1))
    else:
        print(f"one training step of {batch}, {hardware.name}")
        print(f"floats of {args.float_bits} bits; {hardware.source}\n")
        print(tabulate(*_table(rows), floatfmt=".2f", disable_numparse=[1]))
        if published:
            print("\nThe paper's Table 7 beside the unquantized step:")
            headers = ("group", "paper: share %", "bound", "ours: share %", "bound", "")
            print(tabulate(_beside(rows[0][2], published), headers, floatfmt=".2f"))
    if args.out:
        from fairseq_dsq.report.roofline import draw

        points = [(f"{label} {precision}", total(groups)) for label, precision, groups in rows]
        for path in draw(hardware, points, f"{batch}\n{hardware.name}", args.out):
            print(f"wrote {path}", file=sys.stderr if args.json else None)
    return 0


def _table(rows: list[Step]) -> tuple[list[list[Any]], list[str]]:
    cells: list[list[Any]] = []
    for label, precision, groups in rows:
        for group, share in zip(groups, shares(groups), strict=True):
            cells.append([label, str(precision), group.name, group.intensity, group.macs_per_s / 1e12, group.bound,
                          1e3 * group.latency_s, share])  # fmt: skip
            label = ""
    headers = ["setting", "precision", "group", "MACs/byte", "attainable TMAC/s", "bound", "ms", "share %"]
    return cells, headers


def _beside(groups: list[Group], published: dict[str, tuple[float, str]]) -> list[tuple[Any, ...]]:
    rows = []
    for group, share in zip(groups, shares(groups), strict=True):
        printed, bound = published[group.name]
        rows.append((group.name, printed, bound, share, group.bound, "equal" if bound == group.bound else "differs"))
    return rows


def _as_json(
    args: argparse.Namespace,
    spec: Any,
    hardware: Hardware,
    rows: list[Step],
    published: dict[str, tuple[float, str]],
) -> dict[str, Any]:
    settings = []
    for label, precision, groups in rows:
        records = [
            {
                "group": group.name, "macs": group.macs, "dram_bytes": group.dram_bytes,
                "macs_per_byte": group.macs / group.dram_bytes, "macs_per_s": group.macs_per_s, "bound": group.bound,
                "latency_s": group.latency_s, "share": share / 100,
            }
            for group, share in zip(groups, shares(groups), strict=True)
        ]  # fmt: skip
        settings.append({"setting": label, "precision": list(precision.q), "groups": records})
    return {
        "model": args.model, "tokens": spec.tokens, "length": spec.length, "float_bits": args.float_bits,
        "hardware": dataclasses.asdict(hardware), "settings": settings,
        "paper_table_7": {name: {"share": share / 100, "bound": bound} for name, (share, bound) in published.items()},
    }  # fmt: skip
