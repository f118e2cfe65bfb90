"""To add a schedule: a file that registers a policy. Its flags and its state in checkpoints follow from its fields.

In fairseq_dsq/schedules/ (and named in its __init__.py) it may have flags of its own; in a --user-dir, as here, it
uses those that there are. What fairseq logs, such as the gradient norm, is read from its meters: Policy.on_update says
how.
"""

import torch

POLICY = '''
"""Raises the level as soon as a validation is not better than the one before by more than --dsq-min-delta."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from fairseq_dsq.flags import flag, number
from fairseq_dsq.schedules import Policy, State, register


@dataclass(frozen=True)
class ImpatientState(State):
    last_loss: float = math.inf


@register
@dataclass(frozen=True)
class Impatient(Policy[ImpatientState]):
    name: ClassVar[str] = "impatient"
    min_delta: float = flag(0.0, number("a finite number", math.isfinite), "D", "the least gain", "schedule")

    def start(self):
        return ImpatientState()

    def on_validation(self, state, loss):
        rises = loss >= state.last_loss - self.min_delta and state.level + 1 < self.num_levels
        return replace(state, level=state.level + rises, last_loss=loss)

    def why(self, before, after):
        return f"after a loss of {after.last_loss}, {before.last_loss} before"
'''


def test_a_schedule_is_one_file(cli, tmp_path):
    user_dir = tmp_path / "impatient_dsq"
    user_dir.mkdir()
    (user_dir / "__init__.py").write_text("import fairseq_dsq\nfrom impatient_dsq import impatient\n")
    (user_dir / "impatient.py").write_text(POLICY)
    assert 15 <= len(POLICY.strip().splitlines()) <= 40
    flags = ("--user-dir", user_dir, "--dsq-schedule", "impatient", "--dsq-min-delta", 100, "--max-epoch")
    log = cli.train(tmp_path / "run", *flags, 2)
    assert "precision rises from [4,4,4,16] to [16,4,4,16] after a loss of " in log
    model = torch.load(tmp_path / "run/checkpoint_last.pt")["model"]
    assert model["dsq.level"] == 1 and 3 < model["dsq.last_loss"] < 9
