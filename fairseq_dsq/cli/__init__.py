"""The console script ``fairseq-dsq``: one module of this package per subcommand, imported when it is called.

A module offers ``add_arguments(parser)`` and ``main(args) -> int``; its docstring's first line is its help.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

# The exit code after Ctrl-C, as a shell's.
INTERRUPTED = 130


@contextlib.contextmanager
def blame(flag: str) -> Iterator[None]:
    """Put the name of a flag in front of the errors that its value causes."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without pages of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


class _Version(argparse.Action):
    """Looks the version up when it is asked for: that takes longer than all else here."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from fairseq_dsq import artefact

        print(f"fairseq_dsq {artefact.version()}")
        parser.exit()


SUBCOMMANDS = (
    "average", "bench", "convert_hf", "corpus", "cost", "epochs", "export_float", "flags", "formats",
    "glue_evaluate", "glue_flags", "glue_prepare", "lm_prepare", "report", "roofline", "run", "run_eval_lm",
    "run_train", "run_translate", "translation_prepare",
)  # fmt: skip

# Those that may meet formats, architectures, schedules or cost profiles of a user-dir.
WITH_USER_DIR = ("average", "cost", "export_float", "flags", "formats", "glue_evaluate", "report", "roofline")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code. Bad input ends in one line on standard error and code 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(prog="fairseq-dsq", description="Tools of fairseq_dsq.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in SUBCOMMANDS:
        name, summary = module.replace("_", "-"), _summary(module)
        command = commands.add_parser(name, help=summary, description=summary)
        if name in argv[:1]:
            called = importlib.import_module(f"fairseq_dsq.cli.{module}")
            called.add_arguments(command)
            if module in WITH_USER_DIR:
                text = "folder of Python with formats, architectures and the like of one's own, as fairseq-train's"
                command.add_argument("--user-dir", metavar="DIR", help=text)
            command.set_defaults(run=called.main)
    args = parser.parse_args(argv)
    try:
        if getattr(args, "user_dir", None) is not None:
            import_user_dir(args.user_dir)
        return int(args.run(args))
    except BrokenPipeError:  # into head, say: whoever reads has seen enough, unless there is more to do than to print
        sys.stdout = None
        if not getattr(args, "works", False):
            return 0
        print(f"fairseq-dsq {args.command}: error: standard output was closed, and no more was done", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"fairseq-dsq {args.command}: error: {error}", file=sys.stderr)
        return 2


def import_user_dir(folder: str) -> None:
    """Import a folder as ``fairseq-train --user-dir`` does.

    Raises:
        ValueError: it is no folder of Python; names the flag.
    """
    from fairseq.utils import import_user_module

    try:
        import_user_module(argparse.Namespace(user_dir=folder))
    except (FileNotFoundError, ImportError) as error:
        raise ValueError(f"--user-dir: got {folder!r}, expected a folder of Python ({error})") from None


def _summary(module: str) -> str:
    """The first line of a module's docstring; the module is not imported."""
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
