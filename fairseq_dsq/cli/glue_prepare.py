"""Prepare a GLUE task for an encoder: tokenise its TSV files and binarise them with fairseq-preprocess."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fairseq_dsq.cli import blame
from fairseq_dsq.glue import TASKS, files, find_task
from fairseq_dsq.glue.encoder import DEFAULT_ENCODER, DOWNLOADABLE, find
from fairseq_dsq.glue.prepare import prepare


def add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--encoder", default=DEFAULT_ENCODER, metavar="DIR",
        help=f"encoder folder, or {' or '.join(DOWNLOADABLE)}, which is downloaded (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--downloads", type=Path, default=Path("downloads"), metavar="DIR",
        help="where downloads are kept (default: %(default)s)",
    )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--data", type=Path, metavar="DIR",
        help="folder of the task's TSV files (default: $DSQ_DATA/glue/TASK, or downloaded where DSQ_DATA is not set)",
    )  # fmt: skip
    parser.add_argument(
        "--train-rows", type=int, default=0, metavar="N",
        help="so many training rows, drawn with a fixed seed (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--group-by-length", action="store_true",
        help="batches of rows of like length: less padding, the same batches in every epoch",
    )  # fmt: skip
    add_encoder_arguments(parser)


def main(args: argparse.Namespace) -> int:
    with blame("TASK"):
        task = find_task(args.task)
    if args.train_rows < 0:
        raise ValueError(f"--train-rows: got {args.train_rows}, expected an integer >= 1, or 0 for all")
    files.find(task, args.data, args.downloads)  # refused before an encoder, which is large, is downloaded
    encoder = find(args.encoder, args.downloads)
    prepared, written = prepare(
        task, args.folder, encoder, args.downloads, args.data, args.train_rows, args.group_by_length
    )
    for split, count in prepared.skipped.items():
        print(
            f"fairseq-dsq glue-prepare: warning: {task.name} {split}: skipped {count} rows that GLUE ships broken",
            file=sys.stderr,
        )
    rows = ", ".join(f"{split} {count}" for split, count in prepared.rows.items())
    print(
        f"{'wrote' if written else 'found'} {args.folder}: {task.name} ({rows}) in {prepared.tokenizer} tokens, "
        f"{prepared.unknown} of {prepared.tokens} unknown to the dictionary"
    )
    return 0
