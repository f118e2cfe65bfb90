"""The perplexity of a run's best checkpoint, by fairseq-eval-lm; what that checkpoint has is kept."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fairseq_dsq.recipes.evaluating import perplexity
from fairseq_dsq.recipes.fairseq_command import FailedError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "flags", nargs=argparse.REMAINDER, metavar="-- DATA FLAGS", help="arguments of fairseq-eval-lm without --path"
    )


def main(args: argparse.Namespace) -> int:
    try:
        print(perplexity(args.folder, args.flags[1:] if args.flags[:1] == ["--"] else args.flags))
    except FailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
