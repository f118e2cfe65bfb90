"""Translate the test set with a run's best checkpoint and score it with sacreBLEU; what that checkpoint has is kept."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fairseq_dsq import artefact
from fairseq_dsq.recipes import fairseq_command
from fairseq_dsq.recipes.scoring import score_best

OUTPUT, SCORE = "generate.out", "score.json"
# The run's copy of the reference, without its suffix: paired tests need it.
REFERENCE = "reference"
TOKENIZE = "13a"  # sacreBLEU's own


def translate(folder: Path, reference: Path, flags: Sequence[str], digits: int = 2, tokenize: str = TOKENIZE) -> float:
    """Translate with fairseq-generate and ``flags`` (the data first, no --path), unless that is done; returns BLEU.

    The translations and the reference, line by line, are in ``folder`` afterwards.

    Args:
        tokenize: sacreBLEU's tokenizer.

    Raises:
        OSError: no checkpoint.
        ValueError: there are not as many translations as lines in the reference, sacreBLEU failed, or another command
            is at work there.
        FailedError: fairseq-generate failed; its output is in ``folder``/generate.out.
    """
    hypotheses = folder / f"hypotheses{reference.suffix}"

    def measure(output: Path) -> str:
        _collect(output, hypotheses, reference)
        with artefact.atomic(folder / f"{REFERENCE}{reference.suffix}") as partial:
            shutil.copyfile(reference, partial)
        return _sacrebleu(reference, hypotheses, digits, tokenize)

    more = {"REFERENCE": artefact.checksum(reference), "--digits": str(digits)}
    if tokenize != TOKENIZE:
        more["--tokenize"] = tokenize
    score = score_best("fairseq-generate", folder, flags, (OUTPUT, SCORE), measure, more, needs=[hypotheses])
    return float(score["score"])


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


def _sacrebleu(reference: Path, hypotheses: Path, digits: int, tokenize: str) -> str:
    command = [sys.executable, "-m", "sacrebleu", str(reference), "-i", str(hypotheses), "-m", "bleu"]
    command += ["--tokenize", tokenize]
    done = subprocess.run([*command, "-w", str(digits), "--force"], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"sacrebleu: {fairseq_command.last_error(done.stderr) or done.stderr.strip()}")
    return done.stdout
