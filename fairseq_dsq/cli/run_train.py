"""Run fairseq-train in a folder of its own; one that other settings trained in is refused, one that is done is kept."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fairseq_dsq.recipes.fairseq_command import FailedError
from fairseq_dsq.recipes.training import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run: its checkpoints and train.log")
    parser.add_argument(
        "flags", nargs=argparse.REMAINDER, metavar="-- DATA FLAGS", help="arguments of fairseq-train without --save-dir"
    )


def main(args: argparse.Namespace) -> int:
    try:
        train(args.folder, args.flags[1:] if args.flags[:1] == ["--"] else args.flags)
    except FailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
