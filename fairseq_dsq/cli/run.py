"""Train what a recipe says: prepare the data, train, score, print; what is done already is not repeated."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fairseq_dsq import cli, data_files
from fairseq_dsq.cli import blame
from fairseq_dsq.recipes import FOLDER, Glue, LanguageModel, Recipe, Tabled, Translation, load_recipe
from fairseq_dsq.recipes.run import run_glue, run_language_model, run_translation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE", help=f"{', '.join(data_files.names(FOLDER))}, or the path of a file of one's own"
    )
    parser.add_argument(
        "flags", nargs=argparse.REMAINDER, metavar="...", help="the recipe's own flags: RECIPE --help lists them"
    )


def main(args: argparse.Namespace) -> int:
    with blame("RECIPE"):
        recipe = load_recipe(args.recipe)
    own, rest = args.flags, []
    if "--" in own:
        at = own.index("--")
        own, rest = own[:at], own[at + 1 :]
    try:
        parser = _parser(args.recipe, recipe)
    except argparse.ArgumentError as error:
        raise ValueError(f"RECIPE: {args.recipe}: parameters: {error}") from None
    options = vars(parser.parse_args(own))
    _check(recipe, options)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a busy machine are slower than one
    runs, dry = Path(options.pop("runs")).absolute(), options.pop("dry_run")
    given = {name.replace("_", "-"): value for name, value in options.items()}
    try:
        if isinstance(recipe, Translation):
            run_translation(args.recipe, recipe, given, rest, runs, _show if dry else _call)
        elif isinstance(recipe, Glue):
            run_glue(given.pop("task"), recipe, given, rest, runs, _show if dry else _call)
        elif isinstance(recipe, LanguageModel):
            text = given.pop("text")
            run_language_model(args.recipe, text, recipe, given, rest, runs, _show if dry else _call)
    except _Stopped as stopped:
        return stopped.code
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists the flags)")


class _Stopped(Exception):
    def __init__(self, code: int) -> None:
        self.code = code


def _parser(name: str, recipe: Recipe) -> argparse.ArgumentParser:
    """The recipe's flags; values stay text, as they go on to other commands."""
    notes = (
        "What follows -- goes to fairseq-train. A run that was stopped goes on where it was; a folder that other "
        "settings, data or another version of this package made is refused."
    )
    parser = _Parser(prog=f"fairseq-dsq run {name}", description=recipe.about, epilog=notes, allow_abbrev=False)

    def add(flag: str, default: object, text: str, metavar: str = "N") -> None:
        shown = f" (default: {default})" if default else ""
        parser.add_argument(f"--{flag}", default=str(default), metavar=metavar, help=text + shown)

    table = isinstance(recipe, Tabled) and bool(recipe.methods)
    if isinstance(recipe, Glue):
        parser.add_argument("task", metavar="TASK", help="CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE or WNLI")
        add("encoder", recipe.encoder, "encoder folder, or the name of a published one", "DIR")
        add("data", "", "folder of the task's TSV files", "DIR")
        add("lr", recipe.lr, "highest learning rate", "LR")
        add("train-rows", 0, "so many training rows; 0: all")
        parser.add_argument("--group-by-length", action="store_const", const="1", default="",
                            help="batches of rows of like length")  # fmt: skip
        add("prepared", "", "folder of the prepared task, which runs can share (default: OUT/data)", "DIR")
    if table:
        add("methods", " ".join(_methods(recipe)), "rows of the table to train", "NAMES")
    if isinstance(recipe, Translation):
        add("vocab", recipe.vocab, "joint sentence pieces")
    if isinstance(recipe, LanguageModel):
        parser.add_argument("text", metavar="TEXT", help="a file, a document or a sentence a line")
        known = ", ".join(recipe.architectures)
        add("arch", recipe.arch, f"architecture: {known}; of others the shape is their own", "NAME")
        add("vocab", recipe.vocab, "sentence pieces")
        add("held-out", recipe.held_out, "share of the lines that valid and test have, each", "SHARE")
    for parameter, value in recipe.parameters.items():
        add(parameter, value, f"{{{parameter}}} of the recipe's flags")
    add("format", "" if table else recipe.format, "number format" + (": one run in place of the table" * table), "NAME")
    add("levels", "", "precision levels (default: fairseq_dsq's)", "LEVELS")
    add("patience", recipe.patience, "as --dsq-patience")
    add("min-delta", recipe.min_delta, "as --dsq-min-delta", "D")
    add("epochs", recipe.epochs, "epochs" + (", which may be raised later" * (not isinstance(recipe, Glue))))
    add("seed", 1, "seed")
    add("out", "", "folder of the run, or of the table's runs (default: in RUNS, by the settings)", "DIR")
    add("runs", "runs", "folder of all runs and downloads", "DIR")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    return parser


def _check(recipe: Recipe, options: dict[str, str]) -> None:
    """Refuse what no command would refuse in time."""
    positive = ["epochs", "patience", *recipe.parameters, *(["vocab"] if "vocab" in options else [])]
    for least, names in ((1, positive), (0, ["seed", *(["train_rows"] if isinstance(recipe, Glue) else [])])):
        for name in names:
            value = options[name]
            if not re.fullmatch("[0-9]{1,9}", value) or int(value) < least:
                raise ValueError(f"--{name.replace('_', '-')}: got {value!r}, expected an integer >= {least}")
    if "methods" in options:
        known = _methods(recipe)
        for method in options["methods"].split():
            if method not in known:
                raise ValueError(f"--methods: got {method!r}, expected some of {' '.join(known)}")
        if options["levels"] and not options["format"]:
            raise ValueError(f"--levels: got {options['levels']!r} without --format")


def _methods(recipe: Recipe) -> Sequence[str]:
    return list(recipe.rows()) if isinstance(recipe, Tabled) else []


def _call(*arguments: object, output: bool = False, before: str = "", failure: str = "") -> str:
    """``fairseq-dsq ARGUMENTS`` in this process; see :data:`fairseq_dsq.recipes.run.Call`."""
    print(before, end="", flush=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed) if output else contextlib.nullcontext():
        code = cli.main([*map(str, arguments)])
    if code == 1 and failure:
        print(f"fairseq-dsq run: error: {failure}", file=sys.stderr)
    if code:
        raise _Stopped(code)
    return printed.getvalue()


def _show(*arguments: object, output: bool = False, **_: str) -> str:
    """Print the command line; of one whose output is wanted, that output is a mark."""
    print(shlex.join(["fairseq-dsq", *map(str, arguments)]))
    return f"[{arguments[0]}]" if output else ""
