"""MX and NVFP4 against torchao, whole tensors bit for bit: scales, codes and values.

Where they differ on purpose: a block that holds Inf is NaN here, where torchao saturates it; blocks below float32's
normal numbers under the scale 2^-127, by which torchao multiplies but does not divide; from 2^127 on no rule raises the
scale here, so that nothing rounds to Inf; ``rceil`` is exact here, where torchao takes a rounded logarithm; a block's
scale in NVFP4 may be a subnormal E4M3 number here, down to 2^-9, where torchao's is 2^-6 at least; NVFP4's values are
rounded once, torchao's scales before that.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels.common import assert_equal_bits, awkward_tensor, seeded

from fairseq_dsq.formats import MX_RULES, NVFP4, definition, parse
from fairseq_dsq.quantized import fake_quantize, pack

pytest.importorskip("torchao", reason="torchao, which MX and NVFP4 are compared with, is not installed")
mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
nvfp4_tensor = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")

ELEMENTS = {
    "mxfp8e4m3": torch.float8_e4m3fn,
    "mxfp8e5m2": torch.float8_e5m2,
    "mxfp6e2m3": "fp6_e2m3",
    "mxfp6e3m2": "fp6_e3m2",
    "mxfp4": torch.float4_e2m1fn_x2,
}
SHAPE = 48, 320


def tensors():
    """Ordinary values, and of very different magnitudes, zeros and powers of two among them."""
    awkward = awkward_tensor(SHAPE, seed=1, finite=True)
    awkward[awkward.abs() < 2.0**-100] = 0.0
    return {
        "normal": torch.randn(SHAPE, generator=seeded(2)),
        "awkward": awkward.clamp(-(2.0**126), 2.0**126),
        "bfloat16": torch.randn(SHAPE, generator=seeded(3)).bfloat16(),
    }


def scales_and_codes(data, fmt):
    """Of packed rows that are whole blocks: a byte for each block, one for each value."""
    data = data[fmt.tensor_bytes :]
    blocks = SHAPE[0] * SHAPE[1] // fmt.group
    codes = definition.from_bytes(data[blocks:].view(blocks, -1), fmt.group, fmt.bits)
    return data[:blocks].view(SHAPE[0], -1), codes.view(SHAPE).to(torch.uint8)


def one_a_byte(codes):
    """torchao's codes of 4 bits lie two in a byte."""
    codes = codes.view(torch.uint8)
    return codes if codes.shape == SHAPE else torch.stack([codes & 15, codes >> 4], dim=-1).view(SHAPE)


@pytest.mark.parametrize("which", ["normal", "awkward", "bfloat16"])
@pytest.mark.parametrize(("name", "rule", "block"), itertools.product(ELEMENTS, MX_RULES, (32, 16)))
def test_mx_equals_torchao(name, rule, block, which):
    x = tensors()[which]
    fmt = parse(f"{name}{'/16' if block == 16 else ''}{'' if rule == 'floor' else '-' + rule}")
    mode = mx_tensor.ScaleCalculationMode(rule)
    theirs = mx_tensor.MXTensor.to_mx(x, ELEMENTS[name], block, mode)
    ours = pack(x, fmt)
    scales, codes = scales_and_codes(ours.data, fmt)
    expected = theirs.scale.view(torch.uint8).view(SHAPE[0], -1)
    same = scales == expected
    if rule == "rceil":  # their logarithm rounds a hair above a power of two down to it
        assert same.double().mean() > 0.99 and ((scales - expected)[~same] == 1).all()
    else:
        assert same.all()
    same = same.repeat_interleave(block, dim=1)
    assert torch.equal(codes[same], one_a_byte(theirs.qdata)[same])
    values = theirs.dequantize(torch.float32)
    kept = same & (scales > 0).repeat_interleave(block, dim=1)
    assert_equal_bits(ours.dequantize(torch.float32)[kept], values[kept])


@pytest.mark.parametrize("which", ["normal", "bfloat16"])
def test_nvfp4_equals_torchao(which):
    x = tensors()[which]
    scale = nvfp4_tensor.per_tensor_amax_to_scale(x.abs().max())
    theirs = nvfp4_tensor.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale)
    ours = pack(x, NVFP4())
    scales, codes = scales_and_codes(ours.data, NVFP4())
    assert torch.equal(ours.data[:4].view(torch.float32), scale.reshape(1))
    assert torch.equal(scales, theirs.scale.view(torch.uint8).view(SHAPE[0], -1))
    assert torch.equal(codes, one_a_byte(theirs.qdata))
    values = theirs.dequantize(torch.float32)
    assert ((ours.dequantize(torch.float32) - values).abs() <= values.abs() * 2.0**-23).all()


def test_a_small_block_keeps_more_in_nvfp4_than_torchao_gives_it():
    x = torch.ones(1, 32)
    x[0, 16:] = 3e-7 * torch.arange(16)
    scale = nvfp4_tensor.per_tensor_amax_to_scale(x.abs().max())
    theirs = nvfp4_tensor.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)
    errors = [(found - x)[0, 16:].norm() for found in (fake_quantize(x, NVFP4()), theirs)]
    assert errors[0] < errors[1] / 3
