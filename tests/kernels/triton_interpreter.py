"""The CUDA kernels against the definition, bit for bit, in Triton's interpreter: test_triton.py runs this file.

TRITON_INTERPRET=1 has to be set before Triton is imported, so it gets a process of its own.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from kernels.common import (
    SHAPES_AND_DIMS,
    Odd,
    assert_equal_bits,
    assert_implements_definition,
    awkward_tensor,
    odd_registered,
    seeded,
)

from fairseq_dsq.formats import MXFP4, BlockFloat, FixedPoint, MXInt8, definition
from fairseq_dsq.kernels import ops, triton_kernels
from fairseq_dsq.quantized import ROUNDINGS

assert os.environ.get("TRITON_INTERPRET") == "1"

SEEDS = (None, 123456789 << 32 | 0xFFFFFFF0)
WIDTHS = [*range(2, 18), 20, 24, 25, 26, 31, 32]
# Both sides of a tile of 64 boxes along an outer dimension; short boxes along the last.
EDGES = [((2, 35, 33), 1), ((3, 40), -1)]


@pytest.fixture(autouse=True)
def kernels_for_any_device(monkeypatch):
    monkeypatch.setattr(ops, "_kernels", lambda device: triton_kernels)


assert_equals_definition = assert_implements_definition


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width(bits):
    for index, (shape, dim) in enumerate(EDGES):
        x = awkward_tensor(shape, seed=bits + index)
        assert_equals_definition(x, BlockFloat(bits), dim, SEEDS[(bits + index) % 2])


@pytest.mark.parametrize("seed", SEEDS, ids=ROUNDINGS)
@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_DIMS, ids=str)
def test_every_shape(shape, dim, seed):
    for fmt in (BlockFloat(4), BlockFloat(5, 6)):
        assert_equals_definition(awkward_tensor(shape, seed=3), fmt, dim, seed)


@pytest.mark.parametrize("box_size", [1, 3, 8, 32, 100, 256])
def test_every_box_size(box_size):
    assert triton_kernels.covers(BlockFloat(7, box_size).spec)
    for seed in SEEDS:
        assert_equals_definition(awkward_tensor((3, 270), seed=4), BlockFloat(7, box_size), 1, seed)
        assert_equals_definition(awkward_tensor((270, 3), seed=5), BlockFloat(4, box_size), 0, seed)


@pytest.mark.parametrize("seed", SEEDS, ids=ROUNDINGS)
@pytest.mark.parametrize("bits", [2, 4, 9, 16, 32])
def test_ties_and_special_values(bits, seed):
    halves = torch.arange(-40, 40) / 2.0  # of a step, where the box's largest is 2^(bits - 2)
    largest = torch.finfo(torch.float32).max
    boxes = [
        *torch.cat([halves, halves.new_full((16,), 0.75)]).view(6, 16).clamp(-(2.0 ** (bits - 2)), 2.0 ** (bits - 2)),
        torch.zeros(16),
        -torch.zeros(16),
        torch.full((16,), -(2.0**-149)),
        torch.tensor([2.0**-149, 2.0**-130, -(2.0**-127), 2.0**-126] * 4),
        torch.tensor([largest, -largest, 2.0**-149, -(2.0**-149)] * 4),
        torch.tensor([math.inf, -math.inf, largest, -1.0] * 4),
        torch.tensor([math.nan, -math.nan, -largest, 0.0] * 4),
        torch.tensor([1.0, 2.0**-150, -(2.0**-140), -(2.0**-30)] * 4),
    ]
    x = torch.stack(boxes)
    assert_equals_definition(x, BlockFloat(bits), 1, seed)
    assert_equals_definition(x.T.contiguous(), BlockFloat(bits), 0, seed)


@pytest.mark.parametrize("seed", SEEDS, ids=ROUNDINGS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16, 24, 25, 32])
def test_a_scale_that_fits(bits, seed):
    fmt = BlockFloat(bits, scale="fit")
    assert triton_kernels.covers(fmt.spec)
    top = 2.0 - 2.0 ** (2 - bits)  # the largest code's value where the exponent is 0
    tops = torch.tensor(
        [top, 1.0, 1.5, 2 - 2.0**-23, 2.0, torch.finfo(torch.float32).max, 2.0**-130, math.inf, math.nan]
    )
    x = torch.randn(len(tops), 16, generator=seeded(2)).clamp(-1, 1)
    x[:, 3] = tops
    x[6] *= 2.0**-127
    x[[0, 1], 5] = -torch.nextafter(tops[:2], torch.tensor(9.0))
    for y, dim in ((x, 1), (x.T.contiguous(), 0), (awkward_tensor((35, 40), seed=bits), 1)):
        assert_equals_definition(y, fmt, dim, seed)


def test_offsets_of_64_bits(monkeypatch):
    monkeypatch.setattr(triton_kernels, "WIDE_FROM", 0)
    for seed in SEEDS:
        for shape, dim in EDGES:
            assert_equals_definition(awkward_tensor(shape, seed=1), BlockFloat(5), dim, seed)


def test_other_formats_take_the_plain_path():
    for fmt in (
        FixedPoint(8),
        FixedPoint(8, 4),
        BlockFloat(4, 257),
        Odd(5, 16, (0, 15), False),
        Odd(6, 16, (-3, 31), True),
        Odd(7, 16, (-63, 63), True, -40),
        MXFP4(),
        MXInt8(),
    ):
        assert not triton_kernels.covers(fmt.spec)
        with odd_registered():
            assert_equals_definition(awkward_tensor((5, 20), seed=1, finite=True), fmt, 1, None)


def test_operand_and_stash_at_once():
    x = torch.randn(20, 40, generator=seeded(1)).bfloat16()
    operand, stash = ops.quantize_and_pack(x, "bfp4", "bfp2", x.dtype)
    assert_equal_bits(operand, definition.fake_quantize(x, BlockFloat(4), -1, None, x.dtype))
    assert torch.equal(stash, definition.pack(x, BlockFloat(2), -2, None))


def test_bytes_that_do_not_fit_the_shape_are_refused():
    with pytest.raises(ValueError, match=r"data: got 9 of torch.uint8, expected 18 of torch.uint8"):
        ops.unpack(torch.zeros(9, dtype=torch.uint8), [32], 0, "bfp4", torch.float32)


def test_a_device_is_checked(monkeypatch):
    device = torch.device("cpu")
    triton_kernels.check(device)
    monkeypatch.setattr(triton_kernels, "_rounding", lambda spec, seed: {"MAX_CODE": 6.0, "STOCHASTIC": False})
    with pytest.raises(RuntimeError, match="the result is not that of the definition"):
        triton_kernels.check(device)
