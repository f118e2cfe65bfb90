"""A number format that someone adds: one dataclass, one register, and every layer can use it."""

import math
from dataclasses import dataclass

import pytest
import torch

from fairseq_dsq import formats
from fairseq_dsq.nn import GemmConfig, linear
from fairseq_dsq.precision import parse_levels
from fairseq_dsq.quantized import fake_quantize, pack


@dataclass(frozen=True)
class PowerBoxes:
    """Boxes of four values, non-negative codes only."""

    bits: int

    box_size = 4
    min_code = 0
    signed_zero = False
    fixed_exponent = None

    @property
    def max_code(self):
        return 2 ** (self.bits - 1) - 1

    def nbytes(self, shape, dim=-1):
        boxes, rest = divmod(shape[dim], self.box_size)
        per_fibre = boxes * (1 + math.ceil(4 * self.bits / 8)) + (1 + math.ceil(rest * self.bits / 8) if rest else 0)
        return math.prod(shape) // shape[dim] * per_fibre


@pytest.fixture
def registered():
    formats.register("positive", lambda q, options: PowerBoxes(options.bits(q)))
    yield
    del formats._FAMILIES["positive"]


def test_a_registered_format_parses_packs_and_trains(registered):
    (level,) = parse_levels("[5,4,6,8]", "positive")
    assert formats.parse("positive5") == level.operands("output")[0]
    x, weight, grad = torch.randn(10, 6), torch.randn(7, 6), torch.randn(10, 7)
    assert torch.equal(fake_quantize(x, PowerBoxes(5)), fake_quantize(x, PowerBoxes(5)).clamp(min=0))
    for dim in (0, 1):
        packed = pack(x, PowerBoxes(5), dim)
        assert packed.nbytes == PowerBoxes(5).nbytes(x.shape, dim)
        assert torch.equal(packed.dequantize(), fake_quantize(x, PowerBoxes(5), dim))

    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    linear(*leaves, None, GemmConfig(level)).backward(grad)
    dx = fake_quantize(grad, PowerBoxes(8), 1) @ fake_quantize(weight, PowerBoxes(6), 0)
    dw = fake_quantize(grad, PowerBoxes(8), 0).t() @ fake_quantize(x, PowerBoxes(4), 0)
    assert torch.allclose(leaves[0].grad, dx, atol=1e-5)
    assert torch.allclose(leaves[1].grad, dw, atol=1e-5)


def test_a_name_is_registered_once(registered):
    with pytest.raises(ValueError, match="'positive' is registered already"):
        formats.register("positive", PowerBoxes)
