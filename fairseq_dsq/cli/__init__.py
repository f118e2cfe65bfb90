"""The console script ``fairseq-dsq``: one module of this package per subcommand.

A module offers ``add_arguments(parser)`` and ``main(args) -> int``; its docstring's first line is its help.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def blame(flag: str) -> Iterator[None]:
    """Put the name of a flag in front of the errors that its value causes."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


SUBCOMMANDS = (
    "average", "bench", "convert_hf", "corpus", "cost", "epochs", "export_float", "glue_evaluate", "glue_flags",
    "glue_prepare", "report", "roofline", "run_train", "run_translate", "translation_prepare",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code. Bad input ends in one line on standard error and code 2."""
    parser = argparse.ArgumentParser(prog="fairseq-dsq", description="Tools of fairseq_dsq.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in SUBCOMMANDS:
        module = importlib.import_module(f"fairseq_dsq.cli.{name}")
        summary = (module.__doc__ or "").strip().splitlines()[0]
        command = commands.add_parser(name.replace("_", "-"), help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except BrokenPipeError:  # into head, say: whoever reads has seen enough
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"fairseq-dsq {args.command}: error: {error}", file=sys.stderr)
        return 2
