"""Packed tensors: codes of exactly ``bits`` bits, held as bytes.

Layout of the byte buffer, for each part of :func:`fairseq_dsq.quant.reference.split_boxes` (full boxes, then short
ones): one uint8 biased exponent per box (255: the box is NaN), then the boxes' codes, each box starting on a byte,
little-endian. Sign-magnitude codes carry the sign in their highest bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_dsq.formats import Float32, Format, ScaledInteger
from fairseq_dsq.quant import reference
from fairseq_dsq.quant.reference import Rounding


@dataclass(frozen=True)
class Packed:
    """A tensor in packed form.

    Attributes:
        data: uint8 bytes; for :class:`Float32` the tensor itself, not a copy.
        shape: shape of the tensor that was packed.
        dtype: its dtype.
        fmt: its format.
        dim: the dimension along which the boxes lie.
    """

    data: Tensor
    shape: torch.Size
    dtype: torch.dtype
    fmt: Format
    dim: int

    @property
    def spec(self) -> tuple[torch.Size, torch.dtype, Format, int]:
        """All but the bytes: ``Packed(data, *spec)`` puts a tensor together again."""
        return self.shape, self.dtype, self.fmt, self.dim

    @property
    def nbytes(self) -> int:
        """Bytes held; equals ``fmt.nbytes(shape, dim)`` (for a half-precision tensor in Float32: its own size)."""
        return self.data.numel() * self.data.element_size()

    def unpack(self) -> Tensor:
        """The tensor, equal bit for bit to ``fake_quantize`` of what was packed."""
        if isinstance(self.fmt, Float32):
            return self.data
        out = torch.empty(self.shape, dtype=self.dtype, device=self.data.device)
        start = 0
        for part in reference.split_boxes(out, self.fmt.box_size, self.dim):
            *outer, values = part.shape
            boxes = part.numel() // values
            box_bytes = _box_bytes(values, self.fmt.bits)
            exponent = self.data[start : start + boxes].to(torch.int32).view(*outer, 1)
            start += boxes
            codes = self.data[start : start + boxes * box_bytes].view(*outer, box_bytes)
            start += boxes * box_bytes
            reference.decode(_from_bytes(codes, values, self.fmt), exponent, self.fmt, part)
        return out


def pack_tensor(x: Tensor, fmt: Format, dim: int, rounding: Rounding, generator: torch.Generator | None) -> Packed:
    """See :func:`fairseq_dsq.quant.pack`."""
    if isinstance(fmt, Float32):
        return Packed(x, x.shape, x.dtype, fmt, dim)
    pieces = []
    for part in reference.split_boxes(x, fmt.box_size, dim):
        boxes = part.float()
        exponent = reference.box_exponent(boxes, fmt)
        codes = reference.encode(boxes, exponent, fmt, rounding, generator)
        pieces.append(exponent.to(torch.uint8).flatten())
        pieces.append(_to_bytes(codes, fmt).flatten())
    data = torch.cat(pieces) if pieces else x.new_empty(0, dtype=torch.uint8)
    return Packed(data, x.shape, x.dtype, fmt, dim)


def _box_bytes(values: int, bits: int) -> int:
    return -(-values * bits // 8)


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


def _to_bytes(codes: Tensor, fmt: ScaledInteger) -> Tensor:
    """float32 codes (..., values), which are overwritten, to uint8 (..., bytes); any strides."""
    values = codes.shape[-1]
    dtype = _integer_dtype(fmt.bits)
    codes = codes.nan_to_num_(0.0)  # a NaN box's codes: its exponent says NaN, its bytes are always the same
    if fmt.signed_zero:
        integers = codes.abs().to(dtype)
        integers |= codes.signbit().to(dtype) << (fmt.bits - 1)
    else:
        integers = codes.to(torch.int64).to(dtype)
    if values % 8:
        integers = torch.nn.functional.pad(integers, (0, -values % 8))
    lanes = integers.unflatten(-1, (-1, 8)).unbind(-1)
    mask = (1 << fmt.bits) - 1
    if not fmt.signed_zero:
        lanes = tuple(lane & mask for lane in lanes)
    columns: list[Tensor | None] = [None] * fmt.bits
    for code, byte, shift in _overlaps(fmt.bits):
        piece = (_shift(lanes[code], shift) & 0xFF).to(torch.uint8)
        column = columns[byte]
        columns[byte] = piece if column is None else column.bitwise_or_(piece)
    data = torch.stack([column for column in columns if column is not None], dim=-1).flatten(-2)
    return data[..., : _box_bytes(values, fmt.bits)]


def _from_bytes(data: Tensor, values: int, fmt: ScaledInteger) -> Tensor:
    """uint8 (..., bytes) to float32 codes (..., values)."""
    groups = -(-values // 8)
    padding = groups * fmt.bits - data.shape[-1]
    if padding:
        data = torch.nn.functional.pad(data, (0, padding))
    dtype = _integer_dtype(fmt.bits)
    columns = [column.to(dtype) for column in data.unflatten(-1, (groups, fmt.bits)).unbind(-1)]
    lanes: list[Tensor | None] = [None] * 8
    for code, byte, shift in _overlaps(fmt.bits):
        piece = _shift(columns[byte], -shift)
        lane = lanes[code]
        lanes[code] = piece if lane is None else lane.bitwise_or_(piece)
    integers = torch.stack([lane for lane in lanes if lane is not None], dim=-1).flatten(-2)[..., :values]
    sign = 1 << (fmt.bits - 1)
    if fmt.signed_zero:
        codes = (integers & (sign - 1)).to(torch.float32)
        return codes.copysign_(0.5 - (integers & sign).bool().to(torch.float32))
    wide = integers.to(torch.int32 if fmt.bits <= 24 else torch.int64) & (2 * sign - 1)
    return ((wide ^ sign) - sign).to(torch.float32)
