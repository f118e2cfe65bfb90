"""The commands that a recipe stands for, one after the other."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fairseq_dsq import artefact, data_files
from fairseq_dsq.recipes.evaluating import EVALUATED
from fairseq_dsq.recipes.recipe import FOLDER, PARAMETER, Glue, LanguageModel, Method, Tabled, Translation
from fairseq_dsq.recipes.training import LOG
from fairseq_dsq.translation import find_corpus

# Runs ``fairseq-dsq ARGUMENTS`` and prints ``before`` and its output, or returns the latter where ``output`` is true.
# Any exit code but 0 ends all; ``failure`` is said where it is 1.
Call = Callable[..., str]
Options = Mapping[str, str]  # flags without dashes before them: what they were given, or what the recipe says
LOGGING = ("--no-epoch-checkpoints", "--log-format", "json", "--log-interval", "100", "--no-progress-bar")


def run_translation(
    name: str, recipe: Translation, options: Options, rest: Sequence[str], runs: Path, call: Call
) -> None:
    """Prepare the corpus, then train, translate and score one run, or every method and print the table.

    Args:
        name: the recipe's, of a folder in ``runs``, or the path of its file.
        options: ``format`` and ``levels`` of one run, or ``methods``; ``vocab``, ``epochs``, ``patience``,
            ``min-delta``, ``seed``, ``out`` and the recipe's parameters.
        rest: more flags of fairseq-train.
        runs: folder of all runs.
    """
    home = runs / Path(name).stem
    described = recipe.corpus if isinstance(recipe.corpus, str) else str(data_files.find(FOLDER, name))
    corpus = find_corpus(described)
    prepared = home / f"data-{options['vocab']}"
    chosen = _chosen(recipe, options, home)
    downloads = home / "downloads"
    call("translation-prepare", described, prepared, "--vocab", options["vocab"], "--downloads", downloads)
    for folder, method in chosen.items():
        flags = [prepared / "bin", *_words(recipe.train, options), *_dsq_flags(method, options), *rest]
        call("run-train", folder, "--", *flags, failure=f"training failed, see {folder / LOG}")
        call("epochs", folder, before=_heading(method, options))
        call(
            "run-translate", "--digits", "2", folder, prepared / f"raw.test.{corpus.target}", "--", prepared / "bin",
            "--remove-bpe", "sentencepiece", *shlex.split(recipe.search), "--required-batch-size-multiple", "1",
            before=f"{recipe.test} sacreBLEU: ", failure=f"generation failed, see {folder / 'generate.out'}",
        )  # fmt: skip
    _report(recipe, options, chosen, call)


def run_glue(task: str, recipe: Glue, options: Options, rest: Sequence[str], runs: Path, call: Call) -> None:
    """Prepare the task for the encoder, fine-tune and score.

    Args:
        options: ``encoder``, ``data``, ``format``, ``levels``, ``patience``, ``min-delta``, ``epochs``, ``lr``,
            ``seed``, ``train-rows``, ``group-by-length`` (empty or not), ``prepared``, ``out``.
        rest: more flags of fairseq-train.
        runs: folder of all runs.
    """
    home = runs / "glue"
    method = Method(options["format"], options["levels"])
    label = slug(f"{Path(options['encoder']).name}-{method.format}-{method.levels or 'default'}-seed{options['seed']}")
    folder = Path(options["out"] or home / slug(task) / label)
    prepared = Path(options["prepared"] or folder / "data")
    encoder = ("--encoder", options["encoder"], "--downloads", home / "downloads")
    own = [part for name in ("data",) if options[name] for part in (f"--{name}", options[name])]
    own += ["--train-rows", options["train-rows"], *(["--group-by-length"] if options["group-by-length"] else [])]
    call("glue-prepare", task, prepared, *encoder, *own)
    words = [*_words(recipe.train, options), "--lr", options["lr"], *_dsq_flags(method, options), *rest]
    flags = call("glue-flags", *encoder, prepared, "--", *words, output=True)
    call("run-train", folder, "--", *flags.splitlines(), failure=f"training failed, see {folder / LOG}")
    call("epochs", folder, before=_heading(method, options))
    call("glue-evaluate", prepared, folder / artefact.BEST, "--out", folder / "glue.json")


def run_language_model(
    name: str, text: str, recipe: LanguageModel, options: Options, rest: Sequence[str], runs: Path, call: Call
) -> None:
    """Prepare a text, train on it, and print its test part's perplexity.

    Args:
        name: the recipe's, of a folder in ``runs``, or the path of its file.
        text: the file.
        options: ``arch``; ``format`` and ``levels`` of one run, or ``methods``; ``vocab``, ``held-out``, ``patience``,
            ``min-delta``, ``epochs``, ``seed``, ``out`` and the recipe's parameters.
        rest: more flags of fairseq-train.
        runs: folder of all runs.

    Raises:
        ValueError: ``rest`` has a flag that the evaluation must know of too.
    """
    if any(flag.partition("=")[0] == "--tokens-per-sample" for flag in rest):
        raise ValueError("--tokens-per-sample: got it after --, expected --length, which the evaluation follows too")
    home = runs / Path(name).stem / (slug(Path(text).stem) or "text")
    arch, prepared = options["arch"], home / f"data-{options['vocab']}"
    chosen = _chosen(recipe, options, home, f"{arch}-")
    call("lm-prepare", text, prepared, "--vocab", options["vocab"], "--held-out", options["held-out"])
    flags = [*_words(recipe.train, options), "--arch", arch, *_words(recipe.architectures.get(arch, ""), options)]
    for folder, method in chosen.items():
        call(
            "run-train", folder, "--", prepared / "bin", *flags, *_dsq_flags(method, options), *rest,
            failure=f"training failed, see {folder / LOG}",
        )  # fmt: skip
        call("epochs", folder, before=f"{arch}, {_heading(method, options)}")
        call(
            "run-eval-lm", folder, "--", prepared / "bin", "--gen-subset", "test", *_words(recipe.evaluate, options),
            before="test perplexity (of sentence pieces): ", failure=f"evaluation failed, see {folder / EVALUATED}",
        )  # fmt: skip
    _report(recipe, options, chosen, call)


def _chosen(recipe: Tabled, options: Options, home: Path, prefix: str = "") -> dict[Path, Method]:
    """The runs: the methods of a table that are asked for, or the one of a format and levels."""
    seed = f"seed{options['seed']}"
    if _of_table(recipe, options):
        rows, folder = recipe.rows(), Path(options["out"] or home)
        return {folder / f"{prefix}{row}-{seed}": rows[row] for row in options["methods"].split()}
    method = Method(options["format"], options["levels"])
    label = slug(f"{prefix}{method.format}-{method.levels or 'default'}-{seed}")
    return {Path(options["out"] or home / label): method}


def _of_table(recipe: Tabled, options: Options) -> bool:
    return bool(recipe.methods) and not options["format"]


def _report(recipe: Tabled, options: Options, chosen: Mapping[Path, Method], call: Call) -> None:
    if _of_table(recipe, options):
        call("report", *chosen, before="\n")


def slug(text: str) -> str:
    """Text as a part of a file's name; fairseq's options would split paths at colons and commas."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", re.sub(r"\] *\[", "_", text)).strip("-")


def _words(flags: str, options: Options) -> list[str]:
    """Flags in a recipe as words, with the options' values in place of their names in braces."""
    return shlex.split(PARAMETER.sub(lambda match: options[match[1].replace("_", "-")], flags))


def _dsq_flags(method: Method, options: Options) -> list[str]:
    levels = ["--dsq-levels", method.levels] if method.levels else []
    return [
        "--dsq-format", method.format, *levels, "--dsq-patience", options["patience"], "--dsq-min-delta",
        options["min-delta"], "--max-epoch", options["epochs"], "--seed", options["seed"], *LOGGING,
        *shlex.split(method.flags),
    ]  # fmt: skip


def _heading(method: Method, options: Options) -> str:
    flags = f"{method.flags}, " if method.flags else ""
    return f"format {method.format}, levels {method.levels or 'default'}, {flags}seed {options['seed']}\n"
