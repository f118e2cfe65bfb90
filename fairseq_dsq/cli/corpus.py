"""Write a small German-English parallel corpus of a toy grammar."""

from __future__ import annotations

import argparse
from pathlib import Path

from fairseq_dsq import artefact
from fairseq_dsq.recipes import fairseq_command
from fairseq_dsq.translation import toy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", type=Path, help="where to write")
    for name, size in (("train", 6000), ("valid", 300), ("test", 300)):
        text = f"number of {name} pairs (default: {size})"
        parser.add_argument(f"--{name}", type=int, default=size, metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="random seed (default: 1)")
    parser.add_argument(
        "--binarise", action="store_true",
        help="run fairseq-preprocess too, into DIR/bin; DIR is made whole or not at all, and kept if it is there",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    sizes = {"--train": args.train, "--valid": args.valid, "--test": args.test, "--seed": args.seed}
    made = f"{args.train} train, {args.valid} valid and {args.test} test German-English sentence pairs"
    if not args.binarise:
        toy.write(args.directory, *sizes.values())
    elif not _write_binarised(args.directory, sizes):
        print(f"found {made} in {args.directory}")
        return 0
    print(f"wrote {made} to {args.directory}")
    return 0


def _write_binarised(directory: Path, sizes: dict[str, int]) -> bool:
    """Write the corpus and its binarised form unless it is there, made so; returns whether it was written."""
    artefact.check_path("DIR", directory)
    settings = {name: str(size) for name, size in sizes.items()}
    directory.parent.mkdir(parents=True, exist_ok=True)
    with artefact.locked(directory.parent):
        if artefact.check(directory, settings):
            return False
        with artefact.atomic(directory) as partial:
            toy.write(partial, *sizes.values())
            fairseq_command.preprocess(partial, "de", "en")
            artefact.write(partial, settings)
    return True
