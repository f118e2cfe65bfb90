"""Train what a recipe says: prepare the data, train, score, print; what is done already is not repeated."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fairseq_dsq import cli, data_files, schedules
from fairseq_dsq.cli import INTERRUPTED, blame
from fairseq_dsq.cost import load_profile
from fairseq_dsq.plugin import config, effects
from fairseq_dsq.plugin.state import refuse_field
from fairseq_dsq.recipes import FOLDER, Glue, LanguageModel, Recipe, Tabled, Translation, load_recipe
from fairseq_dsq.recipes.fairseq_command import user_dir
from fairseq_dsq.recipes.plan import Plan, Step, progress
from fairseq_dsq.recipes.recipe import seeds_of
from fairseq_dsq.recipes.run import plan_language_model, plan_translation, run_glue
from fairseq_dsq.recipes.side_by_side import VISIBLE, SideBySide
from fairseq_dsq.recipes.training import refuse_own
from fairseq_dsq.translation.pieces import LEARN

# What a recipe's parameters of these names are.
PARAMETERS = {
    "layers": "layers, of an encoder and of a decoder each",
    "dim": "values of an embedding and of every layer's output",
    "ffn": "values inside a feed-forward layer",
    "heads": "attention heads",
    "length": "tokens of a sample",
    "updates": "updates that training ends after",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # One argument for all: a positional of its own would swallow a -- that follows it.
    parser.add_argument(
        "words", nargs=argparse.PARSER, metavar="RECIPE",
        help=f"{', '.join(data_files.names(FOLDER))}, or the path of a file of one's own; then the recipe's own flags, "
        "which RECIPE --help lists",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    name, *own = args.words
    rest: list[str] = []
    if "--" in own:
        at = own.index("--")
        own, rest = own[:at], own[at + 1 :]
    if (folder := user_dir(rest)) is not None:  # formats of one's own may stand in the recipe
        cli.import_user_dir(folder)
    with blame("RECIPE"):
        recipe = load_recipe(name)
    try:
        parser = _parser(name, recipe)
    except argparse.ArgumentError as error:
        raise ValueError(f"RECIPE: {name}: parameters: {error}") from None
    options = vars(parser.parse_args(own))
    refuse_own(rest, _own_flags(options))
    _check(recipe, options)
    _check_precision(recipe, options, rest)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a busy machine are slower than one
    if not (options["dry_run"] or options.get("status")):
        _check_gpus(options)
    runs, dry = Path(options.pop("runs")).absolute(), options.pop("dry_run")
    jobs, status = int(options.pop("jobs", "1")), options.pop("status", False)
    args.works = not (dry or status)
    if args.works:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends what was started too
    given = {option.replace("_", "-"): value for option, value in options.items()}
    if isinstance(recipe, Glue):
        try:
            run_glue(given.pop("task"), recipe, given, rest, runs, _show if dry else _call)
        except _Stopped as stopped:
            return stopped.code
        return 0
    if isinstance(recipe, LanguageModel):
        plan = plan_language_model(name, given.pop("text"), recipe, given, rest, runs)
    else:
        assert isinstance(recipe, Translation)
        plan = plan_translation(name, recipe, given, rest, runs)
    if status:
        print(f"{plan.name}: {progress(plan, jobs)}")
    elif dry:
        for step in plan.commands():
            _show(step)
    else:
        return _run(plan, jobs, _gpus_of_jobs(jobs, given["gpus"]))
    return 0


def _run(plan: Plan, jobs: int, gpus: Sequence[str]) -> int:
    """Run what is not done yet; a run of a table that fails leaves the others alone. Returns the exit code.

    Args:
        gpus: as :class:`SideBySide`'s.
    """
    codes: dict[Path, int] = {}
    waiting = [folder for folder in plan.runs if not plan.is_done(folder)]
    try:
        _call(plan.prepare)
    except _Stopped as stopped:
        return stopped.code
    for folder in plan.runs if jobs == 1 else [folder for folder in plan.runs if folder not in waiting]:
        try:
            for step in plan.runs[folder]:
                _call(step)
        except _Stopped as stopped:
            if stopped.code == INTERRUPTED:
                return stopped.code
            codes[folder] = stopped.code
        if plan.report is not None and folder in waiting:
            print(f"\n{plan.name}: {progress(plan, jobs)}\n", flush=True)
    if jobs > 1 and waiting:
        pool = SideBySide(jobs, gpus)
        for outcome in pool.run({folder: plan.runs[folder] for folder in waiting}):
            print(outcome.output, end="", flush=True)
            print(outcome.errors, end="", file=sys.stderr, flush=True)
            if outcome.code:
                codes[outcome.folder] = outcome.code
            print(f"\n{plan.name}: {progress(plan, jobs, pool.running)}\n", flush=True)
    if plan.report is not None and len(codes) < len(plan.runs):
        try:
            _call(plan.report)
        except _Stopped as stopped:
            return stopped.code
    if plan.report is not None and codes:
        names = ", ".join(folder.name for folder in codes)
        print(f"fairseq-dsq run: error: {len(codes)} of {len(plan.runs)} runs failed: {names}", file=sys.stderr)
    return max(codes.values(), default=0)


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
        "What follows -- goes to fairseq-train; a --user-dir there, which imports fairseq_dsq, to all commands. "
        "A run that was stopped goes on where it was; a folder that other settings, data or another version of this "
        "package made is refused."
    )
    parser = _Parser(prog=f"fairseq-dsq run {name}", description=recipe.about, epilog=notes, allow_abbrev=False)

    def add(flag: str, default: object, text: str, metavar: str = "N", otherwise: object = "") -> None:
        """``otherwise`` is what stands, elsewhere, where nothing is given."""
        given = "" if default is None else str(default)
        shown = given or str(otherwise)
        shown = f" (default: {shown})" if shown else ""
        parser.add_argument(f"--{flag}", default=given, metavar=metavar, help=text + shown)

    table = recipe if isinstance(recipe, Tabled) and recipe.methods else None
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
        parser.add_argument(
            "--methods", default=table.methods, metavar="NAMES",
            help=f"what to train: tables ({table.methods}), or rows of theirs: {', '.join(table.rows())} "
            "(default: all)",
        )  # fmt: skip
    if isinstance(recipe, Translation):
        add("vocab", recipe.vocab, "joint pieces")
        add("pieces", recipe.pieces, f"what they are: {' or '.join(LEARN)} (of subword-nmt)", "KIND")
    if isinstance(recipe, LanguageModel):
        parser.add_argument("text", metavar="TEXT", help="a file, a document or a sentence a line")
        known = ", ".join(recipe.architectures)
        add("arch", recipe.arch, f"architecture: {known}; of others the shape is their own", "NAME")
        add("vocab", recipe.vocab, "sentence pieces")
        add("held-out", recipe.held_out, "share of the lines that valid and test have, each", "SHARE")
    for parameter, value in recipe.parameters.items():
        add(parameter, value, PARAMETERS.get(parameter, f"{{{parameter}}} in the recipe's flags of fairseq-train"))
    one = ": one run in place of the table" if table else ""
    add("format", "" if table else recipe.format, f"number format of the q that are bits{one}", "NAME")
    flags = config.DSQConfig
    add("levels", "", "precision levels, or one" + ", beside --format" * bool(table), "LEVELS", flags.dsq_levels)
    text = "validations in a row without a new best before the level rises"
    add("patience", recipe.patience, text, otherwise=flags.dsq_patience)
    add("min-delta", recipe.min_delta, "a new best is lower than the best by more than this", "D", flags.dsq_min_delta)
    add("epochs", recipe.epochs, "epochs" + (", which may be raised later" * (not isinstance(recipe, Glue))))
    if table:  # the default is the tables' affair
        of_tables = "".join(f"; {name}: {seeds}" for name, seeds in table.seeds.items())
        parser.add_argument(
            "--seed", default="", metavar="N", help=f"seeds, one or several as in '1 2 3' (default: 1{of_tables})"
        )
    else:
        add("seed", 1, "seed")
    add("out", "", "folder of the run, or of the table's runs (default: in RUNS, by the settings)", "DIR")
    add("runs", "runs", "folder of all runs and downloads", "DIR")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    if table:
        add("jobs", 1, "runs at a time, with --gpus on other GPUs each")
    if not isinstance(recipe, Glue):
        add("gpus", "", "GPUs of this computer to train on (default: the only one)")
        add("nodes", 1, "computers that train together, each with so many GPUs and RUNS in common")
        add("node-rank", 0, "which of them this is, from 0")
        add("master", "", "where the first of them listens", "HOST:PORT")
        parser.add_argument("--status", action="store_true", help="print how many runs are done, and run none")
    return parser


def _own_flags(options: Mapping[str, str]) -> dict[str, str]:
    """The flags of fairseq-train that a run's options stand for, by which it is called and described: what each is."""
    table = "methods" in options and not options["format"]
    own = {"save-dir": "a folder in RUNS", "max-epoch": "run's --epochs"}
    own |= {name: f"run's --{name}" for name in ("seed", "lr", "arch") if name in options}
    for name in ("format", "levels", "patience", "min-delta"):
        own[f"dsq-{name}"] = "each row's own" if table else f"run's --{name}"
    return {f"--{name}": what for name, what in own.items()}


def _check(recipe: Recipe, options: dict[str, str]) -> None:
    """Refuse what no command would refuse in time."""
    positive = ["epochs", "patience", *recipe.parameters, "vocab", "jobs", "gpus", "nodes"]
    for least, names in ((1, positive), (0, ["train_rows", "node_rank"])):
        for name in names:
            value = options.get(name.replace("-", "_"))
            if value is None or (name in ("gpus", "patience") and not value):
                continue
            if not re.fullmatch("[0-9]{1,9}", value) or int(value) < least:
                raise ValueError(f"--{name.replace('_', '-')}: got {value!r}, expected an integer >= {least}")
    table = "methods" in options and not options["format"]
    seeds = seeds_of(options["seed"])
    if (not seeds and (options["seed"] or "methods" not in options)) or (len(seeds) > 1 and not table):
        raise ValueError(f"--seed: got {options['seed']!r}, expected an integer >= 0" + ", or several" * table)
    if "pieces" in options and options["pieces"] not in LEARN:
        raise ValueError(f"--pieces: got {options['pieces']!r}, expected {' or '.join(LEARN)}")
    if "nodes" in options:
        _check_nodes(options)
    if "methods" in options:
        assert isinstance(recipe, Tabled)
        with blame("RECIPE: profiles"):
            for profile in recipe.profiles.split():
                load_profile(profile)
        rows = recipe.rows()
        if not options["methods"].split():
            raise ValueError(f"--methods: got none, expected some of {' '.join(rows)}")
        for method in options["methods"].split():
            if method not in (*rows, *recipe.methods.split()):
                expected = f"{' '.join(rows)}, or of the tables {recipe.methods}"
                raise ValueError(f"--methods: got {method!r}, expected some of {expected}")
        if options["format"] and options["methods"] != recipe.methods:
            raise ValueError(f"--methods: got {options['methods']!r} beside --format, expected one of the two")
        if options["levels"] and not options["format"]:
            raise ValueError(f"--levels: got {options['levels']!r} without --format")


def _check_precision(recipe: Recipe, options: dict[str, str], rest: Sequence[str]) -> None:
    """Refuse what fairseq-train would of the precision, before anything is fetched: ``rest`` follows ``--``."""
    checks = {field.name: field.metadata["check"] for field in dataclasses.fields(config.DSQConfig)}
    given = {name: options[name] for name in ("format", "levels", "patience", "min_delta") if options[name]}
    for name, value in given.items():
        with blame(config.option(name)):
            checks[f"dsq_{name}"](value)
    parser = _Parser(add_help=False, allow_abbrev=False)
    config.add_args(parser)
    own = argparse.Namespace(**{f"dsq_{name}": value for name, value in given.items()})
    found, others = parser.parse_known_args(rest, own)
    config.refuse_unknown_flags(others)
    flags: Any = config.set_defaults(found)
    if isinstance(recipe, Tabled) and recipe.methods and not options["format"]:
        return  # each row has levels of its own
    with blame("--levels"):
        levels = effects.levels_of(flags)
    try:
        policy = schedules.make(flags.dsq_schedule, len(levels), flags)
    except ValueError as error:
        refuse_field(error)
    with blame("--levels"):
        policy.check(levels)


def _check_nodes(options: dict[str, str]) -> None:
    """Refuse what does not say which of the computers this is."""
    nodes, rank, master = int(options["nodes"]), int(options["node_rank"]), options["master"]
    if rank >= nodes:
        raise ValueError(f"--node-rank: got {rank}, expected 0 to {nodes - 1} (--nodes {nodes})")
    if nodes > 1 and not options["gpus"]:
        raise ValueError("--gpus: got none beside --nodes, expected how many each of them has")
    if (nodes > 1) != bool(master) or (master and not re.fullmatch(r"[^:\s]+:[0-9]{1,5}", master)):
        expected = "HOST:PORT of the node with --node-rank 0" if nodes > 1 else "none without --nodes"
        raise ValueError(f"--master: got {master!r}, expected {expected}")
    if nodes > 1 and int(options.get("jobs", "1")) > 1:
        raise ValueError(f"--jobs: got {options['jobs']}, expected 1 beside --nodes: a run has the GPUs of all of them")


def _check_gpus(options: dict[str, str]) -> None:
    """Refuse other GPUs than there are: fairseq takes all that it sees."""
    import torch

    seen, gpus, nodes = torch.cuda.device_count(), options.get("gpus"), int(options.get("nodes", "1"))
    choose, jobs = f"{VISIBLE} chooses", int(options.get("jobs", "1"))
    if gpus is not None and seen > 1 and not gpus:
        raise ValueError(f"--gpus: got none, expected how many of the {seen} GPUs here are to train")
    if gpus and (int(gpus) > seen or (nodes > 1 and int(gpus) != seen)):
        raise ValueError(f"--gpus: got {gpus}, expected the number of GPUs that are seen here, {seen} ({choose})")
    if gpus and int(gpus) * jobs > seen:
        expected = f"at most {seen // int(gpus)}, for {seen} GPUs are seen here ({choose})"
        raise ValueError(f"--jobs: got {jobs} with --gpus {gpus} each, expected {expected}")


def _gpus_of_jobs(jobs: int, gpus: str) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each of the runs that are at work at a time; empty where they share what there is."""
    if jobs == 1 or not gpus:
        return []
    import torch

    seen = os.environ.get(VISIBLE) or ",".join(map(str, range(torch.cuda.device_count())))
    every, each = seen.split(","), int(gpus)
    return [",".join(every[job * each : (job + 1) * each]) for job in range(jobs)]


def _call(step: Step, output: bool = False) -> str:
    """Run a step in this process; see :data:`fairseq_dsq.recipes.run.Call`."""
    print(step.before, end="", flush=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed) if output else contextlib.nullcontext():
        code = cli.main(step.arguments)
    if sys.stdout is None:
        raise BrokenPipeError
    if code == 1 and step.failure:
        print(f"fairseq-dsq run: error: {step.failure}", file=sys.stderr)
    if code:
        raise _Stopped(code)
    return printed.getvalue()


def _show(step: Step, output: bool = False) -> str:
    """Print the command line; of one whose output is wanted, that output is a mark."""
    print(shlex.join(["fairseq-dsq", *step.arguments]))
    return f"[{step.arguments[0]}]" if output else ""
