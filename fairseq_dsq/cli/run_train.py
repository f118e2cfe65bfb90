"""Run fairseq-train in a folder of its own; one that other settings trained in is refused, one that is done is kept."""

from __future__ import annotations

import argparse
from pathlib import Path

from fairseq_dsq.cli.arguments import add_flags_argument, call_fairseq
from fairseq_dsq.recipes.training import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run: its checkpoints and train.log")
    parser.add_argument(
        "--node", type=int, default=0, metavar="N",
        help="which of several computers that share RUN this is; all but 0 only train (default: 0)",
    )  # fmt: skip
    add_flags_argument(parser, "fairseq-train without --save-dir")


def main(args: argparse.Namespace) -> int:
    return call_fairseq(args, lambda flags: train(args.folder, flags, args.node))
