"""Outside oracles: qtorch, and vectors that microxcaling computed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from kernels.common import assert_equal_bits, seeded

from fairseq_dsq.formats import BlockFloat, FixedPoint
from fairseq_dsq.quantized import fake_quantize, pack

REPOSITORY = Path(__file__).resolve().parents[2]

# qtorch rounds within float32's 23 fraction bits; beyond 22 bits its shift counts turn negative.
QTORCH_WIDTHS = range(2, 23)


@pytest.fixture(scope="module")
def qtorch_quant():
    """qtorch.quant, which compiles its kernels when first imported."""
    pytest.importorskip("qtorch", reason="the oracle qtorch is not installed (extra: dev)")
    try:
        import qtorch.quant
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"the oracle qtorch cannot build its kernels here: {error}")
    return qtorch.quant


@pytest.fixture(scope="module")
def boxes():
    """4,000 boxes of 16 with magnitudes from 2^-20 to 2^20."""
    generator = seeded(0)
    x = torch.randn(4000, 16, generator=generator)
    return torch.ldexp(x, torch.randint(-20, 21, (4000, 1), generator=generator))


@pytest.mark.parametrize("bits", QTORCH_WIDTHS)
def test_block_float_is_within_one_unit_in_the_last_place_of_qtorch(qtorch_quant, boxes, bits):
    theirs = qtorch_quant.block_quantize(boxes.view(-1, 16), wl=bits, dim=0, rounding="nearest")
    ours = fake_quantize(boxes, BlockFloat(bits))
    exponent = torch.frexp(boxes.abs().amax(dim=1, keepdim=True)).exponent - 1
    units = torch.ldexp((ours - theirs).abs(), bits - 2 - exponent)
    assert units.max() <= 1
    # qtorch first adds 6 * 2^E, which costs it the last bits of what it rounds: the wider the
    # format, the more values look like ties to it. All others must be equal.
    assert (units > 0).double().mean() <= 2.0 ** (bits - 23) + 1e-4


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_boxes_of_a_matrix_are_qtorchs_rows(qtorch_quant, boxes, bits):
    matrix = boxes.view(1000, 64)
    theirs = qtorch_quant.block_quantize(boxes, wl=bits, dim=0, rounding="nearest").view(1000, 64)
    along_rows = fake_quantize(matrix, BlockFloat(bits), 1)
    along_columns = fake_quantize(matrix.t().contiguous(), BlockFloat(bits), 0).t()
    assert (along_rows == theirs).double().mean() > 0.99
    assert torch.equal(along_rows, along_columns)


@pytest.mark.parametrize("bits", range(2, 25))
def test_static_fixed_point_equals_qtorch(qtorch_quant, boxes, bits):
    # Up to 24 bits its limits are float32 values. Its zeros have signs: compare values.
    for fraction in (0, bits // 2, bits):
        theirs = qtorch_quant.fixed_point_quantize(boxes, bits, fraction, rounding="nearest")
        assert torch.equal(fake_quantize(boxes, FixedPoint(bits, fraction)), theirs)


@pytest.fixture(scope="module")
def golden():
    """microxcaling's output; see the README of the data folder."""
    folder = os.environ.get("DSQ_DATA")
    root = Path(folder) if folder else REPOSITORY.parent / "shared" / "data"
    path = root / "golden" / "microxcaling_bfp.npz"
    if not path.is_file():
        where = "in DSQ_DATA" if folder else "beside the repository, and DSQ_DATA is not set"
        pytest.skip(f"microxcaling's golden vectors: no golden/microxcaling_bfp.npz {where}")
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_block_float_equals_microxcaling_bit_for_bit(golden, bits, dim):
    expected = golden[f"bfp{bits}_dim{dim}"]
    assert_equal_bits(fake_quantize(golden["x"], BlockFloat(bits), dim), expected)
    assert_equal_bits(pack(golden["x"], BlockFloat(bits), dim).dequantize(), expected)
