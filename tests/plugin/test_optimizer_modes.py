"""--fp16's flat copy of all parameters has no rows for low-bit moments: refused where the optimizer's name stands."""

import argparse

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_dsq.plugin import modes

HALF = {"fp16": True, "optimizer": "dsq_adam"}


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        (HALF, ["fp16"]),
        ({**HALF, "fp16_no_flatten_grads": True}, []),
        ({**HALF, "memory_efficient_fp16": True}, []),
        ({**HALF, "optimizer": "adam"}, []),
        ({**HALF, "fp16": False}, []),
    ],
)
def test_flat_parameters_are_refused(flags, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [name for name, _ in modes._refused(argparse.Namespace(**flags))] == refused
    common = {name: value for name, value in flags.items() if name != "optimizer"}
    root = OmegaConf.create({"model": {"x": 1}, "common": common, "optimizer": {"_name": flags["optimizer"]}})
    assert [name for name, _ in modes._refused(root.model)] == refused
