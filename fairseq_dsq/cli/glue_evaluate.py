"""Score a fine-tuned checkpoint on a GLUE task's development sets with the task's own metrics."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fairseq_dsq import artefact
from fairseq_dsq.glue import find_task, metrics
from fairseq_dsq.glue.prepare import BIN, Prepared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="prepared folder")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint of fairseq-train")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the scores as JSON; fairseq-dsq report finds a run's glue.json"
    )


def main(args: argparse.Namespace) -> int:
    from fairseq_dsq.glue.sentence_prediction import load, predict

    prepared = Prepared.load(args.folder)
    task = find_task(prepared.task)
    model = load(args.checkpoint, args.folder / BIN)
    if model.outputs != task.outputs:
        raise ValueError(f"{args.checkpoint}: got {model.outputs} classes, expected the {task.outputs} of {task.name}")
    scores: dict[str, float | None] = {}
    rows: dict[str, int] = {}
    for split, (_, suffix) in zip(prepared.valid_splits, task.dev, strict=False):
        targets, predictions = predict(model, split)
        found = metrics.score(task.metrics, targets, predictions)
        scores |= {f"{metric}{suffix}": value for metric, value in found.items()}
        rows[split] = len(targets)
    level, precision = model.level or (None, None)
    result = {
        "name": metrics.RESULT, "task": task.name, "scores": scores, "rows": rows, "level": level,
        "precision": precision, "checkpoint": str(args.checkpoint),
    }  # fmt: skip
    if args.out:
        artefact.stamp(args.out).unlink(missing_ok=True)
        with artefact.atomic(args.out) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        artefact.write(
            args.out,
            {artefact.CHECKPOINT: artefact.checksum(args.checkpoint), "DIR": artefact.content(args.folder / BIN)},
        )
    at = f" at level {level}, {precision}" if model.level else ""
    values = ", ".join(f"{name} {'undefined' if value is None else f'{value:.2f}'}" for name, value in scores.items())
    print(f"{task.name}, {sum(rows.values())} rows{at}: {values}")
    return 0
