"""Elements under a float32 scale: integers, ternary numbers and logarithmic codes, through bytes and factors."""

import pytest
import torch
from nn.common import normal

from fairseq_dsq.formats import Integer, Logarithmic, Ternary, parse
from fairseq_dsq.quantized import factorize, fake_quantize, pack

GROUPS = ("row", "tensor", 1, 5, 16, 128)
FORMATS = [kind(bits, group) for kind in (Integer, Logarithmic) for bits in (2, 3, 4, 8, 12, 16) for group in GROUPS]
FORMATS += [Ternary(group_size=group) for group in GROUPS]


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_bytes_are_those_of_the_formula_and_give_the_rounded_values(fmt, dim):
    assert parse(str(fmt)) == fmt
    x = normal(3, 17, 6, seed=fmt.bits)
    x = x if fmt.signed else x.mul_(8).exp2_()
    packed = pack(x, fmt, dim)
    assert packed.nbytes == fmt.nbytes(x.shape, dim)
    assert torch.equal(packed.dequantize(), fake_quantize(x, fmt, dim))
    if isinstance(fmt.group, str):
        for elements, scale in (packed.factorize(), factorize(x, fmt, dim)):
            assert torch.equal(elements * scale, packed.dequantize())
            if fmt.integer_elements:
                assert torch.equal(elements, elements.round()) and elements.abs().max() == fmt.max_code
