"""The CPU kernels touch nothing beside their tensors: each lies against a page that cannot be touched."""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import random

import pytest
import torch
from kernels.common import assert_equal_bits, awkward_tensor, kernels_here

from fairseq_dsq.formats import E4M3_SCALE, BlockFloat, FixedPoint, definition, parse
from fairseq_dsq.kernels import masks, native
from fairseq_dsq.kernels.ops import BFLOAT16_SIGNIFICAND_BITS

HERE = kernels_here(native.EMULATED)
pytestmark = pytest.mark.skipif(not HERE, reason=f"no kernels: {native.unavailable}")

LENGTHS = (1, 2, 7, 15, 16, 17, 31, 33, 127, 129, 513, 1023, 1025)
# One value, one vector and its neighbours, one tile of 512 columns and its neighbours, ragged.
MATRICES = [(1, 1), (1, 17), (16, 1), (15, 3), (16, 16), (17, 33), (31, 8), (33, 129), (129, 7), (16, 513), (3, 1040)]
FORMATS = [*(BlockFloat(bits) for bits in (2, 3, 4, 8, 9, 13, 16, 25, 32)), BlockFloat(4, 3), BlockFloat(5, 100)]
FORMATS += [FixedPoint(2), FixedPoint(8), FixedPoint(16, 8), FixedPoint(31)]
FORMATS += [parse(text) for text in ("mxfp4", "mxfp6e2m3", "mxfp8e5m2/16", "mxfp4/100", "mxint8", "nvfp4", "nvfp4/7")]
CANARY = 0xA5

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(params=[isa for isa in HERE if isa != native.EMULATED])
def kernels(request):
    return HERE[request.param]


class Guarded:
    """Tensors that end where accessible memory ends, or begin where it begins; the bytes around them are watched."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.maps: list[tuple[mmap.mmap, int, int]] = []

    def empty(self, shape, dtype=torch.float32):
        count = torch.Size(shape).numel()
        nbytes = count * dtype.itemsize
        inner = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, inner + 2 * mmap.PAGESIZE)
        memory.write(bytes([CANARY]) * len(memory))
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (address, address + mmap.PAGESIZE + inner):
            assert _libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        start = inner - nbytes if self.at_end else 0
        self.maps.append((memory, start, nbytes))
        array = (ctypes.c_uint8 * nbytes).from_address(address + mmap.PAGESIZE + start)
        return torch.frombuffer(array, dtype=dtype).view(shape)

    def copy(self, x):
        return self.empty(x.shape, x.dtype).copy_(x)

    def check(self):
        for memory, start, nbytes in self.maps:
            inner = memory[mmap.PAGESIZE : len(memory) - mmap.PAGESIZE]
            assert set(inner[:start] + inner[start + nbytes :]) <= {CANARY}


@pytest.fixture(params=[True, False], ids=["end", "beginning"])
def guarded(request):
    memory = Guarded(request.param)
    yield memory
    memory.check()


@functools.cache
def by_definition(fmt, rows, columns, dim, index, seed):
    """Of one tensor, for all kernels: rounded, packed, rounded to bfp4 along the rows, and factorized by rows."""
    values = awkward_tensor((rows, columns), seed=index)
    by_row = fmt.by_row() if fmt.spec.exponent_bits else BlockFloat(fmt.bits, "row")
    by_row = by_row or fmt  # NVFP4 has one scale for the tensor
    return (
        definition.fake_quantize(values, fmt, dim, seed, torch.float32),
        definition.pack(values, fmt, dim, seed),
        definition.fake_quantize(values, BlockFloat(4), 1, None, torch.float32),
        by_row,
        definition.factorize(values, by_row, dim if by_row is fmt else 1, seed),
    )


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_quantizing_and_packing_stay_within_their_tensors(kernels, guarded, fmt):
    spec = fmt.spec
    for index, ((rows, columns), dim) in enumerate(itertools.product(MATRICES, (0, 1))):
        values, seed = awkward_tensor((rows, columns), seed=index), (None, 77 << 32 | 5)[index % 2]
        shape = (1, rows, columns) if dim == 0 else (rows, columns, 1)
        x = guarded.copy(values)
        expected, bytes_expected, operand, by_row, wanted_factors = by_definition(fmt, rows, columns, dim, index, seed)
        out, data = guarded.empty(x.shape), guarded.empty(bytes_expected.shape, torch.uint8)
        kernels.fake_quantize(x, out, shape, spec, seed)
        assert_equal_bits(out, expected)
        kernels.pack(x, data, shape, spec, seed)
        assert torch.equal(data, bytes_expected)
        kernels.unpack(data, out.fill_(1), shape, spec)
        assert_equal_bits(out, expected)
        if fmt.significand_bits <= BFLOAT16_SIGNIFICAND_BITS and not spec.exponent_bits:
            half = guarded.empty(x.shape, torch.bfloat16)
            kernels.fake_quantize(x, half, shape, spec, seed)
            assert_equal_bits(half, expected.bfloat16())
            kernels.unpack(data, half.fill_(1), shape, spec)
            assert_equal_bits(half, expected.bfloat16())
        if kernels.packs_with(spec, spec) and spec.box_size and dim == 0 and seed is None:
            kernels.quantize_and_pack(x, out, data.fill_(0), shape, BlockFloat(4).spec, spec)
            assert_equal_bits(out, operand)
            assert torch.equal(data, bytes_expected)
        if spec.scale == E4M3_SCALE:
            elements, scales = wanted_factors
            scale = guarded.empty((1,))
            kernels.factorize(x, out, scale, shape, spec, seed)
            assert_equal_bits(out, elements)
            assert scale == scales[0, 0]
            kernels.unpack_factors(data, out.fill_(1), scale.fill_(0), shape, spec)
            assert_equal_bits(out, elements)
            assert scale == scales[0, 0]
        elif dim == 1:
            factors = guarded.empty((rows, 1))
            kernels.factorize(x, out, factors, shape, by_row.spec, seed)
            for actual, wanted in zip((out, factors), wanted_factors, strict=True):
                assert_equal_bits(actual, wanted)


def test_masks_and_dropout_stay_within_their_tensors(kernels, guarded):
    for length in LENGTHS:
        values = awkward_tensor((length,), seed=length)
        x, out = guarded.copy(values), guarded.empty((length,))
        data = guarded.empty((masks.nbytes(length),), torch.uint8)
        kernels.dropout(x, out, 0.3, 2.0, 5)
        assert_equal_bits(out, masks.dropout(values, 0.3, 2.0, 5))
        kernels.pack_positive(x, data)
        assert torch.equal(data, masks.pack_positive(values))
        kernels.mask(x, data, out)
        assert_equal_bits(out, masks.mask(values, data.clone()))


@pytest.mark.parametrize("kernels", [isa for isa in HERE if HERE[isa].has_gemm], indirect=True)
@pytest.mark.parametrize("seed", range(40))
def test_products_stay_within_their_tensors(kernels, guarded, seed):
    torch.manual_seed(seed)
    pick = random.Random(seed).choice
    batch, m, n, k = pick((1, 2)), pick(LENGTHS[:10]), pick(LENGTHS[:10]), pick((*LENGTHS[:11], 0))
    bits = pick([(2, 2), (4, 4), (8, 6), (8, 8), (16, 4), (13, 9), (4, 12), (16, 16)])
    a, b = torch.randn(batch, m, k), torch.randn(batch, n, k)

    def laid_out(x):
        """K inner or outer, rows close together or apart; the tensor's last value is the memory's."""
        if k == 0:
            return x
        outer, apart = pick((False, True)), pick((0, 3))
        x = x.mT if outer else x
        base = guarded.empty((*x.shape[:-1], x.shape[-1] + apart))
        view = (base[..., apart:] if guarded.at_end else base[..., : x.shape[-1]]).copy_(x)
        return view.mT if outer else view

    bias = pick((None, torch.randn(n)))
    out = guarded.empty((batch, m, n))
    kernels.gemm(out, laid_out(a), laid_out(b), bits, (1, 1), None if bias is None else guarded.copy(bias), False)
    rounded = (
        definition.fake_quantize(x, BlockFloat(width), -1, None, torch.float32)
        for x, width in zip((a, b), bits, strict=True)
    )
    expected = torch.matmul(*(x.double() if i == 0 else x.double().mT for i, x in enumerate(rounded)))
    expected = expected if bias is None else expected + bias
    assert (out - expected).abs().max() <= 2.0**-22 * (k + 8) * 4
