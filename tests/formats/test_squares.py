"""Square boxes: block by block in plain formulas, in bytes, and one quantized weight for forward and backward."""

import math

import pytest
import torch

from fairseq_dsq.adam import Moments
from fairseq_dsq.formats import NVFP4, Square, parse
from fairseq_dsq.nn import GemmConfig, linear, matmul
from fairseq_dsq.precision import PrecisionConfig, parse_levels
from fairseq_dsq.quantized import ROUNDINGS, fake_quantize, pack

TEXTS = ["bfp4/16x16", "bfp8/4x4-fit", "mxfp4/32x32", "mxfp8e5m2/5x5-rceil", "mxint8/2x2"]
SHAPES = [(32, 48), (37, 50), (3, 20, 33), (7,), (1, 1), (0, 5), ()]


def uneven(*shape, seed=0):
    """Rows, columns and squares of different magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randint(-4, 5, shape, generator=generator).float().exp2()


def block_by_block(x, text):
    """Each square by itself, as a row of one scale."""
    fmt = parse(text)
    side, row = fmt.group.side, parse(text.replace(f"/{fmt.group}", "/row"))
    out = x.clone()
    for matrix in out.view(-1, *(1, 1, *x.shape)[-2:]) if x.numel() else ():
        for i in range(0, matrix.shape[0], side):
            for j in range(0, matrix.shape[1], side):
                block = matrix[i : i + side, j : j + side]
                block.copy_(fake_quantize(block.reshape(1, -1), row).view(block.shape))
    return out


@pytest.mark.parametrize("text", TEXTS)
def test_a_square_is_rounded_under_one_scale_whatever_the_dimension(text):
    assert str(parse(text)) == text and isinstance(parse(text).group, Square)
    for seed, shape in enumerate(SHAPES):
        x = uneven(*shape, seed=seed)
        expected = block_by_block(x, text)
        for dim in range(-x.dim(), x.dim()):
            assert torch.equal(fake_quantize(x, parse(text), dim), expected)
        if x.dim() == 2:
            assert torch.equal(fake_quantize(x.mT, parse(text)).mT, expected)


@pytest.mark.parametrize("text", [*TEXTS, "nvfp4/16x16"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_packed_bytes_give_the_rounded_values(text, rounding):
    fmt = parse(text)
    for seed, shape in enumerate(SHAPES):
        x = uneven(*shape, seed=seed)
        packed = pack(x, fmt, -1 if shape else 0, rounding, 5)
        assert torch.equal(packed.dequantize(), fake_quantize(x, fmt, -1 if shape else 0, rounding, 5))
        assert packed.nbytes == fmt.nbytes(shape)


def test_bytes_are_a_scale_and_the_codes_of_each_square():
    assert parse("bfp4/16x16").nbytes((32, 48)) == 6 * (1 + 128)
    # 37 = 2 * 16 + 5 and 50 = 3 * 16 + 2: codes of each square end on a byte.
    squares = 6 * (1 + 128) + 2 * (1 + 16) + 3 * (1 + 40) + (1 + 5)
    assert parse("bfp4/16x16").nbytes((37, 50)) == squares and parse("bfp4/16x16").nbytes((4, 37, 50)) == 4 * squares
    assert parse("nvfp4/16x16").nbytes((37, 50)) == 4 + squares


def test_nvfp4_s_squares_are_its_blocks_of_as_many_values():
    x = uneven(64, 48)
    blocks = x.unflatten(1, (-1, 16)).unflatten(0, (-1, 16)).transpose(1, 2)
    rows = fake_quantize(blocks.reshape(-1, 256), NVFP4(box_size=256))
    expected = rows.view(blocks.shape).transpose(1, 2).reshape(x.shape)
    assert torch.equal(fake_quantize(x, parse("nvfp4/16x16")), expected)


def test_a_nan_stays_in_its_square():
    x = uneven(40, 40)
    x[3, 20] = math.inf
    for text in ("bfp4/16x16", "nvfp4/16x16"):
        bad = fake_quantize(x, parse(text)).isnan()
        assert bad[:16, 16:32].all() and bad.sum() == 256


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("weight_format", ["bfp4/16x16", "mxfp4/32x32", "nvfp4/16x16"])
def test_forward_and_backward_read_the_same_weight(weight_format, rounding):
    q = f"float32|{weight_format}", "float32", weight_format, "float32"
    weight, x = uneven(24, 40), torch.eye(40, requires_grad=True)
    y = linear(x, weight, None, GemmConfig(PrecisionConfig(q), rounding))
    y.backward(torch.eye(24).repeat(2, 1)[:40])
    assert torch.equal(y.detach().mT, x.grad[:24])
    if rounding == "nearest":
        assert torch.equal(y.detach().mT, fake_quantize(weight, parse(weight_format)))


@pytest.mark.parametrize(
    "text", ["bfp4/16x8", "bfp4/0x0", "int8/16x16", "fixed8/4x4", "nvfp4/row", "bfp4/16x", "mxfp4/x4"]
)
def test_other_boxes_are_no_format(text):
    with pytest.raises(ValueError):
        parse(text)


@pytest.mark.parametrize("q", ["[S,4,4,16]", "[S|4,4,4,16]", "[4,S,4,16]", "[4,4,4,S]", "[4,4,4,4|S]"])
def test_squares_of_what_is_no_weight_are_refused(q):
    with pytest.raises(ValueError, match=r"level 0: q[013]: got .*bfp4/16x16.*, expected squares as a weight's boxes"):
        parse_levels(q.replace("S", "bfp4/16x16"))


def test_products_and_moments_have_no_weight():
    (level,) = parse_levels("[4|bfp4/16x16,4,4,16]")
    with pytest.raises(ValueError, match=r"matmul: got .* expected no squares"):
        matmul(torch.ones(1, 2, 3), torch.ones(1, 3, 2), GemmConfig(level))
    with pytest.raises(ValueError, match="moment1: got bfp8/16x16, expected no squares"):
        Moments(parse("bfp8/16x16"), parse("float32"))
