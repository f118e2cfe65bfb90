"""Fetch a parallel corpus and cut it into sentence pieces, for fairseq-preprocess."""

from __future__ import annotations

import argparse
from pathlib import Path

from fairseq_dsq.translation import CORPORA, prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", choices=sorted(CORPORA), metavar="CORPUS", help=", ".join(sorted(CORPORA)))
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--vocab", type=int, default=4000, help="joint sentence pieces (default: %(default)s)")
    parser.add_argument(
        "--downloads", type=Path, metavar="DIR", help="where downloads are kept (default: in the folder)"
    )


def main(args: argparse.Namespace) -> int:
    try:
        counts = prepare(CORPORA[args.corpus], args.folder, args.vocab, args.downloads)
    except RuntimeError as error:  # sentencepiece's own checks
        raise ValueError(f"--vocab: got {args.vocab}: {error}") from None
    pairs = ", ".join(f"{split} {kept}" for split, (kept, _) in counts.items())
    left_out = counts["train"][1]
    print(
        f"wrote {args.folder}: {args.corpus} ({pairs} pairs) in {args.vocab} sentence pieces"
        + (f"; {left_out} training pairs left out, empty, too long or too unlike in length" if left_out else "")
    )
    return 0
