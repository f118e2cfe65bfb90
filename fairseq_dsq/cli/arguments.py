"""The arguments that several commands share: which model, which format, fairseq's own."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fairseq_dsq import data_files, formats
from fairseq_dsq.cli import blame
from fairseq_dsq.text import quoted


def add_format_argument(parser: argparse.ArgumentParser, default: str | None = "bfp") -> None:
    text = f"number format: {', '.join(formats.names())} (default: {default or 'bfp, or --dsq-format in --flags'})"
    parser.add_argument("--format", default=default, metavar="NAME", help=text)


def check_format(name: str | None) -> None:
    """Refuse a ``--format`` that is not registered."""
    if name is not None and name not in formats.names():
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
    parser.add_argument("--flags", metavar="FLAGS", help="of fairseq-train: --flags='--encoder-layers 12'")


def find_model(args: argparse.Namespace, flag: str) -> Any:
    """The :class:`fairseq_dsq.plugin.probe.ModelSpec` that the arguments ask for."""
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


def given_flags(args: argparse.Namespace, spec: Any, **own: str) -> dict[str, Any]:
    """The flags of ``*_dsq`` architectures that ``--flags`` gives, and those that the command's ``own`` stand for.

    Args:
        spec: the model; None where there is none, and no ``--flags``.
        own: an argument of the command, and the flag that it stands for.

    Raises:
        ValueError: both are given; or rules, whose q that are bits follow ``--flags``.
    """
    from fairseq_dsq.plugin import probe
    from fairseq_dsq.plugin.config import option

    given = {} if spec is None else probe.given_flags(spec)
    for name, flag in own.items():
        if (value := getattr(args, name)) is None:
            continue
        if beside := [other for other in (flag, "dsq_rules") if other in given]:
            raise ValueError(
                f"{option(name)}: got {value} beside {option(beside[0])} in --flags, expected {option(flag)} there"
            )
        given[flag] = value
    return given


def refuse_idle(args: argparse.Namespace, names: Sequence[str], where: str) -> None:
    """Refuse arguments that have no effect, to say it: ``where`` is such as ``without --arch``."""
    for name in names:
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')}: got it {where}, expected none")


_UNITS = {f"{prefix}{ending}": base**power for power, prefix in enumerate("KMGT", 1)
          for ending, base in (("", 1000), ("B", 1000), ("i", 1024), ("iB", 1024))}  # fmt: skip


def size_in_bytes(text: str) -> int:
    """Bytes of ``16GB`` (16 * 10^9), ``16G`` (the same) or ``16GiB`` (16 * 2^30)."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)([KMGT]i?B?)?", text)
    size = int(float(match[1]) * _UNITS.get(match[2], 1)) if match else 0
    if size < 1:
        raise ValueError(f"got {quoted(text)}, expected a size such as 16GB (16 * 10^9 bytes) or 16GiB (16 * 2^30)")
    return size


def add_flags_argument(parser: argparse.ArgumentParser, summary: str) -> None:
    """The arguments of a command of fairseq: the last to be added, it takes all that follows."""
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="-- DATA FLAGS", help=f"arguments of {summary}")


def call_fairseq(args: argparse.Namespace, call: Callable[[list[str]], float | None]) -> int:
    """Print what ``call`` returns for fairseq's arguments; a command of fairseq that failed has its say, and code 1."""
    from fairseq_dsq.recipes.fairseq_command import FailedError

    try:
        found = call(args.flags[1:] if args.flags[:1] == ["--"] else args.flags)
    except FailedError as error:
        print(error, file=sys.stderr)
        return 1
    if found is not None:
        print(found)
    return 0
