"""The CUDA kernels, in Triton: bit for bit what fairseq_dsq.formats defines, for block floating point.

One program takes a tile of boxes, a row each, wherever the boxes lie in memory: nothing is transposed. Floats are added
and multiplied as on a CPU: nothing is fused (it would not show: products by powers of two are exact) and subnormal
numbers are kept, but by Triton's ``floor``. There it does not show: a code just below zero comes out as -0 either way,
rounded down to -0 or down to -1 and up again.

Imported by :mod:`fairseq_dsq.kernels.ops` at the first call for a CUDA tensor; needs Triton.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairseq_dsq.formats import BlockFloat, KernelSpec, definition

Shape = tuple[int, int, int]
# The values of a tile: eight for each thread of four warps.
TILE = 1024
# Compiler options; Triton fuses unless told otherwise.
OPTIONS = {"enable_fp_fusion": False}
# A row of a tile is a box.
MAX_BOX_SIZE = 256
# Offsets below this are computed in 32 bits, whose divisions are cheaper.
WIDE_FROM = 1 << 30


@triton.jit
def _boxes(first, length, boxes, after, BOX_SIZE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The boxes of this program: their numbers and where each begins, in elements.

    They are counted over (before, boxes, after); the first of a fibre begins at ``first`` along ``length``.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    box = program * BLOCK + tl.arange(0, BLOCK)[:, None]
    row = box // after
    return box, ((row // boxes) * length + first + (row % boxes) * BOX_SIZE) * after + box % after


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exponent(x, headroom):
    """Biased exponents (boxes, 1) of float32 boxes, 255 where one holds Inf or NaN: no float is compared."""
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    finite = tl.minimum(largest, 0x7F7FFFFF)
    raised = tl.minimum(tl.maximum((finite + headroom) >> 23, 1), 254)
    return tl.where(largest == finite, raised, 255)[:, None]


@triton.jit
def _mix(h):
    h = tl.mul(h ^ (h >> 16), 0x7FEB352D, sanitize_overflow=False)
    h = tl.mul(h ^ (h >> 15), 0x846CA68B, sanitize_overflow=False)
    return h ^ (h >> 16)


@triton.jit
def _noise(index, low, high):
    """definition.noise in 32 bits, which is all that it keeps; ``low`` and ``high`` are the seed's halves."""
    low, high = low.to(tl.uint32, bitcast=True), high.to(tl.uint32, bitcast=True)
    h = _mix(_mix(tl.add(index.to(tl.uint32), low, sanitize_overflow=False)) ^ high)
    return (h >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def _magnitudes(x, exponent, index, low, high, BITS: tl.constexpr, MAX_CODE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Magnitudes of the codes, as float32: ScaledInteger.encode but for the sign, which is ``x``'s own."""
    shift = (BITS - 2 + 127) - exponent
    half = shift >> 1
    scaled = x * _power_of_two(half) * _power_of_two(shift - half)
    if STOCHASTIC:
        floor = tl.floor(scaled)
        code = tl.abs(floor + (_noise(index, low, high) < scaled - floor).to(tl.float32))
    else:
        # From 2^23 to 2^24 float32 holds the integers alone, and an addition rounds to nearest even on any
        # hardware; what is larger is an integer already. No compiler may take the two additions for nothing.
        scaled = tl.abs(scaled)
        code = tl.where(scaled < 8388608.0, (scaled + 8388608.0) - 8388608.0, scaled)
    return tl.minimum(code, MAX_CODE)


@triton.jit
def _values(magnitude, negative, exponent, BITS: tl.constexpr):
    """ScaledInteger.decode of float32 magnitudes and uint32 signs, 0 or 1."""
    shift = exponent - (BITS - 2 + 127)
    half = shift >> 1
    value = magnitude * _power_of_two(half) * _power_of_two(shift - half)
    bits = value.to(tl.uint32, bitcast=True) | (negative << 31)
    return tl.where(exponent == 255, float("nan"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _store(pointers, value, mask):
    """Store float32 values that the target holds exactly: a bfloat16 is the upper half, without a conversion."""
    if pointers.dtype.element_ty == tl.bfloat16:
        upper = (value.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
        value = upper.to(tl.bfloat16, bitcast=True)
    tl.store(pointers, value, mask=mask)


# The kernels. ``total`` boxes of ``values`` values each, see _Part; ``low`` and ``high`` are the halves of the seed.


@triton.jit(do_not_specialize=["headroom", "low", "high"])
def _fake_quantize(
    x_ptr, out_ptr, total, first, length, boxes, after, values, headroom, low, high,
    BITS: tl.constexpr, MAX_CODE: tl.constexpr, BOX_SIZE: tl.constexpr, BOX: tl.constexpr, BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    box, base = _boxes(first, length, boxes, after, BOX_SIZE, BLOCK, WIDE)
    place = tl.arange(0, BOX).to(base.dtype)[None, :]
    index = base + place * after
    inside = (box < total) & (place < values)
    x = tl.load(x_ptr + index, mask=inside, other=0.0)
    exponent = _exponent(x, headroom)
    magnitude = _magnitudes(x, exponent, index, low, high, BITS, MAX_CODE, STOCHASTIC)
    value = _values(magnitude, x.to(tl.uint32, bitcast=True) >> 31, exponent, BITS)
    _store(out_ptr + index, value, inside)


@triton.jit(do_not_specialize=["headroom", "low", "high"])
def _pack(
    x_ptr, exponent_ptr, code_ptr, total, first, length, boxes, after, values, box_bytes, headroom, low, high,
    BITS: tl.constexpr, MAX_CODE: tl.constexpr, BOX_SIZE: tl.constexpr, BOX: tl.constexpr, BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr, WIDE: tl.constexpr, BYTES: tl.constexpr, TOUCHED: tl.constexpr,
):  # fmt: skip
    box, base = _boxes(first, length, boxes, after, BOX_SIZE, BLOCK, WIDE)
    place = tl.arange(0, BOX).to(base.dtype)[None, :]
    exists = box < total
    x = tl.load(x_ptr + base + place * after, mask=exists & (place < values), other=0.0)
    exponent = _exponent(x, headroom)
    tl.store(exponent_ptr + box, exponent.to(tl.uint8), mask=exists)
    # Each byte encodes the TOUCHED codes that may lie in it anew, from values now in the cache: no lane asks another.
    byte = tl.arange(0, BYTES).to(base.dtype)[None, :]
    packed = tl.zeros([BLOCK, BYTES], tl.uint32)
    for step in tl.static_range(TOUCHED):
        place = byte * 8 // BITS + step
        shift = (place * BITS - byte * 8).to(tl.int32)
        index = base + place * after
        x = tl.load(x_ptr + index, mask=exists & (place < values) & (shift < 8), other=0.0)
        x = tl.where(x == x, x, 0.0)  # the exponent says NaN; the code is always the same
        magnitude = _magnitudes(x, exponent, index, low, high, BITS, MAX_CODE, STOCHASTIC)
        sign = x.to(tl.uint32, bitcast=True) >> 31
        code = magnitude.to(tl.int32).to(tl.uint32, bitcast=True) | (sign << (BITS - 1))
        # Only the first code may begin before the byte. One that was masked out is 0, whatever it is shifted by.
        if step == 0:
            packed |= code >> (-shift).to(tl.uint32)
        else:
            packed |= code << (shift & 7).to(tl.uint32)
    place_in_codes = box * box_bytes + byte
    tl.store(code_ptr + place_in_codes, (packed & 0xFF).to(tl.uint8), mask=exists & (byte < box_bytes))


@triton.jit
def _unpack(
    exponent_ptr, code_ptr, out_ptr, total, first, length, boxes, after, values, box_bytes,
    BITS: tl.constexpr, BOX_SIZE: tl.constexpr, BOX: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    TOUCHED: tl.constexpr,
):  # fmt: skip
    box, base = _boxes(first, length, boxes, after, BOX_SIZE, BLOCK, WIDE)
    place = tl.arange(0, BOX).to(base.dtype)[None, :]
    exists = box < total
    inside = exists & (place < values)
    exponent = tl.load(exponent_ptr + box, mask=exists, other=0).to(tl.int32)
    code = tl.zeros([BLOCK, BOX], tl.uint32)
    for step in tl.static_range(TOUCHED):
        byte = place * BITS // 8 + step
        shift = (8 * byte - place * BITS).to(tl.int32)
        piece = tl.load(code_ptr + box * box_bytes + byte, mask=inside & (shift < BITS), other=0).to(tl.uint32)
        if step == 0:
            code |= piece >> (-shift).to(tl.uint32)
        else:
            code |= piece << (shift & 31).to(tl.uint32)
    magnitude = (code & ((1 << (BITS - 1)) - 1)).to(tl.int32).to(tl.float32)
    value = _values(magnitude, (code >> (BITS - 1)) & 1, exponent, BITS)
    _store(out_ptr + base + place * after, value, inside)


class _Part(NamedTuple):
    """The full boxes of a tensor, or the short last ones.

    Attributes:
        total: boxes.
        first: where a fibre's first begins along ``length``.
        length, boxes, after: of the tensor; of a fibre; of the tensor.
        values: in a box.
    """

    total: int
    first: int
    length: int
    boxes: int
    after: int
    values: int


def covers(spec: KernelSpec) -> bool:
    """Whether the kernels know the format: sign-magnitude integers under the exponent of their box."""
    lopsided = not spec.signed_zero or spec.min_code != -spec.max_code
    if spec.exponent_bits or spec.element_exponent or spec.least_exponent != 1:
        return False
    return 0 < spec.box_size <= MAX_BOX_SIZE and not spec.fixed_exponent and not lopsided


def check(device: torch.device) -> None:
    """Compile and run the kernels on ``device``.

    Raises:
        RuntimeError: the result is not that of the definition. Triton raises errors of its own.
    """
    shape = 1, 37, 48
    x = torch.linspace(-3.0, 5.0, 37 * 48, device=device).view(37, 48)
    x[:, 5] *= 2.0**-126
    for fmt, seed in ((BlockFloat(4), None), (BlockFloat(4, scale="fit"), 0x2BCDEF01_FEDCBA98)):
        spec = fmt.kernel_spec()
        data = definition.pack(x, fmt, 0, seed)
        expected = definition.unpack(data, x.shape, fmt, 0, x.dtype)
        rounded, packed, unpacked = torch.empty_like(x), torch.empty_like(data), torch.empty_like(x)
        fake_quantize(x, rounded, shape, spec, seed)
        pack(x, packed, shape, spec, seed)
        unpack(data, unpacked, shape, spec)
        pairs = [(rounded, expected), (packed, data), (unpacked, expected)]
        if not all(torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)) for got, wanted in pairs):
            raise RuntimeError("the result is not that of the definition")


def fake_quantize(x: Tensor, out: Tensor, shape: Shape, spec: KernelSpec, seed: int | None) -> None:
    """Write the rounded values of ``x`` to ``out``.

    All tensors here are contiguous, on one CUDA device and not empty: ``x`` float32, ``out`` float32, or bfloat16 for
    codes of at most 9 bits, packed bytes uint8; seen as ``shape`` (before, length, after) with the boxes along
    ``length``. ``covers(spec)`` holds. ``seed`` None rounds to nearest.
    """
    with torch.cuda.device_of(x):
        for part in _parts(shape, spec):
            tile = _tile(part, spec, x.numel())
            numbers = (*part, spec.headroom, *_seed_halves(seed))
            _fake_quantize[_grid(part, tile)](x, out, *numbers, **tile, **_rounding(spec, seed))


def pack(x: Tensor, data: Tensor, shape: Shape, spec: KernelSpec, seed: int | None) -> None:
    """Write the packed bytes of ``x`` to ``data``; as for :func:`fake_quantize`."""
    bits = spec.bits
    touched = max((8 * byte + 7) // bits - 8 * byte // bits + 1 for byte in range(bits))
    with torch.cuda.device_of(x):
        for part, exponents, codes, box_bytes in _packed_parts(data, shape, spec):
            tile = _tile(part, spec, max(x.numel(), data.numel()))
            _pack[_grid(part, tile)](
                *(x, exponents, codes, *part, box_bytes, spec.headroom, *_seed_halves(seed)),
                **tile,
                **_rounding(spec, seed),
                BYTES=triton.next_power_of_2(box_bytes),
                TOUCHED=touched,
            )


def unpack(data: Tensor, out: Tensor, shape: Shape, spec: KernelSpec) -> None:
    """Write the values of packed bytes to ``out``; as for :func:`fake_quantize`."""
    touched = max((code * spec.bits % 8 + spec.bits + 7) // 8 for code in range(8))
    with torch.cuda.device_of(data):
        for part, exponents, codes, box_bytes in _packed_parts(data, shape, spec):
            tile = _tile(part, spec, max(out.numel(), data.numel()))
            _unpack[_grid(part, tile)](exponents, codes, out, *part, box_bytes, **tile, TOUCHED=touched)


def _parts(shape: Shape, spec: KernelSpec) -> Iterator[_Part]:
    """The parts of definition.split_groups."""
    before, length, after = shape
    full, rest = divmod(length, spec.box_size)
    if full:
        yield _Part(before * full * after, 0, length, full, after, spec.box_size)
    if rest:
        yield _Part(before * after, length - rest, length, 1, after, rest)


def _packed_parts(data: Tensor, shape: Shape, spec: KernelSpec) -> Iterator[tuple[_Part, Tensor, Tensor, int]]:
    """The parts with their exponents, their codes and the bytes of a box's codes."""
    for part in _parts(shape, spec):
        box_bytes = -(-part.values * spec.bits // 8)
        exponents, codes, data = data.tensor_split([part.total, part.total * (1 + box_bytes)])
        yield part, exponents, codes, box_bytes


def _tile(part: _Part, spec: KernelSpec, elements: int) -> dict[str, Any]:
    """The compile-time numbers that all kernels take, and options; ``elements``: of the largest tensor."""
    return {
        "BITS": spec.bits,
        "BOX_SIZE": spec.box_size,
        "BOX": triton.next_power_of_2(part.values),
        "BLOCK": max(1, TILE // triton.next_power_of_2(spec.box_size)),
        "WIDE": elements >= WIDE_FROM,
        **OPTIONS,
    }


def _rounding(spec: KernelSpec, seed: int | None) -> dict[str, Any]:
    return {"MAX_CODE": spec.max_code, "STOCHASTIC": seed is not None}


def _grid(part: _Part, tile: dict[str, Any]) -> tuple[int]:
    return (triton.cdiv(part.total, tile["BLOCK"]),)


def _seed_halves(seed: int | None) -> tuple[int, int]:
    """The lower and upper 32 bits of the seed as int32: of one type whatever they hold, so nothing compiles anew."""
    low, high = (seed or 0) & 0xFFFFFFFF, (seed or 0) >> 32
    return low - (low >> 31 << 32), high
