"""The CUDA kernels, in Triton: bit for bit what fairseq_dsq.formats defines, for integers and minifloats under a power
of two or a float32.

One program takes a tile of boxes, a row each, wherever the boxes lie in memory: nothing is transposed. Full boxes and
the short last ones go in one launch. What shares a scale and fits no tile goes in chunks, in the place of boxes, after
torch has found its largest magnitude, which stays on the device. Floats are added and multiplied as on a CPU:
nothing is fused (it would not show: products by powers of two are exact) and subnormal numbers are kept, but by
Triton's ``floor``. There it does not show: a code just below zero comes out as zero either way, rounded down to -0 or
down to -1 and up again.

A call that is like one before, in everything that was compiled for it, launches what was compiled directly: Triton's
own way there takes ten times as long as the rest.

Imported by :mod:`fairseq_dsq.kernels.ops` at the first call for a CUDA tensor; needs Triton.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from fairseq_dsq.formats import (
    E4M3_SCALE,
    FLOAT32_SCALE,
    MXFP8E5M2,
    POWER_OF_TWO,
    BlockFloat,
    FixedPoint,
    Format,
    Integer,
    KernelSpec,
    definition,
)
from fairseq_dsq.formats.base import MAX_BOX_SIZE as ALL_OF_A_ROW
from fairseq_dsq.kernels import masks

Shape = tuple[int, int, int]
# The values of a tile: eight for each thread of four warps.
TILE = 1024
# Compiler options; Triton fuses unless told otherwise.
OPTIONS = {"enable_fp_fusion": False}
# A row of a tile is a box.
MAX_BOX_SIZE = 256
# Chunks of what shares a scale and is longer: where its values are neighbours in memory, and where others lie between.
CHUNK, CHUNK_ACROSS = 1024, 16
# Offsets below this are computed in 32 bits, whose divisions are cheaper.
WIDE_FROM = 1 << 30
# A side of the square tiles that are read once for two directions, and the boxes that fit in.
SIDE, BOTH_BOX = 64, 16
# Matrices that lie apart and are read by one launch: q, k and v have gradients of their own.
MOST_APART = 3
# Launches that are remembered; a training meets some thousand shapes.
MOST_LAUNCHES = 1 << 16


class DifferentResult(RuntimeError):
    """The kernels of a device do not give what the definition does."""


@triton.jit
def _boxes(length, boxes, after, BOX_SIZE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The boxes of this program: their numbers, fibres, places in these, columns, and where each begins, in elements.

    They are counted over (before, boxes, after), a fibre being all boxes of a (before, after).
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    box = program * BLOCK + tl.arange(0, BLOCK)[:, None]
    row = box // after
    fibre, place = row // boxes, row % boxes
    return box, fibre, place, box % after, (fibre * length + place * BOX_SIZE) * after + box % after


@triton.jit
def _in_bytes(
    box, fibre, place, column, total, length, full, after, shorts, BITS: tl.constexpr, BOX_SIZE: tl.constexpr,
    RAGGED: tl.constexpr, GROUPED: tl.constexpr, FLOAT_SCALE: tl.constexpr,
):  # fmt: skip
    """Of each box: the place of its scale, of its first code, and the bytes of its codes.

    ``total`` full boxes' scales, their codes, ``shorts`` short ones' scales, their codes; of chunks: the scales of the
    fibres, their codes.
    """
    SIZE: tl.constexpr = (BOX_SIZE * BITS + 7) // 8
    SCALE: tl.constexpr = 4 if FLOAT_SCALE else 1
    nbytes = tl.full(box.shape, SIZE, tl.int32)
    # In as many bits as the boxes' numbers: bytes may be more than 32 hold.
    total, shorts, length = box * 0 + total, box * 0 + shorts, box * 0 + length
    if GROUPED:
        fibre = fibre * after + column
        scale_at = fibre * SCALE
        # Of length * BITS bits, of which 32 bits may not hold the number.
        code_at = shorts * SCALE + fibre * (length // 8 * BITS + (length % 8 * BITS + 7) // 8) + place * SIZE
        if RAGGED:
            rest = (((length - full * BOX_SIZE) * BITS + 7) // 8).to(tl.int32)
            nbytes = tl.where(place == full, rest, nbytes)
    elif RAGGED:
        is_short = place == full
        number = (fibre * full + place) * after + column
        short = fibre * after + column
        rest = (((length - full * BOX_SIZE) * BITS + 7) // 8).to(tl.int32)
        begin = total * (SCALE + SIZE)
        scale_at = tl.where(is_short, begin + short * SCALE, number * SCALE)
        code_at = tl.where(is_short, begin + shorts * SCALE + short * rest, total * SCALE + number * SIZE)
        nbytes = tl.where(is_short, rest, nbytes)
    else:
        scale_at = box * SCALE
        code_at = total * SCALE + box * SIZE
    return scale_at, code_at, nbytes


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _magnitude_bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _exponent(largest, headroom, FIXED: tl.constexpr, ELEMENT: tl.constexpr, LEAST: tl.constexpr):
    """Biased exponents of the bits of largest magnitudes, 255 where one is Inf or NaN: no float is compared.

    ELEMENT is taken from the exponent, which is LEAST at least.
    """
    finite = tl.minimum(largest, 0x7F7FFFFF)
    if FIXED == 0:
        found = tl.maximum(tl.minimum((finite + headroom) >> 23, 254) - ELEMENT, LEAST)
    else:
        found = tl.full(largest.shape, FIXED, tl.int32)
    return tl.where(largest == finite, found, 255)


@triton.jit
def _scale(
    largest, headroom, FIXED: tl.constexpr, ELEMENT: tl.constexpr, LEAST: tl.constexpr, MAX_CODE: tl.constexpr,
    FLOAT_SCALE: tl.constexpr,
):  # fmt: skip
    """What is stored as the scale under the bits of largest magnitudes, int32: a biased exponent, see _exponent.

    With FLOAT_SCALE the bits of the float32 under which MAX_CODE is the largest magnitude: ``scale_for``.
    """
    if FLOAT_SCALE:
        greatest = tl.full(largest.shape, MAX_CODE, tl.float32)
        scale = tl.div_rn(largest.to(tl.float32, bitcast=True), greatest)
        stored = scale.to(tl.int32, bitcast=True)
        stored = tl.where(scale * greatest == float("inf"), stored - 1, stored)
        stored = tl.where(largest > 0x7F7FFFFF, 0x7FC00000, stored)
    else:
        stored = _exponent(largest, headroom, FIXED, ELEMENT, LEAST)
    return stored


@triton.jit
def _factors(scale, FLOAT_SCALE: tl.constexpr):
    """Stored scales as factors, and what the elements beside them are stored under: one, or what says NaN."""
    one = tl.full(scale.shape, 1.0, tl.float32)
    if FLOAT_SCALE:
        factor = scale.to(tl.float32, bitcast=True)
        not_finite = factor != factor
        rest = tl.where(not_finite, scale, 0x3F800000)
    else:
        not_finite = scale == 255
        factor = _two_factors(one, scale - 127)
        rest = tl.where(not_finite, 255, 127)
    return tl.where(not_finite, 1.0, factor), rest


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
def _two_factors(x, shift):
    """``x`` times 2^shift, as the product of two, so that neither over- nor underflows."""
    half = shift >> 1
    return x * _power_of_two(half) * _power_of_two(shift - half)


@triton.jit
def _least(EXPONENT_BITS: tl.constexpr):
    """The biased exponent of a minifloat's smallest normal number."""
    return 129 - (1 << (EXPONENT_BITS - 1))


@triton.jit
def _magnitudes(
    x, scale, index, low, high, BITS: tl.constexpr, EXPONENT_BITS: tl.constexpr, MIN_CODE: tl.constexpr,
    MAX_CODE: tl.constexpr, STOCHASTIC: tl.constexpr, FLOAT_SCALE: tl.constexpr,
):  # fmt: skip
    """Magnitudes of integers or minifloats, as float32: what ``encode`` gives but for the sign, which is ``x``'s."""
    if FLOAT_SCALE:
        # A scale of 0: all values are 0, or too small for one.
        factor = scale.to(tl.float32, bitcast=True)
        scaled = tl.where(factor > 0, tl.div_rn(x, factor), 0.0)
    elif EXPONENT_BITS > 0:
        scaled = _two_factors(x, 127 - scale)
    else:
        scaled = _two_factors(x, (BITS - 2 + 127) - scale)
    if EXPONENT_BITS > 0:
        MANTISSA_BITS: tl.constexpr = BITS - 1 - EXPONENT_BITS
        magnitude = tl.minimum(tl.abs(scaled), MAX_CODE)
        found = tl.maximum(_magnitude_bits(magnitude) >> 23, _least(EXPONENT_BITS))
        if STOCHASTIC:
            steps = magnitude * _power_of_two(127 + MANTISSA_BITS - found)
            steps = tl.where(x < 0, 0.0 - steps, steps)
            floor = tl.floor(steps)
            code = tl.abs(floor + (_noise(index, low, high) < steps - floor).to(tl.float32))
            return code * _power_of_two(found - (127 + MANTISSA_BITS))
        # So far above that a step is its last bit: a sum with it rounds to a whole number of steps.
        above = _power_of_two(found + (23 - MANTISSA_BITS) - 127)
        return (magnitude + above) - above
    if STOCHASTIC:
        floor = tl.floor(scaled)
        code = tl.abs(floor + (_noise(index, low, high) < scaled - floor).to(tl.float32))
    else:
        # From 2^23 to 2^24 float32 holds the integers alone, and an addition rounds to nearest even on any
        # hardware; what is larger is an integer already. No compiler may take the two additions for nothing.
        scaled = tl.abs(scaled)
        code = tl.where(scaled < 8388608.0, (scaled + 8388608.0) - 8388608.0, scaled)
    if MIN_CODE == -MAX_CODE:
        return tl.minimum(code, MAX_CODE)
    return tl.minimum(code, tl.where(x < 0, 0.0 - MIN_CODE, MAX_CODE))


@triton.jit
def _values(
    magnitude, negative, scale, BITS: tl.constexpr, EXPONENT_BITS: tl.constexpr, SIGNED_ZERO: tl.constexpr,
    FLOAT_SCALE: tl.constexpr,
):  # fmt: skip
    """What ``decode`` gives of float32 magnitudes and uint32 signs, 0 or 1."""
    if FLOAT_SCALE:
        factor = scale.to(tl.float32, bitcast=True)
        value = magnitude * factor
        not_finite = factor != factor
    elif EXPONENT_BITS > 0:
        value = _two_factors(magnitude, scale - 127)
        not_finite = scale == 255
    else:
        value = _two_factors(magnitude, scale - (BITS - 2 + 127))
        not_finite = scale == 255
    if not SIGNED_ZERO:
        negative = tl.where(magnitude == 0.0, 0, negative)
    bits = value.to(tl.uint32, bitcast=True) | (negative << 31)
    return tl.where(not_finite, float("nan"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _to_field(magnitude, BITS: tl.constexpr, EXPONENT_BITS: tl.constexpr):
    """The bits of a minifloat without its sign, uint32."""
    least = tl.full(magnitude.shape, _least(EXPONENT_BITS), tl.int32)
    # With the smallest normal number added, a subnormal one has its mantissa where it belongs, and no exponent.
    smallest = _power_of_two(least - 127)
    subnormal = (magnitude + smallest).to(tl.int32, bitcast=True)
    bits = tl.where(magnitude < smallest, subnormal, magnitude.to(tl.int32, bitcast=True) + (1 << 23))
    return ((bits - (least << 23)) >> (24 + EXPONENT_BITS - BITS)).to(tl.uint32, bitcast=True)


@triton.jit
def _from_field(field, BITS: tl.constexpr, EXPONENT_BITS: tl.constexpr, MAX_CODE: tl.constexpr):
    """The magnitude of a minifloat's bits without its sign, float32; Inf and NaN among them."""
    bits = field.to(tl.int32, bitcast=True) << (24 + EXPONENT_BITS - BITS)
    least = tl.full(bits.shape, _least(EXPONENT_BITS), tl.int32)
    # A subnormal number is a normal one of the smallest exponent, without its leading one.
    exponent_from = tl.where(bits < (1 << 23), least, least - 1) << 23
    value = (bits + exponent_from).to(tl.float32, bitcast=True)
    value = tl.where(bits < (1 << 23), value - _power_of_two(least - 127), value)
    special = (value.to(tl.int32, bitcast=True) | 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(value > MAX_CODE, special, value)


@triton.jit
def _load(pointers, mask):
    """float32 of any float: a bfloat16 is the upper half, without a conversion."""
    x = tl.load(pointers, mask=mask, other=0.0)
    if pointers.dtype.element_ty == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _store(pointers, value, mask):
    """Store float32 values, rounded to nearest even where the target is narrower."""
    if pointers.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # The sum would carry a NaN's mantissa into its sign: a GPU's own, 0x7FFFFFFF, would be -0.
        upper = tl.where(value != value, (bits >> 16) | 0x40, upper).to(tl.uint16)
        tl.store(pointers, upper.to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _store_terms(pointers, plane, value, mask, TERMS: tl.constexpr):
    """Store float32 as the exact sum of TERMS bfloat16, ``plane`` elements apart; without terms, as it is."""
    if TERMS == 0:
        _store(pointers, value, mask)
    for _term in tl.static_range(TERMS):
        upper = value.to(tl.uint32, bitcast=True) & 0xFFFF0000
        tl.store(pointers, (upper >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
        pointers += plane  # step by step: 32 bits may not hold a multiple
        # NaN - NaN is NaN too: a product with any term is.
        value = value - upper.to(tl.float32, bitcast=True)


@triton.jit
def _round_to(
    x, exponent, pointers, plane, inside, BITS: tl.constexpr, SIGNED_ZERO: tl.constexpr, MIN_CODE: tl.constexpr,
    MAX_CODE: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Store integers under biased exponents, rounded to nearest."""
    magnitude = _magnitudes(x, exponent, 0, 0, 0, BITS, 0, MIN_CODE, MAX_CODE, False, False)
    sign = x.to(tl.uint32, bitcast=True) >> 31
    _store_terms(pointers, plane, _values(magnitude, sign, exponent, BITS, 0, SIGNED_ZERO, False), inside, TERMS)


# The kernels. Shapes are (before, length, after); ``total`` full boxes and ``shorts`` short ones, of chunks: fibres;
# ``all_boxes`` of both; ``low`` and ``high`` are the halves of the seed; ``largest`` is read where GROUPED.


@triton.jit(do_not_specialize=["low", "high", "all_boxes", "boxes", "headroom"])
def _fake_quantize(
    x_ptr, out_ptr, largest_ptr, factor_ptr, low, high, all_boxes, length, boxes, after, headroom, plane,
    BITS: tl.constexpr, EXPONENT_BITS: tl.constexpr, SIGNED_ZERO: tl.constexpr, FIXED: tl.constexpr,
    ELEMENT: tl.constexpr, LEAST: tl.constexpr, MIN_CODE: tl.constexpr, MAX_CODE: tl.constexpr,
    BOX_SIZE: tl.constexpr, BOX: tl.constexpr, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr, WIDE: tl.constexpr,
    GROUPED: tl.constexpr, FACTORS: tl.constexpr, TERMS: tl.constexpr, FLOAT_SCALE: tl.constexpr,
):  # fmt: skip
    """The values; with FACTORS elements and factors apart, as ScaledInteger.factorize has them."""
    box, fibre, place, column, base = _boxes(length, boxes, after, BOX_SIZE, BLOCK, WIDE)
    along = tl.arange(0, BOX).to(base.dtype)[None, :]
    index = base + along * after
    exists = box < all_boxes
    inside = exists & (along < BOX_SIZE) & (place * BOX_SIZE + along < length)
    x = _load(x_ptr + index, inside)
    if GROUPED:
        largest = _magnitude_bits(tl.load(largest_ptr + fibre * after + column, mask=exists, other=0.0))
    else:
        largest = tl.max(_magnitude_bits(x), axis=1)[:, None]
    scale = _scale(largest, headroom, FIXED, ELEMENT, LEAST, MAX_CODE, FLOAT_SCALE)
    magnitude = _magnitudes(
        x, scale, index, low, high, BITS, EXPONENT_BITS, MIN_CODE, MAX_CODE, STOCHASTIC, FLOAT_SCALE
    )
    negative = x.to(tl.uint32, bitcast=True) >> 31
    if FACTORS:
        factor, scale = _factors(scale, FLOAT_SCALE)
        tl.store(factor_ptr + fibre * after + column, factor, mask=exists & (place == 0))
    value = _values(magnitude, negative, scale, BITS, EXPONENT_BITS, SIGNED_ZERO, FLOAT_SCALE)
    _store_terms(out_ptr + index, plane, value, inside, TERMS)


@triton.jit(do_not_specialize=["low", "high", "all_boxes", "boxes", "headroom", "full", "shorts", "o_headroom"])
def _pack(
    x_ptr, data_ptr, largest_ptr, out_ptr, low, high, all_boxes, length, boxes, after, headroom, total, full, shorts,
    o_headroom, BITS: tl.constexpr, EXPONENT_BITS: tl.constexpr, SIGNED_ZERO: tl.constexpr, FIXED: tl.constexpr,
    ELEMENT: tl.constexpr, LEAST: tl.constexpr, MIN_CODE: tl.constexpr, MAX_CODE: tl.constexpr,
    BOX_SIZE: tl.constexpr, BOX: tl.constexpr, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr, WIDE: tl.constexpr,
    GROUPED: tl.constexpr, RAGGED: tl.constexpr, BYTES: tl.constexpr, TOUCHED: tl.constexpr,
    FLOAT_SCALE: tl.constexpr, O_BITS: tl.constexpr, O_SIGNED_ZERO: tl.constexpr, O_FIXED: tl.constexpr,
    O_MIN: tl.constexpr, O_MAX: tl.constexpr, O_TERMS: tl.constexpr,
):  # fmt: skip
    """The bytes; with O_BITS, of one scale for the tensor, also its values in another such format of integers."""
    box, fibre, place, column, base = _boxes(length, boxes, after, BOX_SIZE, BLOCK, WIDE)
    exists = box < all_boxes
    begins = place * BOX_SIZE
    scale_at, code_at, nbytes = _in_bytes(
        box, fibre, place, column, total, length, full, after, shorts, BITS, BOX_SIZE, RAGGED, GROUPED, FLOAT_SCALE
    )
    if GROUPED:
        largest = _magnitude_bits(tl.load(largest_ptr + fibre * after + column, mask=exists, other=0.0))
    else:
        along = tl.arange(0, BOX).to(base.dtype)[None, :]
        x = _load(x_ptr + base + along * after, exists & (along < BOX_SIZE) & (begins + along < length))
        largest = tl.max(_magnitude_bits(x), axis=1)[:, None]
    scale = _scale(largest, headroom, FIXED, ELEMENT, LEAST, MAX_CODE, FLOAT_SCALE)
    for byte in tl.static_range(4 if FLOAT_SCALE else 1):
        piece = ((scale >> (8 * byte)) & 0xFF).to(tl.uint8)
        tl.store(data_ptr + scale_at + byte, piece, mask=exists & (place == 0) if GROUPED else exists)
    if O_BITS > 0:
        along = tl.arange(0, BOX).to(base.dtype)[None, :]
        inside = exists & (along < BOX_SIZE) & (begins + along < length)
        x = _load(x_ptr + base + along, inside)
        exponent = _exponent(largest, o_headroom, O_FIXED, 0, 1)
        _round_to(x, exponent, out_ptr + base + along, length, inside, O_BITS, O_SIGNED_ZERO, O_MIN, O_MAX, O_TERMS)
    # Each byte encodes the TOUCHED codes that may lie in it anew, from values now in the cache: no lane asks another.
    byte = tl.arange(0, BYTES).to(base.dtype)[None, :]
    packed = tl.zeros([BLOCK, BYTES], tl.uint32)
    for step in tl.static_range(TOUCHED):
        along = byte * 8 // BITS + step
        shift = (along * BITS - byte * 8).to(tl.int32)
        index = base + along * after
        inside = exists & (along < BOX_SIZE) & (begins + along < length) & (shift < 8)
        x = _load(x_ptr + index, inside)
        # The scale says NaN; the code is always the same.
        x = tl.where(tl.abs(x) < float("inf") if FLOAT_SCALE else x == x, x, 0.0)
        magnitude = _magnitudes(
            x, scale, index, low, high, BITS, EXPONENT_BITS, MIN_CODE, MAX_CODE, STOCHASTIC, FLOAT_SCALE
        )
        sign = x.to(tl.uint32, bitcast=True) >> 31
        if EXPONENT_BITS > 0:
            # A code that was masked out is no float's, and the other bits of its byte must stay.
            code = tl.where(inside, _to_field(magnitude, BITS, EXPONENT_BITS) | (sign << (BITS - 1)), 0)
        elif SIGNED_ZERO:
            code = magnitude.to(tl.int32).to(tl.uint32, bitcast=True) | (sign << (BITS - 1))
        else:
            code = magnitude.to(tl.int64).to(tl.uint32)  # 2^31 is one
            code = tl.where(sign != 0, (~code) + 1, code)
            if BITS < 32:
                code = code & ((1 << BITS) - 1)
        # Only the first code may begin before the byte. One that was masked out is 0, whatever it is shifted by.
        if step == 0:
            packed |= code >> (-shift).to(tl.uint32)
        else:
            packed |= code << (shift & 7).to(tl.uint32)
    tl.store(data_ptr + code_at + byte, (packed & 0xFF).to(tl.uint8), mask=exists & (byte < nbytes))


@triton.jit(do_not_specialize=["all_boxes", "boxes", "full", "shorts"])
def _unpack(
    data_ptr, out_ptr, factor_ptr, all_boxes, length, boxes, after, total, full, shorts, plane,
    BITS: tl.constexpr, EXPONENT_BITS: tl.constexpr, SIGNED_ZERO: tl.constexpr, MAX_CODE: tl.constexpr,
    BOX_SIZE: tl.constexpr, BOX: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, GROUPED: tl.constexpr,
    RAGGED: tl.constexpr, TOUCHED: tl.constexpr, FACTORS: tl.constexpr, TERMS: tl.constexpr, FLOAT_SCALE: tl.constexpr,
):  # fmt: skip
    """The values; with FACTORS elements and factors apart."""
    box, fibre, place, column, base = _boxes(length, boxes, after, BOX_SIZE, BLOCK, WIDE)
    along = tl.arange(0, BOX).to(base.dtype)[None, :]
    exists = box < all_boxes
    inside = exists & (along < BOX_SIZE) & (place * BOX_SIZE + along < length)
    scale_at, code_at, _nbytes = _in_bytes(
        box, fibre, place, column, total, length, full, after, shorts, BITS, BOX_SIZE, RAGGED, GROUPED, FLOAT_SCALE
    )
    scale = tl.zeros([BLOCK, 1], tl.int32)
    for byte in tl.static_range(4 if FLOAT_SCALE else 1):
        scale |= tl.load(data_ptr + scale_at + byte, mask=exists, other=0).to(tl.int32) << (8 * byte)
    code = tl.zeros([BLOCK, BOX], tl.uint32)
    for step in tl.static_range(TOUCHED):
        byte = along * BITS // 8 + step
        shift = (8 * byte - along * BITS).to(tl.int32)
        piece = tl.load(data_ptr + code_at + byte, mask=inside & (shift < BITS), other=0).to(tl.uint32)
        if step == 0:
            code |= piece >> (-shift).to(tl.uint32)
        else:
            code |= piece << (shift & 31).to(tl.uint32)
    negative = (code >> (BITS - 1)) & 1
    if EXPONENT_BITS > 0:
        magnitude = _from_field(code & ((1 << (BITS - 1)) - 1), BITS, EXPONENT_BITS, MAX_CODE)
    elif SIGNED_ZERO:
        magnitude = (code & ((1 << (BITS - 1)) - 1)).to(tl.int32).to(tl.float32)
    else:
        whole = tl.where(negative != 0, (~code) + 1, code)
        if BITS < 32:
            whole = whole & ((1 << BITS) - 1)
        magnitude = whole.to(tl.int64).to(tl.float32)
    if FACTORS:
        factor, scale = _factors(scale, FLOAT_SCALE)
        tl.store(factor_ptr + fibre * after + column, factor, mask=exists & (place == 0))
    value = _values(magnitude, negative, scale, BITS, EXPONENT_BITS, SIGNED_ZERO, FLOAT_SCALE)
    _store_terms(out_ptr + base + along * after, plane, value, inside, TERMS)


@triton.jit
def _largest_of_boxes(bits, ALONG: tl.constexpr, SIDE: tl.constexpr, BOX: tl.constexpr):
    """Of the boxes of a square tile, along its rows or down its columns."""
    if ALONG:
        largest = tl.max(tl.reshape(bits, [SIDE, SIDE // BOX, BOX]), axis=2)
    else:
        largest = tl.max(tl.reshape(bits, [SIDE // BOX, BOX, SIDE]), axis=1)
    return largest


@triton.jit
def _spread(of_boxes, ALONG: tl.constexpr, SIDE: tl.constexpr, BOX: tl.constexpr):
    """What each value of a square tile has from its box."""
    if ALONG:
        each = tl.broadcast_to(of_boxes[:, :, None], [SIDE, SIDE // BOX, BOX])
    else:
        each = tl.broadcast_to(of_boxes[:, None, :], [SIDE // BOX, BOX, SIDE])
    return tl.reshape(each, [SIDE, SIDE])


@triton.jit(do_not_specialize=["n_headroom", "m_headroom", "s_headroom", "full", "rest"])
def _both(
    x_ptr, x1_ptr, x2_ptr, n_ptr, m_ptr, stash_ptr, n_headroom, m_headroom, s_headroom, M, N, plane, total, full, rest,
    N_BITS: tl.constexpr, N_MAX: tl.constexpr, N_TERMS: tl.constexpr,
    M_BITS: tl.constexpr, M_MAX: tl.constexpr, M_TERMS: tl.constexpr,
    S_BITS: tl.constexpr, S_MAX: tl.constexpr, SIDE: tl.constexpr, BOX: tl.constexpr, WIDE: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Matrices M x N, read once for what is asked: rounded in boxes along N, along M, and packed in boxes along M.

    They lie one behind the other or, with APART, each where its pointer says. ``total`` full boxes along M; ``full`` of
    a column, ``rest`` values in its short one.
    """
    batch = tl.program_id(2)
    row = tl.program_id(1) * SIDE + tl.arange(0, SIDE)[:, None]
    column = tl.program_id(0) * SIDE + tl.arange(0, SIDE)[None, :]
    box_row = tl.program_id(1) * (SIDE // BOX) + tl.arange(0, SIDE // BOX)[:, None]
    if WIDE:
        batch, row, column, box_row = batch.to(tl.int64), row.to(tl.int64), column.to(tl.int64), box_row.to(tl.int64)
    inside = (row < M) & (column < N)
    index = (batch * M + row) * N + column
    if APART:
        if batch == 1:
            x_ptr = x1_ptr
        if batch == 2:
            x_ptr = x2_ptr
        x = _load(x_ptr + row * N + column, inside)
    else:
        x = _load(x_ptr + index, inside)
    bits = _magnitude_bits(x)
    if N_BITS > 0:
        exponent = _spread(_exponent(_largest_of_boxes(bits, True, SIDE, BOX), n_headroom, 0, 0, 1), True, SIDE, BOX)
        _round_to(x, exponent, n_ptr + index, plane, inside, N_BITS, True, -N_MAX, N_MAX, N_TERMS)
    if M_BITS + S_BITS > 0:
        largest = _largest_of_boxes(bits, False, SIDE, BOX)
    if M_BITS > 0:
        exponent = _spread(_exponent(largest, m_headroom, 0, 0, 1), False, SIDE, BOX)
        _round_to(x, exponent, m_ptr + index, plane, inside, M_BITS, True, -M_MAX, M_MAX, M_TERMS)
    if S_BITS > 0:
        scale = _exponent(largest, s_headroom, 0, 0, 1)
        exponent = _spread(scale, False, SIDE, BOX)
        finite = tl.where(x == x, x, 0.0)  # the exponent says NaN; the code is always the same
        magnitude = _magnitudes(finite, exponent, index, 0, 0, S_BITS, 0, -S_MAX, S_MAX, False, False)
        sign = finite.to(tl.uint32, bitcast=True) >> 31
        code = magnitude.to(tl.int32).to(tl.uint32, bitcast=True) | (sign << (S_BITS - 1))
        is_short = box_row == full
        number = (batch * full + box_row) * N + column
        short = batch * N + column
        begin = (number * 0 + total) * (1 + BOX * S_BITS // 8)
        shorts = tl.num_programs(2).to(number.dtype) * N
        rest_bytes = (rest * S_BITS + 7) // 8
        exists = (box_row * BOX < M) & (column < N)
        tl.store(stash_ptr + tl.where(is_short, begin + short, number), scale.to(tl.uint8), mask=exists)
        code_at = tl.where(is_short, begin + shorts + short * rest_bytes, total + number * (BOX * S_BITS // 8))
        nbytes = tl.where(is_short, rest_bytes, BOX * S_BITS // 8)
        # A box's codes, as words of 64 bits: each is the sum of codes that share no bit.
        place = (tl.arange(0, SIDE) % BOX)[:, None] * S_BITS
        for word in tl.static_range((BOX * S_BITS + 63) // 64):
            shift = place - 64 * word
            left = code.to(tl.uint64) << tl.minimum(tl.maximum(shift, 0), 63).to(tl.uint64)
            right = code.to(tl.uint64) >> tl.minimum(tl.maximum(-shift, 0), 63).to(tl.uint64)
            part = tl.where(shift >= 64, 0, tl.where(shift >= 0, left, tl.where(shift > -S_BITS, right, 0)))
            packed = tl.sum(tl.reshape(part, [SIDE // BOX, BOX, SIDE]), axis=1)
            byte = tl.arange(0, 8)[None, None, :]
            data = (packed[:, :, None] >> (8 * byte).to(tl.uint64)).to(tl.uint8)
            mask = exists[:, :, None] & (8 * word + byte < nbytes[:, :, None])
            tl.store(stash_ptr + code_at[:, :, None] + 8 * word + byte, data, mask=mask)


@triton.jit
def _tile_of_many(table_ptr, DTYPE: tl.constexpr, SIDE: tl.constexpr):
    """This program's square tile of a table's matrices (:func:`table_of`): its line, values, and where these lie."""
    line = table_ptr + tl.program_id(0) * 7
    x_ptr = tl.load(line).to(tl.pointer_type(DTYPE))
    M, N = tl.load(line + 2), tl.load(line + 3)
    row = tl.load(line + 4) * SIDE + tl.arange(0, SIDE)[:, None]
    column = tl.load(line + 5) * SIDE + tl.arange(0, SIDE)[None, :]
    inside = (row < M) & (column < N)
    index = row * N + column
    return line, _load(x_ptr + index, inside), index, M * N, inside


@triton.jit
def _largest_of_many(table_ptr, largest_ptr, DTYPE: tl.constexpr, SIDE: tl.constexpr):
    """The bits of the largest magnitude of each matrix."""
    line, x, _index, _plane, _inside = _tile_of_many(table_ptr, DTYPE, SIDE)
    tl.atomic_max(largest_ptr + tl.load(line + 6), tl.max(_magnitude_bits(x)))


@triton.jit(do_not_specialize=["headroom"])
def _many(
    table_ptr, out_ptr, largest_ptr, headroom, DTYPE: tl.constexpr, ALONG: tl.constexpr, BITS: tl.constexpr,
    SIGNED_ZERO: tl.constexpr, FIXED: tl.constexpr, MIN_CODE: tl.constexpr, MAX_CODE: tl.constexpr,
    TERMS: tl.constexpr, SIDE: tl.constexpr, BOX: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Square tiles of many matrices, rounded under one scale each, or in boxes along their rows or their columns."""
    line, x, index, plane, inside = _tile_of_many(table_ptr, DTYPE, SIDE)
    if GROUPED:
        largest = tl.zeros([1, 1], tl.int32) + tl.load(largest_ptr + tl.load(line + 6))
        exponent = _exponent(largest, headroom, FIXED, 0, 1)
    else:
        largest = _largest_of_boxes(_magnitude_bits(x), ALONG, SIDE, BOX)
        exponent = _spread(_exponent(largest, headroom, FIXED, 0, 1), ALONG, SIDE, BOX)
    pointers = out_ptr + tl.load(line + 1) + index
    _round_to(x, exponent, pointers, plane, inside, BITS, SIGNED_ZERO, MIN_CODE, MAX_CODE, TERMS)


@triton.jit(do_not_specialize=["low", "high"])
def _dropout(x_ptr, out_ptr, low, high, p, scale, total, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    index = program * BLOCK + tl.arange(0, BLOCK)
    x = _load(x_ptr + index, index < total)
    _store(out_ptr + index, tl.where(_noise(index, low, high) >= p, x * scale, 0.0), index < total)


@triton.jit
def _pack_positive(x_ptr, data_ptr, total, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    byte = program * BLOCK + tl.arange(0, BLOCK)
    index = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    x = _load(x_ptr + index, index < total)
    one = tl.where((x <= 0) | (index >= total), 0, 1) << tl.arange(0, 8)[None, :]
    tl.store(data_ptr + byte, tl.sum(one, axis=1).to(tl.uint8), mask=byte * 8 < total)


@triton.jit
def _mask(x_ptr, data_ptr, out_ptr, total, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    byte = program * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, 8)[None, :]
    index = byte[:, None] * 8 + place
    ones = tl.load(data_ptr + byte, mask=byte * 8 < total, other=0).to(tl.int32)
    x = _load(x_ptr + index, index < total)
    _store(out_ptr + index, tl.where(((ones[:, None] >> place) & 1) != 0, x, 0.0), index < total)


class _Launch(NamedTuple):
    """A kernel compiled for a device, with all arguments that follow from the call's shapes.

    Attributes:
        run: launches; of Triton's CompiledKernel, as are ``function`` and ``metadata``.
        grid: programs.
        rest: the arguments after the tensors and the seed's halves.
        stream: gives the current stream of a device.
        device: its number.
    """

    run: Any
    function: Any
    metadata: Any
    grid: tuple[int, int, int]
    rest: tuple[Any, ...]
    stream: Any
    device: int


_launches: dict[Any, _Launch] = {}
# Whether compiled kernels are launched without Triton's help: check() finds out.
_direct = True


def _start(key: tuple[Any, ...], tensors: tuple[Any, ...], seed: tuple[int, ...], prepare: Any) -> None:
    """Launch a kernel.

    Args:
        key: what the launch follows from, but for the tensors' addresses.
        tensors: its first arguments.
        seed: its next ones.
        prepare: of a key that is new: gives the kernel, the grid, and the remaining arguments by name and in order.
    """
    aligned = 0
    for tensor in tensors:
        aligned |= tensor.data_ptr()
    x = tensors[0]
    key = (key, x.device, aligned & 15 == 0)
    known = _launches.get(key)
    if known is None or not _direct:
        with torch.cuda.device_of(x):
            kernel, grid, rest = prepare()
            compiled = kernel[grid](*tensors, *seed, **rest, **OPTIONS)
            # Launched by Triton, the interpreter among others, what is no kernel of the kind that is known here.
            if all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
                if len(_launches) >= MOST_LAUNCHES:
                    _launches.clear()
                active = driver.active
                _launches[key] = _Launch(
                    compiled.run,
                    compiled.function,
                    compiled.packed_metadata,
                    (*grid, 1, 1)[:3],
                    tuple(rest.values()),
                    active.get_current_stream,
                    active.get_current_device(),
                )
        return
    if x.is_cuda and torch.cuda.current_device() != known.device:
        with torch.cuda.device(x.device):
            _again(known, tensors, seed)
    else:
        _again(known, tensors, seed)


def _again(known: _Launch, tensors: tuple[Any, ...], seed: tuple[int, ...]) -> None:
    stream = known.stream(known.device)
    known.run(*known.grid, stream, known.function, known.metadata, None, None, None, *tensors, *seed, *known.rest)


def covers(spec: KernelSpec) -> bool:
    """Whether the kernels know the format: in boxes that a tile holds or of one scale for a row or tensor."""
    if spec.scale == E4M3_SCALE:
        return False
    signed = not spec.signed_zero or spec.min_code < 0
    return signed and (spec.box_size <= MAX_BOX_SIZE or spec.box_size == ALL_OF_A_ROW)


def packs_with(operand: KernelSpec, stash: KernelSpec) -> bool:
    """Whether one more kernel than :func:`quantize_both` gives an operand and its stash: none does."""
    return False


def factorizes(spec: KernelSpec, shape: Shape, packed: bool) -> bool:
    """Whether :func:`factorize`, or :func:`unpack_factors`, knows the format: one scale for a row or the tensor."""
    return spec.box_size in (0, ALL_OF_A_ROW)


def reads_once(specs: Sequence[KernelSpec], shape: Shape) -> bool:
    """Whether :func:`quantize_both` knows the formats: integers in boxes of 16 all, or of one scale for the tensor."""
    if all(map(_is_whole, specs)):
        return True
    # CUDA counts programs in 16 bits but for one axis.
    return all(map(_is_in_boxes, specs)) and shape[0] < 1 << 16 and shape[1] <= SIDE << 15


def _has_integers(spec: KernelSpec) -> bool:
    plain = not (spec.exponent_bits or spec.element_exponent) and spec.least_exponent == 1
    return plain and spec.scale == POWER_OF_TWO


def _is_in_boxes(spec: KernelSpec) -> bool:
    symmetric = bool(spec.signed_zero) and spec.min_code == -spec.max_code and not spec.fixed_exponent
    return symmetric and _has_integers(spec) and spec.box_size == BOTH_BOX


def _is_whole(spec: KernelSpec) -> bool:
    return spec.box_size == 0 and _has_integers(spec)


def check(device: torch.device) -> None:
    """Compile and run the kernels on ``device``, first time and again, and find out how to launch them.

    Raises:
        DifferentResult: the result is not that of the definition. Triton raises errors of its own.
    """
    global _direct
    _direct = True
    try:
        _check(device)
        _check(device)
    except Exception:
        # Another version of Triton may launch what it compiled in another way.
        _direct = False
        _check(device)


def _spec_of(fmt: Format) -> KernelSpec:
    assert fmt.spec is not None
    return fmt.spec


def _check(device: torch.device) -> None:
    shape = 1, 37, 48
    x = torch.linspace(-3.0, 5.0, 37 * 48, device=device).view(37, 48)
    x[:, 5] *= 2.0**-126
    formats: list[tuple[Format, int | None]] = [
        (BlockFloat(4), None), (BlockFloat(4, scale="fit"), 0x2BCDEF01_FEDCBA98), (FixedPoint(5, per_row=True), None),
        (MXFP8E5M2(), None), (Integer(8, 16), None),
    ]  # fmt: skip
    pairs: list[tuple[Tensor, Tensor]] = []
    elements, factors = torch.empty_like(x), x.new_empty(1, 48)
    factorize(x, elements, factors, shape, _spec_of(FixedPoint(5, per_row=True)), None)
    pairs += zip((elements, factors), definition.factorize(x, FixedPoint(5, per_row=True), 0, None), strict=True)
    for fmt, seed in formats:
        spec = _spec_of(fmt)
        data = definition.pack(x, fmt, 0, seed)
        expected = definition.unpack(data, x.shape, fmt, 0, x.dtype)
        rounded, packed, unpacked = torch.empty_like(x), torch.empty_like(data), torch.empty_like(x)
        fake_quantize(x, rounded, shape, spec, seed)
        pack(x, packed, shape, spec, seed)
        unpack(data, unpacked, shape, spec)
        pairs += [(rounded, expected), (packed, data), (unpacked, expected)]
    for fmt in (BlockFloat(5), FixedPoint(5)):
        spec = _spec_of(fmt)
        along, across = (torch.empty_like(x) for _ in range(2))
        stash = torch.empty(fmt.nbytes(x.shape, 0), dtype=torch.uint8, device=device)
        quantize_both([x], shape, (along, spec, 0), (across, spec, 0), (stash, spec))
        pairs += [(out, definition.fake_quantize(x, fmt, dim, None, x.dtype)) for out, dim in ((along, 1), (across, 0))]
        pairs.append((stash, definition.pack(x, fmt, 0, None)))
    ones = torch.empty(masks.nbytes(x.numel()), dtype=torch.uint8, device=device)
    dropped, masked = torch.empty_like(x), torch.empty_like(x)
    holed = x.bfloat16()
    holed[3] = torch.nan
    thinned = torch.empty_like(holed)
    dropout(holed, thinned, 0.3, 1 / 0.7, 5)
    # Which NaN it is differs from device to device.
    pairs.append((thinned.nan_to_num(7.0), masks.dropout(holed, 0.3, 1 / 0.7, 5).nan_to_num(7.0)))
    pack_positive(x, ones)
    mask(x, ones, masked)
    dropout(x, dropped, 0.3, 1 / 0.7, 0x2BCDEF01_FEDCBA98)
    pairs += [(ones, masks.pack_positive(x)), (masked, masks.mask(x, masks.pack_positive(x)))]
    pairs.append((dropped, masks.dropout(x, 0.3, 1 / 0.7, 0x2BCDEF01_FEDCBA98)))
    if not all(torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)) for got, wanted in pairs):
        raise DifferentResult("the result is not that of the definition")


# A tensor, what it is rounded to, and the bfloat16 terms in front of it; 0 for values as they are.
Rounded = tuple[Tensor, KernelSpec, int]

# All tensors below are contiguous, on one CUDA device and not empty: values float32, bfloat16 or float16, packed bytes
# uint8; seen as ``shape`` (before, length, after) with the groups along ``length``. ``seed`` None rounds to nearest.


def fake_quantize(x: Tensor, out: Tensor, shape: Shape, spec: KernelSpec, seed: int | None, terms: int = 0) -> None:
    """Write the rounded values of ``x`` to ``out``, as so many bfloat16 terms if any; ``covers(spec)`` holds."""
    _round(x, out, None, shape, spec, seed, terms, _largest_of(x, shape, spec))


def factorize(x: Tensor, elements: Tensor, factors: Tensor, shape: Shape, spec: KernelSpec, seed: int | None) -> None:
    """Write float32 elements of ``x`` and the factor of each row, or of the tensor; of a format with such scales."""
    _round(x, elements, factors, shape, spec, seed, 0, _largest_of(x, shape, spec))


def _round(
    x: Tensor,
    out: Tensor,
    factors: Tensor | None,
    shape: Shape,
    spec: KernelSpec,
    seed: int | None,
    terms: int,
    largest: Tensor,
) -> None:
    shape = _shape_of_groups(shape, spec)

    def prepare() -> Any:
        numbers, tile = _tile(shape, spec, out.numel())
        rest = {**numbers, "headroom": spec.headroom, "plane": x.numel(), **_codes(spec), **tile}
        rest |= {**_mode(spec, shape, seed), "FACTORS": factors is not None, "TERMS": terms}
        return _fake_quantize, _grid(numbers, tile), _ordered(_fake_quantize, rest)

    key = ("round", shape, spec, seed is None, x.dtype, out.dtype, factors is None, terms)
    _start(key, (x, out, largest, largest if factors is None else factors), _seed_halves(seed), prepare)


def pack(x: Tensor, data: Tensor, shape: Shape, spec: KernelSpec, seed: int | None) -> None:
    """Write the packed bytes of ``x`` to ``data``; as for :func:`fake_quantize`."""
    _pack_and_round(x, data, shape, spec, seed, _largest_of(x, shape, spec), None)


def _pack_and_round(
    x: Tensor,
    data: Tensor,
    shape: Shape,
    spec: KernelSpec,
    seed: int | None,
    largest: Tensor,
    rounded: Rounded | None,
) -> None:
    """:func:`pack`, and what is to be rounded to nearest beside it, where all of ``x`` has one scale."""
    shape = _shape_of_groups(shape, spec)

    def prepare() -> Any:
        bits = spec.bits
        numbers, tile = _tile(shape, spec, max(x.numel() * max(1, rounded[2] if rounded else 0), data.numel()))
        box_bytes = -(-min(tile["BOX_SIZE"], shape[1]) * bits // 8)
        beside = rounded[1] if rounded else spec
        rest = {
            **numbers, **_layout(shape, spec, tile), "headroom": spec.headroom, **_codes(spec), **tile,
            **_mode(spec, shape, seed), "BYTES": _power_of_two_above(box_bytes),
            "TOUCHED": max((8 * byte + 7) // bits - 8 * byte // bits + 1 for byte in range(bits)),
            "o_headroom": beside.headroom, "O_BITS": beside.bits if rounded else 0,
            "O_SIGNED_ZERO": bool(beside.signed_zero), "O_FIXED": beside.fixed_exponent, "O_MIN": beside.min_code,
            "O_MAX": beside.max_code, "O_TERMS": rounded[2] if rounded else 0,
        }  # fmt: skip
        return _pack, _grid(numbers, tile), _ordered(_pack, rest)

    out = rounded[0] if rounded else data
    key = ("pack", shape, spec, seed is None, x.dtype, rounded and (rounded[1], rounded[2], out.dtype))
    _start(key, (x, data, largest, out), _seed_halves(seed), prepare)


def unpack(data: Tensor, out: Tensor, shape: Shape, spec: KernelSpec, terms: int = 0) -> None:
    """Write the values of packed bytes to ``out``; as for :func:`fake_quantize`."""
    _unpack_to(data, out, None, shape, spec, terms)


def unpack_factors(data: Tensor, elements: Tensor, factors: Tensor, shape: Shape, spec: KernelSpec) -> None:
    """Write what :func:`factorize` gave of what was packed."""
    _unpack_to(data, elements, factors, shape, spec, 0)


def _unpack_to(data: Tensor, out: Tensor, factors: Tensor | None, shape: Shape, spec: KernelSpec, terms: int) -> None:
    plane = math.prod(shape)
    shape = _shape_of_groups(shape, spec)

    def prepare() -> Any:
        numbers, tile = _tile(shape, spec, max(out.numel(), data.numel()))
        rest = {
            **numbers, **_layout(shape, spec, tile), **_codes(spec), **tile,
            "plane": plane, "GROUPED": _grouped(spec, shape), "FACTORS": factors is not None, "TERMS": terms,
            "TOUCHED": max((code * spec.bits % 8 + spec.bits + 7) // 8 for code in range(8)),
        }  # fmt: skip
        return _unpack, _grid(numbers, tile), _ordered(_unpack, rest)

    key = ("unpack", shape, spec, out.dtype, factors is None, terms)
    _start(key, (data, out, out if factors is None else factors), (), prepare)


def quantize_both(
    xs: Sequence[Tensor],
    shape: Shape,
    along: Rounded | None,
    across: Rounded | None,
    stash: tuple[Tensor, KernelSpec] | None,
) -> None:
    """Round matrices to nearest in boxes along their rows and across them, and pack them across, reading them once.

    In formats of one scale for the tensor, of which there is one, after a pass that finds the largest magnitude.

    Args:
        xs: ``shape`` (matrices, M, N) in one tensor, or each matrix by itself, MOST_APART at most.
        along: what is rounded in boxes along N.
        across: along M.
        stash: packed in boxes along M.
    """
    specs = [part[1] for part in (along, across, stash) if part]
    if any(map(_is_whole, specs)):  # then all, see reads_once
        _quantize_whole(
            xs[0], shape, _largest_of(xs[0], shape, specs[0]), [part for part in (along, across) if part], stash
        )
        return
    batch, m, n = shape

    def prepare() -> Any:
        plane = math.prod(shape)
        full, rest = divmod(m, BOTH_BOX)
        numbers: dict[str, Any] = {
            "n_headroom": along[1].headroom if along else 0, "m_headroom": across[1].headroom if across else 0,
            "s_headroom": stash[1].headroom if stash else 0,
            "M": m, "N": n, "plane": plane, "total": batch * full * n, "full": full, "rest": rest,
        }  # fmt: skip
        for name, part in (("N", along), ("M", across), ("S", stash)):
            spec = part[1] if part else None
            numbers |= {f"{name}_BITS": spec.bits if spec else 0, f"{name}_MAX": spec.max_code if spec else 0.0}
        numbers |= {"N_TERMS": along[2] if along else 0, "M_TERMS": across[2] if across else 0}
        largest = max(plane * max(1, numbers["N_TERMS"], numbers["M_TERMS"]), stash[0].numel() if stash else 0)
        numbers |= {"SIDE": SIDE, "BOX": BOTH_BOX, "WIDE": largest >= WIDE_FROM, "APART": len(xs) > 1}
        return _both, (-(-n // SIDE), -(-m // SIDE), batch), _ordered(_both, numbers)

    x = xs[0]
    apart = (*xs, x, x)[:MOST_APART]
    outs = (along[0] if along else x, across[0] if across else x, stash[0] if stash else x)
    key = (
        "both", shape, len(xs), x.dtype, along and (along[1], along[2], along[0].dtype),
        across and (across[1], across[2], across[0].dtype), stash and stash[1],
    )  # fmt: skip
    _start(key, (*apart, *outs), (), prepare)


def _quantize_whole(
    x: Tensor, shape: Shape, largest: Tensor, rounded: list[Rounded], stash: tuple[Tensor, KernelSpec] | None
) -> None:
    if stash:
        data, spec = stash
        _pack_and_round(x, data, shape, spec, None, largest, rounded.pop() if rounded else None)
    for out, spec, terms in rounded:
        _round(x, out, None, shape, spec, None, terms, largest)


# Of a pointer in a table.
_FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def table_of(matrices: Sequence[Tensor], begins: Sequence[int]) -> Tensor:
    """Where :func:`quantize_many` reads and writes, on the device of the matrices.

    A line for each square tile: the matrix's address, the first element of what is made of it, its M and N, which tile
    down and along it is, and the matrix's number.
    """
    lines = []
    for number, (x, begin) in enumerate(zip(matrices, begins, strict=True)):
        m, n = x.shape
        tiles = torch.cartesian_prod(torch.arange(-(-m // SIDE)), torch.arange(-(-n // SIDE)))
        of_matrix = torch.tensor([x.data_ptr(), begin, m, n]).expand(len(tiles), 4)
        lines.append(torch.cat([of_matrix, tiles, torch.full((len(tiles), 1), number)], 1))
    return torch.cat(lines).to(matrices[0].device)


def quantize_many(
    table: Tensor, count: int, out: Tensor, dtype: torch.dtype, along: bool, spec: KernelSpec, terms: int
) -> None:
    """Round the ``count`` matrices of a table, of ``dtype``, to nearest: in boxes along their rows, or across them.

    In a format of one scale for the tensor after a pass that finds the largest magnitudes.

    Args:
        out: of each matrix the values, or so many bfloat16 terms if any, from where the table says.
    """
    whole, largest, of_tile = _is_whole(spec), table, {"DTYPE": _FLOATS[dtype], "SIDE": SIDE}
    if whole:
        largest = torch.zeros(count, dtype=torch.int32, device=table.device)
        launch = _largest_of_many, (len(table),), _ordered(_largest_of_many, of_tile)
        _start(("largest of many", len(table), dtype), (table, largest), (), lambda: launch)

    def prepare() -> Any:
        codes = {name: _codes(spec)[name] for name in ("BITS", "SIGNED_ZERO", "FIXED", "MIN_CODE", "MAX_CODE")}
        rest = {"headroom": spec.headroom, "ALONG": along, **codes, "TERMS": terms, "BOX": BOTH_BOX, "GROUPED": whole}
        return _many, (len(table),), _ordered(_many, rest | of_tile)

    _start(("many", len(table), dtype, out.dtype, along, spec, terms), (table, out, largest), (), prepare)


def dropout(x: Tensor, out: Tensor, p: float, scale: float, seed: int) -> None:
    """As :func:`fairseq_dsq.kernels.masks.dropout`."""

    def prepare() -> Any:
        total = x.numel()
        rest = {"p": p, "scale": scale, "total": total, "BLOCK": TILE, "WIDE": total >= WIDE_FROM}
        return _dropout, (-(-total // TILE),), rest

    key = ("dropout", p, scale, x.numel(), x.dtype, out.dtype)
    _start(key, (x, out), _seed_halves(seed), prepare)


def pack_positive(x: Tensor, data: Tensor) -> None:
    """As :func:`fairseq_dsq.kernels.masks.pack_positive`."""
    _start(("pack_positive", x.numel(), x.dtype), (x, data), (), lambda: _by_bytes(_pack_positive, x.numel()))


def mask(x: Tensor, data: Tensor, out: Tensor) -> None:
    """As :func:`fairseq_dsq.kernels.masks.mask`."""
    _start(("mask", x.numel(), x.dtype, out.dtype), (x, data, out), (), lambda: _by_bytes(_mask, x.numel()))


def _by_bytes(kernel: Any, total: int) -> Any:
    rest = {"total": total, "BLOCK": TILE // 8, "WIDE": total >= WIDE_FROM}
    return kernel, (-(-total // TILE),), rest


def _grouped(spec: KernelSpec, shape: Shape) -> bool:
    """Whether what shares a scale goes in chunks: the tensor, and rows that no tile holds."""
    return spec.box_size == 0 or (spec.box_size == ALL_OF_A_ROW and shape[1] > MAX_BOX_SIZE)


def _shape_of_groups(shape: Shape, spec: KernelSpec) -> Shape:
    return (1, math.prod(shape), 1) if spec.box_size == 0 else shape


def _largest_of(x: Tensor, shape: Shape, spec: KernelSpec) -> Tensor:
    """The largest magnitude of each group, where they go in chunks; else ``x``, which nothing reads."""
    if not _grouped(spec, shape):
        return x
    groups = x.view(_shape_of_groups(shape, spec))
    return torch.linalg.vector_norm(groups, math.inf, 1, dtype=torch.float32)  # type: ignore[no-any-return]


def _tile(shape: Shape, spec: KernelSpec, elements: int) -> tuple[dict[str, int], dict[str, Any]]:
    """How a tensor goes in boxes, and the tiles of these; ``elements``: of the largest tensor."""
    before, length, after = shape
    size = spec.box_size
    if _grouped(spec, shape):
        size = CHUNK if after == 1 else CHUNK_ACROSS
    elif size == ALL_OF_A_ROW:
        size = _power_of_two_above(length)  # rows of many lengths are compiled once
    boxes = -(-length // size)
    numbers = {"all_boxes": before * boxes * after, "length": length, "boxes": boxes, "after": after}
    tile = {
        "BOX_SIZE": size,
        "BOX": _power_of_two_above(min(size, length)),
        "BLOCK": max(1, TILE // _power_of_two_above(size)),
        "WIDE": elements >= WIDE_FROM,
    }
    return numbers, tile


def _layout(shape: Shape, spec: KernelSpec, tile: dict[str, Any]) -> dict[str, Any]:
    """Where packed boxes lie, see _in_bytes."""
    before, length, after = shape
    full = length // tile["BOX_SIZE"]
    ragged = length % tile["BOX_SIZE"] != 0
    return {"total": before * full * after, "full": full, "shorts": before * after, "RAGGED": ragged}


def _codes(spec: KernelSpec) -> dict[str, Any]:
    return {
        "BITS": spec.bits, "EXPONENT_BITS": spec.exponent_bits, "SIGNED_ZERO": bool(spec.signed_zero),
        "FIXED": spec.fixed_exponent, "ELEMENT": spec.element_exponent, "LEAST": spec.least_exponent,
        "MIN_CODE": spec.min_code, "MAX_CODE": spec.max_code, "FLOAT_SCALE": spec.scale == FLOAT32_SCALE,
    }  # fmt: skip


def _mode(spec: KernelSpec, shape: Shape, seed: int | None) -> dict[str, Any]:
    return {"STOCHASTIC": seed is not None, "GROUPED": _grouped(spec, shape)}


def _ordered(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """A kernel's arguments in its own order, of these that are there."""
    return {name: arguments[name] for name in kernel.arg_names if name in arguments}


def _grid(numbers: dict[str, int], tile: dict[str, Any]) -> tuple[int]:
    return (-(-numbers["all_boxes"] // tile["BLOCK"]),)


def _power_of_two_above(number: int) -> int:
    """The smallest power of two that is not below it."""
    return 1 << (number - 1).bit_length()


def _seed_halves(seed: int | None) -> tuple[int, int]:
    """The lower and upper 32 bits of the seed as int32: of one type whatever they hold, so nothing compiles anew."""
    if seed is None:
        return 0, 0
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return low - (low >> 31 << 32), high
