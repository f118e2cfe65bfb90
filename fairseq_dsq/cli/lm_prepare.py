"""Split a text into train, valid and test, cut it into sentence pieces and binarise it with fairseq-preprocess."""

from __future__ import annotations

import argparse
from pathlib import Path

from fairseq_dsq import artefact
from fairseq_dsq.lm import prepare, settings
from fairseq_dsq.recipes import fairseq_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", type=Path, metavar="TEXT", help="a UTF-8 file, a document or a sentence a line")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--vocab", type=int, default=4000, help="sentence pieces (default: %(default)s)")
    parser.add_argument(
        "--held-out", type=float, default=0.05, metavar="SHARE",
        help="share of the lines that valid and test have, each (default: %(default)s)",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    if not args.text.is_file():
        raise ValueError(f"TEXT: got {str(args.text)!r}, expected a text file")
    if not 0 < args.held_out < 0.5:
        raise ValueError(f"--held-out: got {args.held_out}, expected a share above 0 and below 0.5")
    artefact.check_path("DIR", args.folder)
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    with artefact.locked(args.folder.parent):  # who comes second finds what the first made
        if artefact.check(args.folder, settings(args.text, args.vocab, args.held_out)):
            print(f"found {args.folder}: {args.text.name} in {args.vocab} sentence pieces")
            return 0
        try:
            counts = prepare(args.text, args.folder, args.vocab, args.held_out, fairseq_command.preprocess_text)
        except RuntimeError as error:  # sentencepiece's own checks
            raise ValueError(f"--vocab: got {args.vocab}: {error}") from None
    found = ", ".join(f"{split} {count}" for split, count in counts.items())
    print(f"wrote {args.folder}: {args.text.name} ({found} lines) in {args.vocab} sentence pieces")
    return 0
