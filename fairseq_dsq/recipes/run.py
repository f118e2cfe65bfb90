"""The commands that a recipe stands for."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from fairseq_dsq import artefact, data_files
from fairseq_dsq.recipes.evaluating import EVALUATED, PERPLEXITY
from fairseq_dsq.recipes.fairseq_command import user_dir_flags, value_of
from fairseq_dsq.recipes.plan import Plan, Step, step
from fairseq_dsq.recipes.recipe import (
    FOLDER,
    PARAMETER,
    Glue,
    LanguageModel,
    Method,
    Tabled,
    Translation,
    seeds_of,
)
from fairseq_dsq.recipes.training import LOG, log_of
from fairseq_dsq.recipes.translating import OUTPUT, SCORE, TOKENIZE
from fairseq_dsq.translation import find_corpus
from fairseq_dsq.translation.pieces import JOINED_BY, SENTENCEPIECE

# Runs a step of fairseq-dsq and returns its output where ``output`` is true, else prints it. Any exit code but 0 ends
# all.
Call = Callable[..., str]
Options = Mapping[str, str]  # flags without dashes before them: what they were given, or what the recipe says
# What bounds a batch; the last two are one.
_SIZES = ("--max-tokens", "--batch-size", "--max-sentences")
LOGGING = ("--no-epoch-checkpoints", "--log-format", "json", "--log-interval", "100", "--no-progress-bar")


def plan_translation(name: str, recipe: Translation, options: Options, rest: Sequence[str], runs: Path) -> Plan:
    """Prepare the corpus, then train, translate and score one run, or every method and print the table.

    Args:
        name: the recipe's, of a folder in ``runs``, or the path of its file.
        options: ``format`` and ``levels`` of one run, or ``methods``; ``vocab``, ``pieces``, ``epochs``,
            ``patience``, ``min-delta``, ``seed``, ``gpus``, ``nodes``, ``node-rank``, ``master``, ``out`` and the
            recipe's parameters.
        rest: more flags of fairseq-train.
        runs: folder of all runs.

    Raises:
        ValueError: GPUs that an update's batches cannot be shared by.
    """
    home = runs / Path(name).stem
    described = recipe.corpus if isinstance(recipe.corpus, str) else str(data_files.find(FOLDER, name))
    corpus = find_corpus(described)
    pieces = options["pieces"]
    prepared = home / f"data-{'' if pieces == SENTENCEPIECE else f'{pieces}-'}{options['vocab']}"
    chosen = _chosen(recipe, options, home)
    kind = [] if pieces == SENTENCEPIECE else ["--pieces", pieces]
    train = _words(recipe.train, options)
    train += _workers(train, recipe.update_freq, options, rest)
    tokenize = [] if recipe.tokenize == TOKENIZE else ["--tokenize", recipe.tokenize]
    found: dict[Path, tuple[Step, ...]] = {}
    for folder, (method, seed) in chosen.items():
        flags = [prepared / "bin", *train, *_dsq_flags(method, seed, options), *rest]
        score = (
            step("epochs", folder, before=_heading(method, seed)),
            step(
                "run-translate", "--digits", "2", *tokenize, folder, prepared / f"raw.test.{corpus.target}", "--",
                prepared / "bin", "--remove-bpe", JOINED_BY[pieces], *shlex.split(recipe.search),
                "--required-batch-size-multiple", "1", *user_dir_flags(rest),
                before=f"{recipe.test} sacreBLEU: ", failure=f"generation failed, see {folder / OUTPUT}",
            ),
        )  # fmt: skip
        found[folder] = _train(folder, flags, options, score)
    prepare = step(
        "translation-prepare", described, prepared, "--vocab", options["vocab"], *kind, "--downloads",
        home / "downloads",
    )  # fmt: skip
    return Plan(home.name, prepare, found, SCORE, _report(recipe, options, rest, chosen))


def run_glue(task: str, recipe: Glue, options: Options, rest: Sequence[str], runs: Path, call: Call) -> None:
    """Prepare the task for the encoder, fine-tune and score.

    Args:
        options: ``encoder``, ``data``, ``format``, ``levels``, ``patience``, ``min-delta``, ``epochs``, ``lr``,
            ``seed``, ``train-rows``, ``group-by-length`` (empty or not), ``prepared``, ``out``.
        rest: more flags of fairseq-train.
        runs: folder of all runs.
    """
    home, seed = runs / "glue", options["seed"]
    method = Method(options["format"], options["levels"])
    label = slug(f"{Path(options['encoder']).name}-{method.format}-{method.levels or 'default'}-seed{seed}")
    folder = Path(options["out"] or home / slug(task) / label)
    prepared = Path(options["prepared"] or folder / "data")
    encoder = ("--encoder", options["encoder"], "--downloads", home / "downloads")
    own = [part for name in ("data",) if options[name] for part in (f"--{name}", options[name])]
    own += ["--train-rows", options["train-rows"], *(["--group-by-length"] if options["group-by-length"] else [])]
    call(step("glue-prepare", task, prepared, *encoder, *own))
    words = [*_words(recipe.train, options), "--lr", options["lr"], *_dsq_flags(method, seed, options), *rest]
    flags = call(step("glue-flags", *encoder, prepared, "--", *words), output=True)
    call(step("run-train", folder, "--", *flags.splitlines(), failure=f"training failed, see {folder / LOG}"))
    call(step("epochs", folder, before=_heading(method, seed)))
    user_dir = user_dir_flags(rest)
    call(step("glue-evaluate", prepared, folder / artefact.BEST, "--out", folder / "glue.json", *user_dir))


def plan_language_model(
    name: str, text: str, recipe: LanguageModel, options: Options, rest: Sequence[str], runs: Path
) -> Plan:
    """Prepare a text, train on it, and print its test part's perplexity.

    Args:
        name: the recipe's, of a folder in ``runs``, or the path of its file.
        text: the file.
        options: ``arch``; ``format`` and ``levels`` of one run, or ``methods``; ``vocab``, ``held-out``, ``patience``,
            ``min-delta``, ``epochs``, ``seed``, ``gpus``, ``nodes``, ``node-rank``, ``master``, ``out`` and the
            recipe's parameters.
        rest: more flags of fairseq-train.
        runs: folder of all runs.

    Raises:
        ValueError: ``rest`` has a flag that the evaluation must know of too; or as :func:`plan_translation`.
    """
    if any(flag.partition("=")[0] == "--tokens-per-sample" for flag in rest):
        raise ValueError("--tokens-per-sample: got it after --, expected --length, which the evaluation follows too")
    home = runs / Path(name).stem / (slug(Path(text).stem) or "text")
    arch, prepared = options["arch"], home / f"data-{options['vocab']}"
    chosen = _chosen(recipe, options, home, f"{arch}-")
    flags = [*_words(recipe.train, options), "--arch", arch, *_words(recipe.architectures.get(arch, ""), options)]
    flags += _workers(flags, recipe.update_freq, options, rest)
    found: dict[Path, tuple[Step, ...]] = {}
    for folder, (method, seed) in chosen.items():
        score = (
            step("epochs", folder, before=f"{arch}, {_heading(method, seed)}"),
            step(
                "run-eval-lm", folder, "--", prepared / "bin", "--gen-subset", "test",
                *_words(recipe.evaluate, options), *user_dir_flags(rest),
                before="test perplexity (of sentence pieces): ", failure=f"evaluation failed, see {folder / EVALUATED}",
            ),
        )  # fmt: skip
        own = [prepared / "bin", *flags, *_dsq_flags(method, seed, options), *rest]
        found[folder] = _train(folder, own, options, score)
    prepare = step("lm-prepare", text, prepared, "--vocab", options["vocab"], "--held-out", options["held-out"])
    return Plan(f"{home.parent.name} {home.name}", prepare, found, PERPLEXITY, _report(recipe, options, rest, chosen))


def _chosen(recipe: Tabled, options: Options, home: Path, prefix: str = "") -> dict[Path, tuple[Method, str]]:
    """The runs' methods and seeds: those of a table that are asked for, or the one of a format and levels."""
    if _of_table(recipe, options):
        folder = Path(options["out"] or home)
        return {folder / f"{prefix}{name}-seed{seed}": (row, seed) for name, row, seed in _rows(recipe, options)}
    method, seed = Method(options["format"], options["levels"]), options["seed"] or "1"
    label = slug(f"{prefix}{method.format}-{method.levels or 'default'}-seed{seed}")
    return {Path(options["out"] or home / label): (method, seed)}


def _rows(recipe: Tabled, options: Options) -> Iterator[tuple[str, Method, str]]:
    """(name, method, seed) of the tables' rows that are asked for by name or by table: a seed after the other."""
    asked = options["methods"].split()
    for table, rows in recipe.tables().items():
        for seed in seeds_of(options["seed"] or recipe.seeds.get(table, "1")):
            for name, row in rows.items():
                if table in asked or name in asked:
                    yield name, row, str(seed)


def _of_table(recipe: Tabled, options: Options) -> bool:
    return bool(recipe.methods) and not options["format"]


def _report(recipe: Tabled, options: Options, rest: Sequence[str], chosen: Mapping[Path, object]) -> Step | None:
    if options["node-rank"] != "0" or not _of_table(recipe, options):
        return None
    profiles = [part for name in recipe.profiles.split() for part in ("--profile", name)]
    return step("report", *chosen, *profiles, *user_dir_flags(rest), before="\n")


def _train(folder: Path, flags: Sequence[object], options: Options, score: tuple[Step, ...]) -> tuple[Step, ...]:
    """The training and, on the first node, what follows it."""
    node = options["node-rank"]
    failure = f"training failed, see {log_of(folder, int(node))}"
    if node == "0":
        return (step("run-train", folder, "--", *flags, failure=failure), *score)
    return (step("run-train", "--node", node, folder, "--", *flags, failure=failure),)


def _workers(train: Sequence[str], batches: int, options: Options, rest: Sequence[str]) -> list[str]:
    """Flags that make a GPU a worker each.

    Args:
        train: the recipe's flags.
        batches: of an update on one GPU.

    Raises:
        ValueError: as :func:`_shared`.
    """
    gpus, nodes = int(options["gpus"] or 1), int(options["nodes"])
    workers = gpus * nodes
    found = [] if value_of(rest, "--update-freq") is not None else _shared(train, batches, workers, rest)
    if options["gpus"]:
        found += ["--distributed-world-size", str(workers)]
    if nodes > 1:
        # fairseq starts a process for each GPU, of the ranks from this node's first one on.
        found += ["--distributed-init-method", f"tcp://{options['master']}"]
        found += ["--distributed-rank", str(gpus * int(options["node-rank"]))]
    return found


def _shared(train: Sequence[str], batches: int, workers: int, rest: Sequence[str]) -> list[str]:
    """Flags that share an update's batches among workers: smaller ones where as many each do not come out even.

    Raises:
        ValueError: no batch is so small, or ``rest`` says how large one is.
    """
    each = -(-batches // workers)
    found = ["--update-freq", str(each)] if batches > 1 else []
    if each * workers == batches:
        return found
    uneven = f"{workers} workers cannot share the {batches} batch{'es' * (batches > 1)} of an update evenly"
    for flag in _SIZES:
        if value_of(rest, flag) is not None:
            raise ValueError(f"{flag}: got it after --, expected --update-freq too: {uneven}")
    given = {flag: int(size) for flag in _SIZES if (size := value_of(train, flag)) and size.isdecimal()}
    sizes = {flag: size * batches // (workers * each) for flag, size in given.items()}
    if not sizes or min(sizes.values()) < 1:
        raise ValueError(f"--gpus: {uneven}, expected a recipe with a {_SIZES[0]} that they can")
    return [*found, *(part for flag, size in sizes.items() for part in (flag, str(size)))]


def slug(text: str) -> str:
    """Text as a part of a file's name; fairseq's options would split paths at colons and commas."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", re.sub(r"\] *\[", "_", text)).strip("-")


def _words(flags: str, options: Options) -> list[str]:
    """Flags in a recipe as words, with the options' values in place of their names in braces."""
    return shlex.split(PARAMETER.sub(lambda match: options[match[1].replace("_", "-")], flags))


def _dsq_flags(method: Method, seed: str, options: Options) -> list[str]:
    given = {"format": method.format, "levels": method.levels}
    given |= {name: options[name] for name in ("patience", "min-delta")}
    return [
        *(part for name, value in given.items() if value for part in (f"--dsq-{name}", value)),
        "--max-epoch", options["epochs"], "--seed", seed, *LOGGING, *shlex.split(method.flags),
    ]  # fmt: skip


def _heading(method: Method, seed: str) -> str:
    flags = f"{method.flags}, " if method.flags else ""
    return f"format {method.format}, levels {method.levels or 'default'}, {flags}seed {seed}\n"
