"""The perplexity of a run's best checkpoint by fairseq-eval-lm; what that checkpoint has is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from fairseq_dsq.recipes.scoring import score_best

EVALUATED, PERPLEXITY = "eval-lm.out", "perplexity.json"
_RESULT = re.compile(r"Loss \(base 2\): ([0-9.]+), Perplexity: ([0-9.]+)")


def perplexity(folder: Path, flags: Sequence[str]) -> float:
    """Evaluate with ``flags`` (the data first, no --path), unless that is done; returns the perplexity of a token.

    Raises:
        OSError: no checkpoint.
        ValueError: no perplexity came out; or another command is at work there.
        FailedError: fairseq-eval-lm failed; its output is in ``folder``/eval-lm.out.
    """
    return float(score_best("fairseq-eval-lm", folder, flags, (EVALUATED, PERPLEXITY), _measure)["perplexity"])


def _measure(output: Path) -> str:
    found = _RESULT.findall(output.read_text(encoding="utf-8", errors="replace"))
    if not found:
        raise ValueError(f"{output}: got no finite perplexity, expected one of fairseq-eval-lm")
    loss, value = map(float, found[-1])
    return json.dumps({"name": "perplexity", "perplexity": value, "loss": loss}) + "\n"
