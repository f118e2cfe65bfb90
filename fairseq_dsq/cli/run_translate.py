"""Translate the test set with a run's best checkpoint and score it with sacreBLEU; what that checkpoint has is kept."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fairseq_dsq.recipes.fairseq_command import FailedError
from fairseq_dsq.recipes.translating import translate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("reference", type=Path, metavar="REFERENCE", help="reference text, FILE.LANGUAGE")
    parser.add_argument("--digits", type=int, default=2, metavar="N", help="of the score (default: %(default)s)")
    parser.add_argument(
        "flags",
        nargs=argparse.REMAINDER,
        metavar="-- DATA FLAGS",
        help="arguments of fairseq-generate without --path; options come before RUN",
    )


def main(args: argparse.Namespace) -> int:
    flags = args.flags[1:] if args.flags[:1] == ["--"] else args.flags
    try:
        print(translate(args.folder, args.reference, flags, args.digits))
    except FailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
