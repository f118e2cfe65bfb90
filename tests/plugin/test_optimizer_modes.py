"""What half precision's modes do to gradients and parameters, and with what they are refused: without a GPU."""

import argparse

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_dsq.adam import LowBitAdam
from fairseq_dsq.errors import DSQError
from fairseq_dsq.plugin import modes
from fairseq_dsq.plugin.optimizer import DSQAdam, DSQAdamConfig, refuse_foreign_states

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


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ({"ffn_blocks_to_remove": 8}, ["ffn_blocks_to_remove"]),
        ({"mha_heads_to_keep": 1}, ["mha_heads_to_keep"]),
        ({"mha_heads_to_keep": 0}, ["mha_heads_to_keep"]),
        ({"ffn_blocks_to_remove": -1, "mha_heads_to_keep": -1, "mha_reg_scale_factor": 0.5}, []),
        ({"dsq_weights": "direct", "optimizer": "dsq_adam", "mha_reg_scale_factor": 0.5}, ["mha_reg_scale_factor"]),
        ({"dsq_weights": "direct", "optimizer": "dsq_adam", "ffn_reg_scale_factor": 0.5}, ["ffn_reg_scale_factor"]),
        ({"dsq_weights": "direct", "optimizer": "dsq_adam", "ffn_reg_scale_factor": 0.0}, []),
    ],
)
def test_what_replaces_layers_or_reads_their_floats_is_refused(flags, refused):
    assert [name for name, _ in modes._refused(argparse.Namespace(**flags))] == refused


def test_a_composite_optimizer_is_refused_where_a_part_holds_low_bits():
    parameter = torch.nn.Parameter(torch.ones(3))

    def composed(*parts):
        optimizers = {str(index): argparse.Namespace(optimizer=part) for index, part in enumerate(parts)}
        return argparse.Namespace(optimizer=argparse.Namespace(optimizers=optimizers))

    adam, low = torch.optim.Adam([parameter]), LowBitAdam([parameter])
    refuse_foreign_states(composed(adam, adam))
    with pytest.raises((DSQError, SystemExit), match="--optimizer: got composite with dsq_adam in it, expected dsq"):
        refuse_foreign_states(composed(adam, low))


STATIC = {"dsq_format": "fixed", "dsq_fixed_scale": "static", "fp16_no_flatten_grads": True}


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ({**STATIC, "amp": True}, ["amp"]),
        ({**STATIC, "fp16": True}, ["fp16"]),
        ({**STATIC, "bf16": True}, []),
        ({**STATIC, "amp": True, "dsq_fixed_scale": "dynamic"}, []),
        ({**STATIC, "amp": True, "dsq_format": "bfp"}, []),
        ({"amp": True, "dsq_levels": "[8,8,8,8] [8,8,8,fixed16.8|bfp8]"}, ["amp"]),
        ({"amp": True, "dsq_levels": "[fixed16.8,8,8,8]"}, []),
        ({"amp": True, "dsq_rules": "*.fc2=[8,8,8,fixed16.8]"}, ["amp"]),
    ],
)
def test_a_static_scale_of_gradients_is_refused_beside_a_loss_scale(flags, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = dict(modes._refused(argparse.Namespace(**flags)))
    assert list(found) == refused
    assert all("beside --dsq-fixed-scale static" in why or "fixed16.8 in --dsq-" in why for why in found.values())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("float32", "float32", "nearest"), True),
        (("float32", "log8/row", "nearest"), False),
        (("int8/row", "float32", "nearest"), False),
        (("float32", "float32", "stochastic"), False),
    ],
)
def test_rounding_of_moments_that_are_float32_is_said_to_have_no_effect(flags, said, caplog):
    fields = dict(zip(("dsq_moment1", "dsq_moment2", "dsq_moment_rounding"), flags, strict=True))
    config = DSQAdamConfig(lr=[0.1], adam_betas="(0.9, 0.98)", seed=1, **fields)
    DSQAdam(config, [torch.nn.Parameter(torch.zeros(2))])
    assert caplog.messages == ["--dsq-moment-rounding nearest: has no effect with moments in float32"] * said
