"""The perplexity of a run's best checkpoint by fairseq-eval-lm; what that checkpoint has is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from fairseq_dsq import artefact
from fairseq_dsq.recipes import fairseq_command
from fairseq_dsq.recipes.training import identity
from fairseq_dsq.recipes.translating import BEST

EVALUATED, PERPLEXITY = "eval-lm.out", "perplexity.json"
_RESULT = re.compile(r"Loss \(base 2\): ([0-9.]+), Perplexity: ([0-9.]+)")


def perplexity(folder: Path, flags: Sequence[str]) -> float:
    """Evaluate with ``flags`` (the data first, no --path), unless that is done; returns the perplexity of a token.

    Raises:
        OSError: no checkpoint.
        ValueError: no perplexity came out; or another command is at work there.
        FailedError: fairseq-eval-lm failed; its output is in ``folder``/eval-lm.out.
    """
    best, output, score = (folder / name for name in (BEST, EVALUATED, PERPLEXITY))
    artefact.check_path("RUN", folder)
    if not best.is_file():
        raise OSError(f"{best}: does not exist, expected the checkpoint of a run")
    settings = {**identity(flags), artefact.CHECKPOINT: artefact.checksum(best)}
    with artefact.locked(folder, wait=False) as lock:
        if not artefact.made_by(score, settings):
            for path in (output, score):
                artefact.stamp(path).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            own = ["--user-dir", str(fairseq_command.USER_DIR), "--path", str(best.resolve())]
            fairseq_command.call("fairseq-eval-lm", [*flags, *own], output, pass_fds=[lock])
            artefact.write(output, settings)
            found = _RESULT.findall(output.read_text(encoding="utf-8", errors="replace"))
            if not found:
                raise ValueError(f"{output}: got no finite perplexity, expected one of fairseq-eval-lm")
            loss, value = map(float, found[-1])
            with artefact.atomic(score) as partial:
                record = {"name": "perplexity", "perplexity": value, "loss": loss}
                partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
            artefact.write(score, settings)
    return float(json.loads(score.read_text(encoding="utf-8"))["perplexity"])
