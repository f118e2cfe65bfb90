"""Around fairseq-train with its task ``sentence_prediction``: binarised data, how many updates, predictions."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, options, tasks, utils

from fairseq_dsq.plugin.probe import training_config

TASK = "sentence_prediction"
_MAX_TOKENS = 4400


@dataclass(frozen=True)
class Model:
    """A model of a checkpoint with its task, in evaluation mode, at the precision level of the checkpoint.

    Attributes:
        model: fairseq's.
        task: fairseq's, over the data that it was loaded with.
        outputs: classes; 1 for a regression.
        head: name of the classification head.
        level: index of the precision level and the level itself; None for a model without DSQ layers.
    """

    model: Any
    task: Any
    outputs: int
    head: str
    level: tuple[int, str] | None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the log and the data loader's warnings to themselves: fairseq logs all it does to standard error."""
    loggers = [logging.getLogger(name) for name in ("fairseq", "fairseq_dsq")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@_quiet()
def parse(flags: Sequence[str]) -> Any:
    """As :func:`fairseq_dsq.plugin.probe.training_config`."""
    return training_config(flags)


def binarise(folder: Path, side: str, dictionary: Path, splits: Sequence[str]) -> None:
    """Run fairseq-preprocess on the files SPLIT.side of ``folder``, into its bin/side.

    Args:
        folder: holds the text files.
        side: input0, input1 or label.
        dictionary: fairseq's, of the symbols.
        splits: train and the validation sets, which are to be named as fairseq-preprocess names them.

    Raises:
        OSError: a file cannot be read or written.
    """
    from fairseq_cli import preprocess  # prints fairseq's log from here on

    preprocess.logger.propagate = False
    valid = ",".join(str(folder / f"{split}.{side}") for split in splits[1:])
    flags = [
        "--only-source", "--srcdict", str(dictionary), "--trainpref", str(folder / f"{splits[0]}.{side}"),
        "--validpref", valid, "--destdir", str(folder / "bin" / side),
    ]  # fmt: skip
    preprocess.main(options.get_preprocessing_parser().parse_args(flags))
    for handler in preprocess.logger.handlers[:]:  # each call adds its own
        preprocess.logger.removeHandler(handler)
        handler.close()


@_quiet()
def updates_per_epoch(config: Any) -> int:
    """Optimizer steps of an epoch of fairseq-train with this configuration, from its own batches.

    Raises:
        ValueError: the data cannot be batched so; the message is fairseq's.
    """
    task = tasks.setup_task(config.task)
    dataset = task.load_dataset(config.dataset.train_subset)
    try:
        batches = task.get_batch_iterator(
            dataset,
            max_tokens=config.dataset.max_tokens,
            max_sentences=config.dataset.batch_size,
            max_positions=task.max_positions(),
            required_batch_size_multiple=config.dataset.required_batch_size_multiple,
            seed=config.common.seed,
            num_shards=max(1, config.distributed_training.distributed_world_size),
        )
    except Exception as error:  # fairseq raises no narrower one
        raise ValueError(f"{config.task.data}: {' '.join(str(error).split())}") from None
    update_freq: int = config.optimization.update_freq[0]
    return math.ceil(len(batches) / update_freq)


@_quiet()
def load(checkpoint: Path, data: Path) -> Model:
    """The model that a checkpoint of ``sentence_prediction`` holds.

    Args:
        checkpoint: written by fairseq-train.
        data: the binarised data to predict.

    Raises:
        ValueError: a file cannot be read, or holds no checkpoint or one of another task.
    """
    state = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint), {"data": str(data)})
    name = getattr(state["cfg"].get("task"), "_name", None)
    if name != TASK:
        raise ValueError(f"{checkpoint}: got a checkpoint of the task {name!r}, expected {TASK}")
    models, config, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], state=state)
    model = models[0].eval()
    if torch.cuda.is_available():
        model = model.cuda()
    dsq = getattr(model, "dsq", None)
    level = None if dsq is None else (dsq.level_in_force, str(dsq.levels[dsq.level_in_force]))
    return Model(model, task, config.task.num_classes, config.task.classification_head_name, level)


@_quiet()
def predict(loaded: Model, split: str) -> tuple[list[float], list[float]]:
    """Targets and predictions for every example of a split, in its order: class indices, or scores."""
    dataset = loaded.task.load_dataset(split)
    # A multiple above 1 would leave the last examples out.
    batches = loaded.task.get_batch_iterator(
        dataset, max_tokens=max(_MAX_TOKENS, loaded.task.max_positions()), required_batch_size_multiple=1
    ).next_epoch_itr(shuffle=False)
    device = next(loaded.model.parameters()).device
    regression = loaded.task.cfg.regression_target
    found: dict[int, tuple[float, float]] = {}
    with torch.no_grad():
        for batch in batches:
            batch = utils.move_to_cuda(batch) if device.type == "cuda" else batch
            logits = loaded.model(**batch["net_input"], features_only=True, classification_head_name=loaded.head)[0]
            predictions = logits.view(-1) if regression else logits.argmax(dim=1)
            pairs = zip(batch["target"].view(-1).tolist(), predictions.tolist(), strict=True)
            found |= dict(zip(batch["id"].tolist(), pairs, strict=True))
    assert len(found) == len(dataset), f"{split}: {len(found)} predictions for {len(dataset)} examples"
    targets, results = zip(*(found[index] for index in sorted(found)), strict=True)
    return list(targets), list(results)
