"""Fetch a parallel corpus, cut it into pieces and binarise it with fairseq-preprocess."""

from __future__ import annotations

import argparse
from pathlib import Path

from fairseq_dsq import artefact
from fairseq_dsq.cli import blame
from fairseq_dsq.recipes import fairseq_command
from fairseq_dsq.translation import CORPORA, find_corpus, prepare, settings
from fairseq_dsq.translation.pieces import DICTIONARY, LEARN, SENTENCEPIECE, check_pieces


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(sorted(CORPORA))
    parser.add_argument("corpus", metavar="CORPUS", help=f"{names}, or a recipe's file that describes one's own")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--vocab", type=int, default=4000, help="joint pieces (default: %(default)s)")
    parser.add_argument(
        "--pieces", choices=LEARN, default=SENTENCEPIECE,
        help="of sentencepiece, or the BPE of subword-nmt, of so many merges (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--downloads", type=Path, metavar="DIR", help="where downloads are kept (default: beside DIR)")


def main(args: argparse.Namespace) -> int:
    with blame("CORPUS"):
        corpus = find_corpus(args.corpus)
    of = "sentence pieces" if args.pieces == SENTENCEPIECE else "merges of BPE"
    artefact.check_path("DIR", args.folder)
    if not args.folder.exists():
        with blame("--pieces"):
            check_pieces(args.pieces)
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    with artefact.locked(args.folder.parent):  # who comes second finds what the first made
        if artefact.check(args.folder, settings(corpus, args.vocab, args.pieces)):
            print(f"found {args.folder}: {corpus.name} in {args.vocab} {of}")
            return 0
        try:
            counts = prepare(
                corpus, args.folder, args.vocab, args.downloads,
                lambda folder: fairseq_command.preprocess(folder, *corpus.languages, folder / DICTIONARY),
                args.pieces,
            )  # fmt: skip
        except RuntimeError as error:  # sentencepiece's own checks, or ours
            raise ValueError(f"--vocab: got {args.vocab}: {error}") from None
    pairs = ", ".join(f"{split} {kept}" for split, (kept, _) in counts.items())
    left_out = counts["train"][1]
    print(
        f"wrote {args.folder}: {corpus.name} ({pairs} pairs) in {args.vocab} {of}"
        + (f"; {left_out} training pairs left out, empty, too long or too unlike in length" if left_out else "")
    )
    return 0
