"""What checkpoints hold, and whether two of them hold the same."""

from functools import partial
from pathlib import Path

import torch

import fairseq_dsq  # noqa: F401  (registers the names that checkpoints refer to)

# Tensors by name, maybe within one another; NaN equals NaN.
assert_equal_states = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)


def load(path):
    """A checkpoint; a folder's last."""
    path = Path(path)
    file = path / "checkpoint_last.pt" if path.is_dir() else path
    return torch.load(file, map_location="cpu", weights_only=True)


def load_model(path):
    """The model's part of it."""
    return load(path)["model"]


def assert_equal_trainings(a, b):
    """Equal parameters, state of the schedule and state of the optimizer."""
    assert_equal_states(a["model"], b["model"])
    assert_equal_states(a["last_optimizer_state"]["state"], b["last_optimizer_state"]["state"])
