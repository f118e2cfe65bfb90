"""Modelled arithmetic and DRAM traffic of a precision setting, a trajectory of settings, or a model."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from fairseq_dsq import data_files, formats
from fairseq_dsq.cli import blame
from fairseq_dsq.cost import Cost, CostProfile, load_profile, total_cost
from fairseq_dsq.cost.gemm import stash_bytes
from fairseq_dsq.cost.profiles import FOLDER
from fairseq_dsq.cost.published import FIXED16, compare
from fairseq_dsq.formats import FormatOptions
from fairseq_dsq.nn import FLOAT32, LedgerKey, StashKey, Work
from fairseq_dsq.precision import Gemm, PrecisionConfig, Stash, parse_q
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
    parser.add_argument("--format", default="bfp", metavar="NAME", help="number format: " + ", ".join(formats.names()))
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
    parser.add_argument("--forward-only", action="store_true", help="validation: no backward pass and no stash")
    parser.add_argument("--json", action="store_true", help="print JSON")


def check_format(name: str) -> None:
    """Refuse a ``--format`` that is not registered."""
    if name not in formats.names():
        raise ValueError(f"--format: got {quoted(name)}, expected one of {', '.join(formats.names())}")


def add_model_arguments(parser: argparse.ArgumentParser, flag: str, default: str | None = None) -> None:
    """What :func:`find_model` reads: which model, and its batch."""
    parser.add_argument(
        flag,
        dest="model",
        default=default,
        metavar="NAME",
        help=f"{', '.join(data_files.names('models'))}, the path of a file of one's own, or a fairseq architecture"
        + (f" (default: {default})" if default else ""),
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens of a batch (default: the model file's)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a sentence (default: the model file's)")
    parser.add_argument("--vocabulary", type=int, metavar="N", help="entries of the dictionary (default: likewise)")
    parser.add_argument("--flags", metavar="FLAGS", help="of fairseq-train, such as '--encoder-layers 12'")


def find_model(args: argparse.Namespace, flag: str) -> Any:
    """The :class:`fairseq_dsq.plugin.probe.ModelSpec` that the arguments ask for."""
    import dataclasses

    from fairseq_dsq.plugin import probe

    with blame(flag):
        spec = probe.find_model(args.model)
    given = {name: getattr(args, name) for name in ("tokens", "length", "vocabulary")}
    changes = {name: value for name, value in given.items() if value is not None}
    if args.flags:
        changes["flags"] = f"{spec.flags} {args.flags}"
    try:
        return dataclasses.replace(spec, **changes)
    except ValueError as error:  # begins with the field's name, which is the flag's
        raise ValueError(f"--{error}") from None


def main(args: argparse.Namespace) -> int:
    check_format(args.format)
    with blame("--profile"):
        profile = load_profile(args.profile)
    if args.paper_table:
        if args.model or args.layer:
            raise ValueError("--paper-table: got a model beside it, expected none")
        return _paper_table(profile, args.json)
    work, described = _workload(args)
    options = FormatOptions(sign_bit_extra=args.sign_bit == "extra")
    with blame("--trajectory" if args.trajectory else "--precision"):
        levels = _levels(args.trajectory or f"{args.precision or DEFAULT_PRECISION}:1", args.format, options)
    costs = [_price(profile, work.at_precision(precision)) for precision, _ in levels]
    result: dict[str, Any] = {"profile": profile.name, "format": args.format, "workload": described}
    if args.trajectory:
        result |= _trajectory(profile, work, levels, costs)
        text = _trajectory_text(result)
    else:
        priced = work.at_precision(levels[0][0])
        result |= {"precision": list(levels[0][0].q), **_relative(costs[0]), **_below_fixed16(profile, work, costs[0])}
        result |= _absolute(priced, costs[0])
        if args.model:
            result |= {"layers": _by_layer(profile, priced), "gemms": _by_gemm(profile, priced)}
        text = _setting_text(result)
    print(json.dumps(result, indent=1) if args.json else text)
    return 0


def _trajectory(
    profile: CostProfile, work: Work, levels: list[tuple[PrecisionConfig, int]], costs: list[Cost]
) -> dict[str, Any]:
    epochs = sum(count for _, count in levels)
    total = sum((cost * count for cost, (_, count) in zip(costs, levels, strict=True)), Cost())
    rows = [
        {"precision": list(precision.q), "epochs": count, **_relative(cost)}
        for cost, (precision, count) in zip(costs, levels, strict=True)
    ]
    return {
        "trajectory": rows,
        "epochs": epochs,
        **_relative(total),
        **_below_fixed16(profile, work, total * (1 / epochs)),
    }


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


def _workload(args: argparse.Namespace) -> tuple[Work, dict[str, Any]]:
    """What runs in a step, and its description."""
    if args.model:
        if args.layer:
            raise ValueError("--layer: got it beside --arch, expected one of the two")
        from fairseq_dsq.plugin import probe

        spec = find_model(args, "--arch")
        described = {"arch": spec.arch, "flags": spec.flags, "tokens": spec.tokens, "length": spec.length,
                     "vocabulary": spec.vocabulary}  # fmt: skip
        return probe.trace(spec, training=not args.forward_only), described
    text = args.layer or DEFAULT_LAYER
    match = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", text)
    if match is None:
        raise ValueError(f"--layer: got {quoted(text)}, expected MxKxN such as {DEFAULT_LAYER}")
    m, k, n = (int(size) for size in match.groups())
    gemms = [Gemm("output", m, k, n)]
    stashes: Counter[StashKey] = Counter()
    if not args.forward_only:
        gemms += [Gemm("grad_input", m, n, k), Gemm("grad_weight", k, m, n)]
        stashes[StashKey(Stash("input", (m, k), 0), FLOAT32)] = 1
    return Work(Counter(LedgerKey(gemm, FLOAT32, not args.forward_only) for gemm in gemms), stashes), {"layer": text}


def _title(result: Mapping[str, Any]) -> str:
    workload = ", ".join(f"{key} {value}" for key, value in result["workload"].items() if value != "")
    return f"{result['format']}, profile {result['profile']}, {workload}"


def _price(profile: CostProfile, work: Work) -> Cost:
    return total_cost(profile, work.gemms.items(), work.stashes.items())


def _relative(cost: Cost) -> dict[str, float]:
    return {"arithmetic_relative": cost.arithmetic_relative, "dram_relative": cost.dram_relative}


def _below_fixed16(profile: CostProfile, work: Work, cost: Cost) -> dict[str, float]:
    fixed = _price(profile, work.at_precision(FIXED16))
    return {
        "arithmetic_below_fixed16": fixed.arithmetic / cost.arithmetic,
        "dram_below_fixed16": fixed.dram_bytes / cost.dram_bytes,
    }


def _below_text(result: Mapping[str, Any]) -> str:
    arithmetic, dram = result["arithmetic_below_fixed16"], result["dram_below_fixed16"]
    return f"below 16-bit fixed point: arithmetic {arithmetic:.2f}x, DRAM {dram:.2f}x"


def _absolute(work: Work, cost: Cost) -> dict[str, float]:
    stash = sum(stash_bytes(key.stash, key.precision) * count for key, count in work.stashes.items())
    return {
        "macs": int(cost.arithmetic_baseline),
        "arithmetic": cost.arithmetic,
        "dram_bytes": cost.dram_bytes,
        "stash_bytes": stash,
        "macs_per_byte": cost.arithmetic_baseline / cost.dram_bytes,
    }


def _by_layer(profile: CostProfile, work: Work) -> list[dict[str, Any]]:
    """One row per module, in the order in which they first ran."""
    parts: defaultdict[str, Work] = defaultdict(Work)
    for key, count in work.gemms.items():
        parts[key.scope].gemms[key] += count
    for stash, count in work.stashes.items():
        parts[stash.scope].stashes[stash] += count
    return [{"layer": scope, **_absolute(part, _price(profile, part))} for scope, part in parts.items()]


def _by_gemm(profile: CostProfile, work: Work) -> list[dict[str, Any]]:
    """One row per kind and shape, the most MACs first; writing stashes belongs to none of them."""
    counts: Counter[LedgerKey] = Counter()
    for key, count in work.gemms.items():
        counts[key._replace(scope="")] += count
    rows = []
    for (gemm, precision, training, _), count in counts.items():
        cost = profile.gemm(gemm, precision, training) * count
        rows.append(
            {
                "kind": gemm.kind, "m": gemm.m, "k": gemm.k, "n": gemm.n, "batch": gemm.batch, "times": count,
                "macs": gemm.macs * count, "arithmetic": cost.arithmetic, "dram_bytes": cost.dram_bytes,
                "macs_per_byte": cost.arithmetic_baseline / cost.dram_bytes,
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: -int(row["macs"]))


def _table(rows: list[dict[str, Any]]) -> str:
    def cell(key: str, value: Any) -> Any:
        return f"{value:,.0f}" if key in ("macs", "arithmetic", "dram_bytes", "stash_bytes") else value

    cells = [[cell(key, value) for key, value in row.items()] for row in rows]
    aligned = ["left" if isinstance(value, str) else "right" for value in rows[0].values()]
    return str(tabulate(cells, [key.replace("_", " ") for key in rows[0]], floatfmt=".1f", colalign=aligned))
