"""Modelled arithmetic and DRAM traffic of a precision setting, a trajectory of settings, or a model; and its memory."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tabulate import tabulate

from fairseq_dsq import data_files
from fairseq_dsq.cli import blame
from fairseq_dsq.cli.arguments import (
    add_format_argument,
    add_model_arguments,
    check_format,
    find_model,
    given_flags,
    refuse_idle,
    size_in_bytes,
)
from fairseq_dsq.cost import CostProfile, load_profile, pricing
from fairseq_dsq.cost.profiles import FOLDER
from fairseq_dsq.cost.published import compare
from fairseq_dsq.formats import FormatOptions
from fairseq_dsq.ledger import Update, Work
from fairseq_dsq.precision import FLOAT32, PrecisionConfig, parse_q
from fairseq_dsq.text import quoted

DEFAULT_LAYER = "4096x512x2048"
DEFAULT_PRECISION = "16,4,4,16"
DEFAULT_PROFILE = "paper"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--paper-table", action="store_true", help="the paper's printed numbers beside the profile's")
    what.add_argument(
        "--precision", metavar="Q",
        help=f"one setting q0,q1,q2,q3 (default: {DEFAULT_PRECISION}, or --dsq-levels in --flags)",
    )  # fmt: skip
    what.add_argument(
        "--trajectory", metavar="Q:EPOCHS ...", help="settings with their epochs, such as '2,2,2,16:12 16,4,4,16:3'"
    )
    add_format_argument(parser, default=None)
    parser.add_argument("--sign-bit", choices=("counted", "extra"), help="as --dsq-sign-bit (default: counted)")
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help=f"cost profile: {', '.join(data_files.names(FOLDER))}, or the path of one's own "
        f"(default: {DEFAULT_PROFILE})",
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
        profile = load_profile(args.profile or DEFAULT_PROFILE)
    _refuse_idle(args)
    if args.paper_table:
        return _paper_table(profile, args.json)
    spec = find_model(args, "--arch") if args.model else None
    given = given_flags(args, spec, format="dsq_format", sign_bit="dsq_sign_bit")
    levels = _levels(args, given)
    if args.memory:
        return _memory(args, spec, given, levels)
    work_at, described = _workload(args, spec, profile)
    result: dict[str, Any] = {"profile": profile.name, "format": levels[0].precision.format_name, "workload": described}
    if args.trajectory:
        steps = [(work_at(level), level.precision, level.epochs) for level in levels]
        result |= pricing.price_trajectory(profile, steps)
        text = _trajectory_text(result)
    else:
        priced = [pricing.price_level(profile, work_at(level), level.precision, details=bool(spec)) for level in levels]
        text = "\n\n".join(_setting_text({**result, **row}) for row in priced)
        result |= priced[0] if len(priced) == 1 else {"levels": priced}
    result["unpriced"] = profile.unpriced(level.precision for level in levels)
    said = profile.says_of_unpriced(level.precision for level in levels)
    print(json.dumps(result, indent=1) if args.json else "\n".join(filter(None, (text, said))))
    return 0


def _refuse_idle(args: argparse.Namespace) -> None:
    """Refuse arguments that have no effect beside the others."""
    of_model = ("tokens", "length", "vocabulary", "flags")
    if args.paper_table:
        if args.model or args.layer:
            raise ValueError("--paper-table: got a model beside it, expected none")
        others = ("format", "sign_bit", "memory", "fit", "forward_only", *of_model)
        refuse_idle(args, others, "beside --paper-table")
    if args.model:
        refuse_idle(args, ("layer",), "beside --arch")
    elif args.memory:
        raise ValueError("--memory: got no --arch beside it, expected one")
    else:
        refuse_idle(args, of_model, "without --arch")
    if args.memory:
        refuse_idle(args, ("forward_only", "profile"), "beside --memory")
    else:
        refuse_idle(args, ("fit",), "without --memory")


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


class _Level(NamedTuple):
    """What is to be priced: a precision, which of ``--dsq-levels`` it is, if any, and its epochs."""

    precision: PrecisionConfig
    number: int | None = None
    epochs: int = 1


def _levels(args: argparse.Namespace, given: Mapping[str, Any]) -> list[_Level]:
    """What is to be priced.

    Args:
        given: the flags of ``*_dsq`` architectures.
    """
    from fairseq_dsq.plugin.config import DSQConfig
    from fairseq_dsq.plugin.effects import levels_of, options_of

    flags: Any = DSQConfig(**given)
    trained: tuple[PrecisionConfig, ...] = ()
    if "dsq_levels" in given:
        if args.precision:
            raise ValueError(
                f"--precision: got {quoted(args.precision)} beside --dsq-levels in --flags, expected one of the two"
            )
        with blame("--flags: --dsq-levels"):
            trained = levels_of(flags)
        if not args.trajectory:
            return [_Level(level, number) for number, level in enumerate(trained)]
    default = str(FLOAT32) if flags.dsq_format == FLOAT32.format_name else DEFAULT_PRECISION
    how = flags.dsq_format, options_of(flags)
    if not args.trajectory:
        with blame("--precision"):
            return [_Level(_precision(args.precision or default, *how))]
    with blame("--trajectory"):
        levels = _parse(args.trajectory, *how)
        return _numbered(levels, trained, flags.dsq_levels) if trained else levels


def _numbered(levels: Sequence[_Level], trained: Sequence[PrecisionConfig], given: str) -> list[_Level]:
    """Each step of a trajectory with the number of the level that it equals; of several, with the next one's."""
    left = [(level.by_value, number) for number, level in enumerate(trained)]
    known = dict(reversed(left))
    found = []
    for level in levels:
        value = level.precision.by_value
        if value not in known:
            raise ValueError(f"got {level.precision}, expected one of --dsq-levels in --flags, {given}")
        number = next((number for other, number in left if other == value), known[value])
        left = [pair for pair in left if pair != (value, number)]
        found.append(level._replace(number=number))
    return found


def _parse(text: str, format_name: str, options: FormatOptions) -> list[_Level]:
    """The steps of ``Q:EPOCHS Q:EPOCHS ...``."""
    levels = []
    for piece in text.split():
        match = re.fullmatch(r"(.+):([0-9]{1,9})", piece)
        if match is None or int(match[2]) < 1:
            raise ValueError(f"got {quoted(piece)}, expected Q:EPOCHS such as 2,2,2,16:12")
        levels.append(_Level(_precision(match[1], format_name, options), epochs=int(match[2])))
    if not levels:
        raise ValueError("got nothing, expected Q:EPOCHS such as '2,2,2,16:12 16,4,4,16:3'")
    return levels


def _precision(text: str, format_name: str, options: FormatOptions) -> PrecisionConfig:
    try:
        return PrecisionConfig(parse_q(text), format_name, options)
    except ValueError as error:
        raise ValueError(f"{error} (--format {format_name})") from None


def _workload(
    args: argparse.Namespace, spec: Any, profile: CostProfile
) -> tuple[Callable[[_Level], Work], dict[str, Any]]:
    """What runs in a step at a level, and its description; a layer alone has no update."""
    if spec:
        from fairseq_dsq.plugin import probe

        described = _described(spec)
        updates: dict[Update, float] = {}
        if profile.prices_updates and not args.forward_only:
            from fairseq_dsq.plugin.footprint import Step

            step = Step(spec)
            updates[step.update] = 1 / step.batches_of_update
            described["optimizer"] = step.optimizer_name

        def trace(level: _Level) -> Work:
            work = probe.trace(spec, not args.forward_only, level.precision, level.number)
            work.updates = dict(updates)
            return work

        return trace, described
    text = args.layer or DEFAULT_LAYER
    match = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", text)
    if match is None:
        raise ValueError(f"--layer: got {quoted(text)}, expected MxKxN such as {DEFAULT_LAYER}")
    m, k, n = (int(size) for size in match.groups())
    layer = pricing.layer_work(m, k, n, training=not args.forward_only)
    return lambda level: layer.at_precision(level.precision), {"layer": text}


def _described(spec: Any) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in ("arch", "flags", "tokens", "length", "vocabulary")}


def _memory(args: argparse.Namespace, spec: Any, given: Mapping[str, Any], levels: Sequence[_Level]) -> int:
    """Print what a training step holds: of the float model, and at each level with each stash scope, or the given."""
    with blame("--fit"):
        limit = size_in_bytes(args.fit) if args.fit else None
    from fairseq_dsq.nn import STASH_SCOPES
    from fairseq_dsq.plugin import footprint

    scopes = (given["dsq_stash_scope"],) if "dsq_stash_scope" in given else STASH_SCOPES
    settings: list[tuple[str, str, Any, Any]] = []
    if not footprint.is_quantized(spec):
        settings.append(("float32", "", spec, None))
    with blame("--arch"):
        for level in levels:
            settings += [(str(level.precision), scope, footprint.quantized(spec, scope), level) for scope in scopes]
    rows = []
    for name, scope, own, level in settings:
        step = footprint.Step(own) if level is None else footprint.Step(own, level.precision, number=level.number)
        held = step.held(spec.batch)
        row = {"precision": name, "stash_scope": scope, **dataclasses.asdict(held), "total": held.total}
        if limit is not None:
            row["largest_batch"] = step.largest_batch(limit)
            row["largest_tokens"] = row["largest_batch"] * spec.length
        rows.append(row)
    described = {**_described(spec), "batch": spec.batch, "optimizer": step.optimizer_name}
    result: dict[str, Any] = {
        "format": levels[0].precision.format_name, "workload": described, "memory": rows,
    }  # fmt: skip
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
