"""Modelled arithmetic and DRAM traffic of a precision setting, a trajectory of settings, or a model; and its memory."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from fairseq_dsq import data_files
from fairseq_dsq.cli import blame
from fairseq_dsq.cli.arguments import add_format_argument, add_model_arguments, check_format, find_model, size_in_bytes
from fairseq_dsq.cost import CostProfile, load_profile, pricing
from fairseq_dsq.cost.profiles import FOLDER
from fairseq_dsq.cost.published import compare
from fairseq_dsq.formats import FormatOptions
from fairseq_dsq.ledger import Update, Work
from fairseq_dsq.precision import PrecisionConfig, parse_q
from fairseq_dsq.text import quoted

DEFAULT_LAYER = "4096x512x2048"
DEFAULT_PRECISION = "16,4,4,16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--paper-table", action="store_true", help="the paper's printed numbers beside the profile's")
    what.add_argument("--precision", metavar="Q", help=f"one setting q0,q1,q2,q3 (default: {DEFAULT_PRECISION})")
    what.add_argument(
        "--trajectory", metavar="Q:EPOCHS ...", help="settings with their epochs, such as '2,2,2,16:12 16,4,4,16:3'"
    )
    add_format_argument(parser)
    parser.add_argument(
        "--sign-bit", choices=("counted", "extra"), default="counted", help="as --dsq-sign-bit (default: counted)"
    )
    parser.add_argument(
        "--profile",
        default="paper",
        metavar="NAME",
        help=f"cost profile: {', '.join(data_files.names(FOLDER))}, or the path of one's own (default: paper)",
    )
    parser.add_argument(
        "--layer",
        metavar="MxKxN",
        help=f"a linear layer of M rows, K inputs, N outputs stands for the model (default: {DEFAULT_LAYER})",
    )
    add_model_arguments(parser, "--arch")
    parser.add_argument("--memory", action="store_true", help="what a training step of --arch holds, by part")
    parser.add_argument(
        "--fit", metavar="SIZE", help="with --memory: the largest batch that fits in so much, such as 16GB or 16GiB"
    )
    parser.add_argument("--forward-only", action="store_true", help="validation: no backward pass and no stash")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    check_format(args.format)
    with blame("--profile"):
        profile = load_profile(args.profile)
    if args.paper_table:
        if args.model or args.layer:
            raise ValueError("--paper-table: got a model beside it, expected none")
        return _paper_table(profile, args.json)
    options = FormatOptions(sign_bit_extra=args.sign_bit == "extra")
    with blame("--trajectory" if args.trajectory else "--precision"):
        levels = _levels(args.trajectory or f"{args.precision or DEFAULT_PRECISION}:1", args.format, options)
    if args.memory or args.fit:
        return _memory(args, [level for level, _ in levels])
    work_at, described = _workload(args, profile)
    result: dict[str, Any] = {"profile": profile.name, "format": args.format, "workload": described}
    if args.trajectory:
        result |= pricing.price_trajectory(profile, [(work_at(level), level, count) for level, count in levels])
    else:
        (level, _), *_ = levels
        result |= pricing.price_level(profile, work_at(level), level, details=bool(args.model))
    result["unpriced"] = profile.unpriced(level for level, _ in levels)
    said = profile.says_of_unpriced(level for level, _ in levels)
    text = _trajectory_text if args.trajectory else _setting_text
    print(json.dumps(result, indent=1) if args.json else "\n".join(filter(None, (text(result), said))))
    return 0


def _trajectory_text(result: Mapping[str, Any]) -> str:
    rows = [*result["trajectory"], {**result, "precision": "all"}]
    keys = ("precision", "epochs", "arithmetic_relative", "dram_relative")
    cells = [[str(row["precision"]).replace(" ", ""), *(row[key] for key in keys[1:])] for row in rows]
    table = tabulate(cells, ("precision", "epochs", "arithmetic", "DRAM"), floatfmt=".4f")
    return f"{_title(result)}\n{table}\n{_below_text(result)}"


def _setting_text(result: Mapping[str, Any]) -> str:
    lines = [
        f"[{','.join(map(str, result['precision']))}]: {_title(result)}",
        f"relative to 32-bit fixed point: arithmetic {result['arithmetic_relative']:.4f}, "
        f"DRAM {result['dram_relative']:.4f}",
        _below_text(result),
    ]
    if "layers" in result:
        lines += ["", "per layer", _table(result["layers"]), "", "per GEMM (MxK @ KxN => MxN, batch times)"]
        lines += [_table(result["gemms"]), ""]
    if "update_dram_bytes" in result:
        lines.append(f"{result['update_dram_bytes']:,.0f} bytes of DRAM traffic are the update's")
    lines.append(
        f"{result['macs']:,} MACs, {result['dram_bytes']:,.0f} bytes of DRAM traffic, {result['stash_bytes']:,} bytes "
        f"of stash, {result['macs_per_byte']:.1f} MACs per byte"
    )
    return "\n".join(lines)


def _paper_table(profile: CostProfile, as_json: bool) -> int:
    rows = compare(profile)
    verdicts = ["equal" if row.equal else "misfit" for row in rows]
    if as_json:
        records = [
            {
                "where": row.where, "method": row.method, "arithmetic_printed": row.arithmetic[0],
                "arithmetic": row.arithmetic[1], "dram_printed": row.dram[0], "dram": row.dram[1],
                "equal": row.equal, "misfit": row.misfit,
            }
            for row in rows
        ]  # fmt: skip
        print(json.dumps({"profile": profile.name, "rows": records}, indent=1))
        return 0
    cells = [
        (row.where, row.method, *row.arithmetic, *row.dram, verdict + (f": {row.misfit}" if row.misfit else ""))
        for row, verdict in zip(rows, verdicts, strict=True)
    ]
    headers = ("where", "setting", "arithmetic: paper", "ours", "DRAM: paper", "ours", "")
    print(tabulate(cells, headers, disable_numparse=True))
    print(f"\n{verdicts.count('equal')} rows equal, {verdicts.count('misfit')} misfits (profile {profile.name})")
    return 0


def _levels(text: str, format_name: str, options: FormatOptions) -> list[tuple[PrecisionConfig, int]]:
    """(precision, epochs) of ``Q:EPOCHS Q:EPOCHS ...``."""
    levels = []
    for piece in text.split():
        match = re.fullmatch(r"(.+):([0-9]{1,9})", piece)
        if match is None or int(match[2]) < 1:
            raise ValueError(f"got {quoted(piece)}, expected Q:EPOCHS such as 2,2,2,16:12")
        try:
            levels.append((PrecisionConfig(parse_q(match[1]), format_name, options), int(match[2])))
        except ValueError as error:
            raise ValueError(f"{error} (--format {format_name})") from None
    if not levels:
        raise ValueError("got nothing, expected Q:EPOCHS such as '2,2,2,16:12 16,4,4,16:3'")
    return levels


def _workload(
    args: argparse.Namespace, profile: CostProfile
) -> tuple[Callable[[PrecisionConfig], Work], dict[str, Any]]:
    """What runs in a step at a level, and its description; a layer alone has no update."""
    if args.model:
        if args.layer:
            raise ValueError("--layer: got it beside --arch, expected one of the two")
        from fairseq_dsq.plugin import probe

        spec = find_model(args, "--arch")
        described = _described(spec)
        updates: dict[Update, float] = {}
        if profile.prices_updates and not args.forward_only:
            from fairseq_dsq.plugin.footprint import Step

            step = Step(spec)
            updates[step.update] = 1 / step.batches_of_update
            described["optimizer"] = step.optimizer_name

        def trace(level: PrecisionConfig) -> Work:
            work = probe.trace(spec, not args.forward_only, level)
            work.updates = dict(updates)
            return work

        return trace, described
    text = args.layer or DEFAULT_LAYER
    match = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", text)
    if match is None:
        raise ValueError(f"--layer: got {quoted(text)}, expected MxKxN such as {DEFAULT_LAYER}")
    m, k, n = (int(size) for size in match.groups())
    return pricing.layer_work(m, k, n, training=not args.forward_only).at_precision, {"layer": text}


def _described(spec: Any) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in ("arch", "flags", "tokens", "length", "vocabulary")}


def _memory(args: argparse.Namespace, levels: Sequence[PrecisionConfig]) -> int:
    """Print what a training step holds: of the float model, and at each level with each stash scope."""
    if not args.memory:
        raise ValueError("--fit: got it without --memory, expected it beside that")
    if not args.model:
        raise ValueError("--memory: got no --arch beside it, expected one")
    if args.layer or args.forward_only:
        raise ValueError(f"{'--layer' if args.layer else '--forward-only'}: got it beside --memory, expected none")
    with blame("--fit"):
        limit = size_in_bytes(args.fit) if args.fit else None
    from fairseq_dsq.nn import STASH_SCOPES
    from fairseq_dsq.plugin import footprint

    spec = find_model(args, "--arch")
    settings: list[tuple[str, str, Any, Any]] = []
    if not footprint.is_quantized(spec):
        settings.append(("float32", "", spec, None))
    with blame("--arch"):
        for level in levels:
            settings += [(str(level), scope, footprint.quantized(spec, scope), level) for scope in STASH_SCOPES]
    rows = []
    for name, scope, own, level in settings:
        step = footprint.Step(own, level)
        held = step.held(spec.batch)
        row = {"precision": name, "stash_scope": scope, **dataclasses.asdict(held), "total": held.total}
        if limit is not None:
            row["largest_batch"] = step.largest_batch(limit)
            row["largest_tokens"] = row["largest_batch"] * spec.length
        rows.append(row)
    described = {**_described(spec), "batch": spec.batch, "optimizer": step.optimizer_name}
    result = {"format": args.format, "workload": described, "memory": rows}
    if limit is not None:
        result["fit"] = limit
    print(json.dumps(result, indent=1) if args.json else _memory_text(result))
    return 0


def _memory_text(result: Mapping[str, Any]) -> str:
    workload = ", ".join(f"{key} {value}" for key, value in result["workload"].items() if value != "")
    sizes = ("weights", "gradients", "states", "stash", "saved", "total")
    counts = ("largest_batch", "largest_tokens") if "fit" in result else ()
    cells = [
        [row["precision"].replace(" ", ""), row["stash_scope"], *(f"{row[size] / 1e6:,.1f}" for size in sizes)]
        + [f"{row[count]:,}" for count in counts]
        for row in result["memory"]
    ]
    headers = ["precision", "scope", *sizes, *(count.replace("_", " ") for count in counts)]
    aligned = ("left", "left", *["right"] * (len(headers) - 2))
    fit = f"; the largest batch (sentences, tokens) that fits in {result['fit']:,} bytes" if counts else ""
    return (
        f"{result['format']}, {workload}\nMB (10^6 bytes) that a training step holds{fit}\n"
        f"{tabulate(cells, headers, colalign=aligned, disable_numparse=True)}\n"
        "saved: what autograd keeps for backward beside the stash, as on a CPU. Not counted: what comes and goes\n"
        "within an operation, gradients of activations, tables of positions, workspaces, what allocators take"
    )


def _title(result: Mapping[str, Any]) -> str:
    workload = ", ".join(f"{key} {value}" for key, value in result["workload"].items() if value != "")
    return f"{result['format']}, profile {result['profile']}, {workload}"


def _below_text(result: Mapping[str, Any]) -> str:
    arithmetic, dram = result["arithmetic_below_fixed16"], result["dram_below_fixed16"]
    return f"below 16-bit fixed point: arithmetic {arithmetic:.2f}x, DRAM {dram:.2f}x"


def _table(rows: list[dict[str, Any]]) -> str:
    def cell(key: str, value: Any) -> Any:
        return f"{value:,.0f}" if key in ("macs", "arithmetic", "dram_bytes", "stash_bytes") else value

    cells = [[cell(key, value) for key, value in row.items()] for row in rows]
    aligned = ["left" if isinstance(value, str) else "right" for value in rows[0].values()]
    return str(tabulate(cells, [key.replace("_", " ") for key in rows[0]], floatfmt=".1f", colalign=aligned))
