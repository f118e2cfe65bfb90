"""Print the flags of fairseq-train that fine-tune an encoder on a prepared GLUE task, one a line."""

from __future__ import annotations

import argparse
from pathlib import Path

from fairseq_dsq.cli.glue_prepare import add_encoder_arguments
from fairseq_dsq.glue.encoder import MODEL, find
from fairseq_dsq.glue.prepare import BIN, Prepared, training_flags

# The recipe of fairseq's examples/roberta/README.glue.md: warm-up over the first 6 % of the updates, then decay to 0.
WARMUP_SHARE = 0.06


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="prepared folder; options come before it")
    parser.add_argument(
        "flags",
        nargs=argparse.REMAINDER,
        metavar="-- FLAGS",
        help="more flags of fairseq-train; options come before DIR",
    )
    add_encoder_arguments(parser)


def main(args: argparse.Namespace) -> int:
    from fairseq_dsq.glue.sentence_prediction import parse, updates_per_epoch

    prepared = Prepared.load(args.folder)
    encoder = find(args.encoder, args.downloads)
    own = [flag for flag in args.flags if flag != "--"]
    flags = [
        str(args.folder / BIN), *encoder.arch_flags(), "--finetune-from-model", str(encoder.folder / MODEL),
        *training_flags(prepared), *own,
    ]  # fmt: skip
    # What the decay needs does not change the batches.
    config = parse([*flags, "--total-num-update", "1"])
    epochs = config.optimization.max_epoch
    if epochs < 1:
        raise ValueError(f"--max-epoch: got {epochs}, expected an integer >= 1")
    updates = epochs * updates_per_epoch(config)
    schedule = ["--total-num-update", str(updates), "--warmup-updates", str(round(WARMUP_SHARE * updates))]
    # A flag of the user's own is the last, and stands.
    print("\n".join([*flags[: len(flags) - len(own)], *schedule, *own]))
    return 0
