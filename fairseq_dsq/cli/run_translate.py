"""Translate the test set with a run's best checkpoint and score it with sacreBLEU; what that checkpoint has is kept."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from fairseq_dsq import artefact
from fairseq_dsq.cli import fairseq_command
from fairseq_dsq.cli.run_train import identity

BEST, OUTPUT, SCORE = "checkpoint_best.pt", "generate.out", "score.json"


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
    given = args.flags[1:] if args.flags[:1] == ["--"] else args.flags
    best, output, score = (args.folder / name for name in (BEST, OUTPUT, SCORE))
    artefact.check_path("RUN", args.folder)
    if not best.is_file():
        raise OSError(f"{best}: does not exist, expected the checkpoint of a run")
    hypotheses = args.folder / f"hypotheses{args.reference.suffix}"
    settings = {
        **identity(given), artefact.CHECKPOINT: artefact.checksum(best), "REFERENCE": artefact.checksum(args.reference),
        "--digits": str(args.digits),
    }  # fmt: skip
    with artefact.locked(args.folder, wait=False) as lock:
        if not (hypotheses.is_file() and artefact.made_by(score, settings)):
            for path in (output, score):
                artefact.stamp(path).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            flags = [*given, "--user-dir", str(fairseq_command.USER_DIR), "--path", str(best.resolve())]
            try:
                fairseq_command.call("fairseq-generate", flags, output, pass_fds=[lock])
            except fairseq_command.FailedError as error:
                print(error, file=sys.stderr)
                return 1
            artefact.write(output, settings)
            _collect(output, hypotheses, args.reference)
            _score(args.reference, hypotheses, args.digits, score)
            artefact.write(score, settings)
    print(json.loads(score.read_text(encoding="utf-8"))["score"])
    return 0


def _collect(output: Path, hypotheses: Path, reference: Path) -> None:
    """Write the translations in the order of the test set.

    Raises:
        ValueError: there are not as many as lines in the reference.
    """
    found = {}
    with open(output, encoding="utf-8", newline="\n") as file:
        for line in file:
            if line.startswith("D-"):
                number, _, text = line.rstrip("\n").split("\t", 2)
                found[int(number[2:])] = text
    with open(reference, encoding="utf-8", newline="\n") as file:
        expected = sum(1 for _ in file)
    if sorted(found) != list(range(expected)):
        raise ValueError(f"{output}: got {len(found)} translations, expected the {expected} of {reference}")
    with artefact.atomic(hypotheses) as partial:
        partial.write_text("".join(f"{found[number]}\n" for number in range(expected)), encoding="utf-8")


def _score(reference: Path, hypotheses: Path, digits: int, score: Path) -> None:
    command = [sys.executable, "-m", "sacrebleu", str(reference), "-i", str(hypotheses), "-m", "bleu"]
    done = subprocess.run([*command, "-w", str(digits), "--force"], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"sacrebleu: {fairseq_command.last_error(done.stderr) or done.stderr.strip()}")
    with artefact.atomic(score) as partial:
        partial.write_text(done.stdout, encoding="utf-8")
