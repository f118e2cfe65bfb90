"""The perplexity of a run's best checkpoint, by fairseq-eval-lm; what that checkpoint has is kept."""

from __future__ import annotations

import argparse
from pathlib import Path

from fairseq_dsq.cli.arguments import add_flags_argument, call_fairseq
from fairseq_dsq.recipes.evaluating import perplexity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    add_flags_argument(parser, "fairseq-eval-lm without --path")


def main(args: argparse.Namespace) -> int:
    return call_fairseq(args, lambda flags: perplexity(args.folder, flags))
