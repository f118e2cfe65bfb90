"""Turn a task's TSV files into the data that fairseq's task ``sentence_prediction`` reads.

A prepared folder holds, for each split (train; valid, valid1, ...: the development sets):

    SPLIT.input0, SPLIT.input1   one sentence a line, as symbols of the encoder's dictionary
    SPLIT.label                  one class a line
    bin/input0, input1, label    the same, binarised by fairseq-preprocess; the classes in the task's order
    bin/label/SPLIT.label        in place of the classes, for regression: scores from 0 to 1
    prepared.json                what this holds
    made.json                    what made it, see fairseq_dsq/artefact.py
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fairseq_dsq import artefact
from fairseq_dsq.glue import encoder, files, tsv
from fairseq_dsq.glue.encoder import DICTIONARY, Encoder, Tokenizer
from fairseq_dsq.glue.tasks import GlueTask, find_task

MANIFEST = "prepared.json"
BIN = "bin"
TRAIN = "train"
# A dictionary that does not know more than this share of the tokens is another tokenizer's.
_MOST_UNKNOWN = 0.5
_SUBSET_SEED = 0
_BATCH = 10_000


@dataclass(frozen=True)
class Prepared:
    """What a prepared folder holds.

    Attributes:
        task: the task's name.
        train_rows: rows that the training set was cut to; 0 for all.
        grouped_by_length: rows are in the order of their number of tokens, and fairseq is to batch them in it.
        tokenizer: its name.
        doubles_separator: see :class:`fairseq_dsq.glue.encoder.Tokenizer`.
        rows: of each split.
        skipped: broken rows that were left out, by split.
        tokens: of all sentences.
        unknown: those of them that the dictionary does not know.
    """

    task: str
    train_rows: int
    grouped_by_length: bool
    tokenizer: str
    doubles_separator: bool
    rows: dict[str, int]
    skipped: dict[str, int]
    tokens: int
    unknown: int

    @property
    def valid_splits(self) -> list[str]:
        return [split for split in self.rows if split != TRAIN]

    @classmethod
    def load(cls, folder: Path) -> Prepared:
        """What ``folder`` holds.

        Raises:
            OSError: it is no prepared folder.
            ValueError: its manifest is damaged.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise OSError(f"{folder}: has no {MANIFEST}, expected a folder that fairseq-dsq glue-prepare wrote")
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}, expected what fairseq-dsq glue-prepare wrote") from None


def valid_split(number: int) -> str:
    """fairseq-preprocess's name of the validation set of a number from 0."""
    return f"valid{number or ''}"


def prepare(
    task: GlueTask,
    folder: Path,
    pretrained: Encoder,
    downloads: Path,
    data: Path | None = None,
    train_rows: int = 0,
    group_by_length: bool = False,
) -> tuple[Prepared, bool]:
    """Write a prepared folder; one that was made of the same is left as it is.

    Args:
        task: what to prepare.
        folder: to write to; made whole or not at all.
        pretrained: the encoder to prepare for.
        downloads: where downloaded files are kept.
        data: the folder of the task's TSV files; see :func:`fairseq_dsq.glue.files.find`.
        train_rows: cut the training set to so many rows, drawn with a fixed seed; 0 for all.
        group_by_length: order the rows of every split by their number of tokens, so that a batch holds rows of like
            length and little padding. Which rows share a batch is then the same in all epochs.

    Returns:
        What the folder holds, and whether it was written now.

    Raises:
        OSError: a file is missing, or the folder holds something else.
        ValueError: a file is malformed, or the training set has fewer than ``train_rows`` rows.
    """
    paths = files.find(task, data, downloads)
    tokenizer = encoder.tokenizer(pretrained, downloads)
    dictionary = pretrained.folder / DICTIONARY
    sources = (paths.train, *paths.dev.values(), *tokenizer.files, dictionary)
    settings = {
        "task": task.name, "--train-rows": str(train_rows), "--group-by-length": str(group_by_length),
        "tokenizer": tokenizer.name, **{path.name: artefact.checksum(path) for path in sources},
    }  # fmt: skip
    artefact.check_path("DIR", folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with artefact.locked(folder.parent):  # who comes second finds what the first made
        if (folder / MANIFEST).is_file():
            return _found(folder, settings), False
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OSError(f"{folder}: holds something else, expected a new or empty folder")
        with artefact.atomic(folder) as partial:
            partial.mkdir()
            prepared = _make(task, partial, tokenizer, dictionary, paths, train_rows, group_by_length)
            artefact.write(partial, settings)
    return prepared, True


def _found(folder: Path, settings: Mapping[str, str]) -> Prepared:
    """What a folder that was made with these settings holds."""
    there = Prepared.load(folder)
    try:
        artefact.check(folder, settings)
    except ValueError as error:
        made_of = f"{there.task} with {there.train_rows or 'all'} training rows"
        made_of += ", grouped by length" if there.grouped_by_length else ""
        raise OSError(
            f"{folder}: was prepared of other files or settings ({made_of}); name another folder: {error}"
        ) from None
    return there


def _make(
    task: GlueTask,
    folder: Path,
    tokenizer: Tokenizer,
    dictionary: Path,
    paths: files.Files,
    train_rows: int,
    group_by_length: bool,
) -> Prepared:
    """Write everything but the stamp into an empty folder."""
    from fairseq_dsq.glue.sentence_prediction import binarise

    tables = {TRAIN: tsv.read(task, paths.train)}
    for number, path in enumerate(paths.dev.values()):
        tables[valid_split(number)] = tsv.read(task, path)
    rows = {split: table.rows for split, table in tables.items()}
    rows[TRAIN] = _subset(paths.train, rows[TRAIN], train_rows)
    known = _symbols(dictionary)
    tokens = unknown = 0
    for split in rows:
        lengths = [0] * len(rows[split])
        sides = []
        for side in range(len(task.sentences)):
            lines: list[str] = []
            for line in _encoded(tokenizer, [row.sentences[side] for row in rows[split]]):
                lengths[len(lines)] += len(line)
                unknown += sum(symbol not in known for symbol in line)
                lines.append(" ".join(line))
            sides.append(lines)
        tokens += sum(lengths)
        order = sorted(range(len(lengths)), key=lengths.__getitem__ if group_by_length else None)
        for side, lines in enumerate(sides):
            _write(folder / f"{split}.input{side}", (lines[index] for index in order))
        _write_labels(task, folder, split, [rows[split][index].label for index in order])
    if unknown > _MOST_UNKNOWN * tokens:
        raise ValueError(
            f"{dictionary}: does not know {unknown} of {tokens} tokens, expected the dictionary that belongs to "
            f"{tokenizer.files[0]}"
        )
    for side in range(len(task.sentences)):
        binarise(folder, f"input{side}", dictionary, list(rows))
    if not task.is_regression:
        classes = folder / "classes.txt"
        _write(classes, (f"{label} 1" for label in task.labels))
        binarise(folder, "label", classes, list(rows))
        classes.unlink()
    prepared = Prepared(
        task.name, train_rows, group_by_length, tokenizer.name, tokenizer.doubles_separator,
        {split: len(rows[split]) for split in rows},
        {split: len(table.skipped) for split, table in tables.items() if table.skipped},
        tokens, unknown,
    )  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(asdict(prepared), indent=1) + "\n", encoding="utf-8")
    return prepared


def _subset(path: Path, rows: Sequence[tsv.Row], number: int) -> tuple[tsv.Row, ...]:
    """``number`` of the rows in their order, drawn at random: the files may be sorted by where they come from."""
    if number > len(rows):
        raise ValueError(f"--train-rows: got {number}, expected at most the {len(rows)} rows of {path}")
    if not number:
        return tuple(rows)
    chosen = sorted(random.Random(_SUBSET_SEED).sample(range(len(rows)), number))
    return tuple(rows[index] for index in chosen)


def _symbols(dictionary: Path) -> set[str]:
    """The symbols of a fairseq dictionary, a line ``symbol count`` each."""
    with open(dictionary, encoding="utf-8") as file:
        return {line.rstrip("\n").rpartition(" ")[0] for line in file}


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(texts), _BATCH):  # the tokenizer's results are large
        yield from tokenizer.encode(texts[start : start + _BATCH])


def _write(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


def _write_labels(task: GlueTask, folder: Path, split: str, labels: Sequence[str]) -> None:
    if task.is_regression:
        _write(folder / BIN / "label" / f"{split}.label", (f"{float(label) / task.max_score:g}" for label in labels))
    else:
        _write(folder / f"{split}.label", labels)


def training_flags(prepared: Prepared) -> list[str]:
    """The flags of fairseq-train that follow from the task and its preparation."""
    task = find_task(prepared.task)
    flags = ["--task", "sentence_prediction", "--num-classes", str(task.outputs), "--init-token", "0"]
    if prepared.doubles_separator and len(task.sentences) == 2:
        flags += ["--separator-token", "2"]
    if prepared.grouped_by_length:
        flags.append("--no-shuffle")  # of the rows; batches still come in another order in every epoch
    flags += ["--valid-subset", ",".join(prepared.valid_splits)]
    if task.is_regression:
        return [*flags, "--regression-target", "--best-checkpoint-metric", "loss"]
    return [*flags, "--best-checkpoint-metric", "accuracy", "--maximize-best-checkpoint-metric"]
