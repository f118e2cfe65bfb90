"""Packed tensors: codes of exactly ``bits`` bits, held as bytes.

Layout of the byte buffer, for each part of :func:`fairseq_dsq.quant.reference.split_boxes` (full boxes, then short
ones): one uint8 biased exponent per box (255: the box is NaN), then the boxes' codes, each box starting on a byte,
little-endian. Sign-magnitude codes carry the sign in their highest bit. This is the readable definition;
``native/quantize.cpp`` and ``triton_kernels.py`` write the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq_dsq.formats import box_nbytes
from fairseq_dsq.quant import reference
from fairseq_dsq.quant.reference import CodeSpec


def pack(x: Tensor, spec: CodeSpec, dim: int, seed: int | None) -> Tensor:
    """The uint8 bytes of ``x``; see :func:`fairseq_dsq.quant.pack`; ``seed`` None rounds to nearest."""
    pieces = []
    parts = reference.split_boxes(x, spec.box_size, dim)
    for part, random in zip(parts, reference.box_noise(x, spec, dim, seed), strict=True):
        boxes = part.float()
        exponent = reference.box_exponent(boxes, spec)
        codes = reference.encode(boxes, exponent, spec, random)
        pieces.append(exponent.to(torch.uint8).flatten())
        pieces.append(_to_bytes(codes, spec).flatten())
    return torch.cat(pieces) if pieces else x.new_empty(0, dtype=torch.uint8)


def unpack(data: Tensor, shape: Sequence[int], spec: CodeSpec, dim: int, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`pack`, as a tensor of ``shape`` and ``dtype``."""
    out = torch.empty(shape, dtype=dtype, device=data.device)
    start = 0
    for part in reference.split_boxes(out, spec.box_size, dim):
        *outer, values = part.shape
        boxes = part.numel() // values
        box_bytes = box_nbytes(values, spec.bits)
        exponent = data[start : start + boxes].to(torch.int32).view(*outer, 1)
        start += boxes
        codes = data[start : start + boxes * box_bytes].view(*outer, box_bytes)
        start += boxes * box_bytes
        reference.decode(_from_bytes(codes, values, spec), exponent, spec, part)
    return out


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """(code, byte, shift) of every byte that a code touches: the code's bits shifted left by ``shift`` lie in it.

    Eight codes take ``bits`` bytes exactly, so the pattern repeats.
    """
    return [
        (code, byte, code * bits - 8 * byte)
        for code in range(8)
        for byte in range(code * bits // 8, ((code + 1) * bits - 1) // 8 + 1)
    ]


def _shift(x: Tensor, left: int) -> Tensor:
    return x << left if left >= 0 else x >> -left


def _integer_dtype(bits: int) -> torch.dtype:
    """Wide enough for a code shifted by up to 7 bits; where uint8 drops the bits beyond, they are not wanted."""
    if bits <= 8:
        return torch.uint8
    return torch.int32 if bits <= 24 else torch.int64


def _to_bytes(codes: Tensor, spec: CodeSpec) -> Tensor:
    """float32 codes (..., values), which are overwritten, to uint8 (..., bytes); any strides."""
    values = codes.shape[-1]
    dtype = _integer_dtype(spec.bits)
    codes = codes.nan_to_num_(0.0)  # a NaN box's codes: its exponent says NaN, its bytes are always the same
    if spec.signed_zero:
        integers = codes.abs().to(dtype)
        integers |= codes.signbit().to(dtype) << (spec.bits - 1)
    else:
        integers = codes.to(torch.int64).to(dtype)
    if values % 8:
        integers = torch.nn.functional.pad(integers, (0, -values % 8))
    lanes = integers.unflatten(-1, (-1, 8)).unbind(-1)
    mask = (1 << spec.bits) - 1
    if not spec.signed_zero:
        lanes = tuple(lane & mask for lane in lanes)
    columns: list[Tensor | None] = [None] * spec.bits
    for code, byte, shift in _overlaps(spec.bits):
        piece = (_shift(lanes[code], shift) & 0xFF).to(torch.uint8)
        column = columns[byte]
        columns[byte] = piece if column is None else column.bitwise_or_(piece)
    data = torch.stack([column for column in columns if column is not None], dim=-1).flatten(-2)
    return data[..., : box_nbytes(values, spec.bits)]


def _from_bytes(data: Tensor, values: int, spec: CodeSpec) -> Tensor:
    """uint8 (..., bytes) to float32 codes (..., values)."""
    groups = -(-values // 8)
    padding = groups * spec.bits - data.shape[-1]
    if padding:
        data = torch.nn.functional.pad(data, (0, padding))
    dtype = _integer_dtype(spec.bits)
    columns = [column.to(dtype) for column in data.unflatten(-1, (groups, spec.bits)).unbind(-1)]
    lanes: list[Tensor | None] = [None] * 8
    for code, byte, shift in _overlaps(spec.bits):
        piece = _shift(columns[byte], -shift)
        lane = lanes[code]
        lanes[code] = piece if lane is None else lane.bitwise_or_(piece)
    integers = torch.stack([lane for lane in lanes if lane is not None], dim=-1).flatten(-2)[..., :values]
    sign = 1 << (spec.bits - 1)
    if spec.signed_zero:
        codes = (integers & (sign - 1)).to(torch.float32)
        return codes.copysign_(0.5 - (integers & sign).bool().to(torch.float32))
    wide = integers.to(torch.int32 if spec.bits <= 24 else torch.int64) & (2 * sign - 1)
    return ((wide ^ sign) - sign).to(torch.float32)
