"""Translate the test set with a run's best checkpoint and score it with sacreBLEU; what that checkpoint has is kept."""

from __future__ import annotations

import argparse
from pathlib import Path

from fairseq_dsq.cli.arguments import add_flags_argument, call_fairseq
from fairseq_dsq.recipes.translating import TOKENIZE, translate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("reference", type=Path, metavar="REFERENCE", help="reference text, FILE.LANGUAGE")
    parser.add_argument("--digits", type=int, default=2, metavar="N", help="of the score (default: %(default)s)")
    parser.add_argument(
        "--tokenize", default=TOKENIZE, metavar="NAME", help="sacreBLEU's tokenizer (default: %(default)s)"
    )
    add_flags_argument(parser, "fairseq-generate without --path; options come before RUN")


def main(args: argparse.Namespace) -> int:
    return call_fairseq(args, lambda flags: translate(args.folder, args.reference, flags, args.digits, args.tokenize))
