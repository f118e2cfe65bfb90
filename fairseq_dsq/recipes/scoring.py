"""What a command of fairseq makes of a run's best checkpoint, and its score; what that checkpoint has is kept."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fairseq_dsq import artefact
from fairseq_dsq.recipes import fairseq_command
from fairseq_dsq.recipes.training import identity, refuse_own


def score_best(
    command: str,
    folder: Path,
    flags: Sequence[str],
    files: tuple[str, str],
    measure: Callable[[Path], str],
    more: Mapping[str, str] | None = None,
    needs: Sequence[Path] = (),
) -> Any:
    """Run ``command`` on the best checkpoint of ``folder`` and write its score, unless that is done; the score's JSON.

    Args:
        command: fairseq-generate or fairseq-eval-lm.
        flags: its arguments (the data first, no --path).
        files: the names of its output and of the score, in the folder.
        measure: gives the score, JSON, of the output.
        more: settings beside the flags and the checkpoint that the score depends on.
        needs: files that have to be there for it to be done.

    Raises:
        OSError: no checkpoint.
        ValueError: another command is at work there; a flag that is given already; or of ``measure``.
        FailedError: the command failed; what it said is in its output.
    """
    best, output, score = (folder / name for name in (artefact.BEST, *files))
    own = {"--path": str(best.resolve())}
    refuse_own(flags, own)
    artefact.check_path("RUN", folder)
    if not best.is_file():
        raise OSError(f"{best}: does not exist, expected the checkpoint of a run")
    settings = {**identity(flags), artefact.CHECKPOINT: artefact.checksum(best), **(more or {})}
    with artefact.locked(folder, wait=False) as lock:
        if not (all(path.is_file() for path in needs) and artefact.made_by(score, settings)):
            for path in (output, score):
                artefact.stamp(path).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            words = [*fairseq_command.with_user_dir(flags), *itertools.chain(*own.items())]
            fairseq_command.call(command, words, output, pass_fds=[lock])
            artefact.write(output, settings)
            measured = measure(output)
            with artefact.atomic(score) as partial:
                partial.write_text(measured, encoding="utf-8")
            artefact.write(score, settings)
    return json.loads(score.read_text(encoding="utf-8"))
