"""What is done with any format, in plain torch: every other implementation must equal it bit for bit.

Layout of packed bytes: what all of the tensor shares, where there is such; then for each part of
:func:`split_groups` (full groups, then short ones) the groups' scales and the groups' codes of exactly ``bits`` bits,
each group starting on a byte, little-endian.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fairseq_dsq.formats.base import Format, Group, Square


def split_groups(x: Tensor, group: Group, dim: int) -> list[Tensor]:
    """Cut ``x`` into groups along ``dim``.

    Args:
        x: any shape.
        group: the values of one, see :class:`~fairseq_dsq.formats.Format`.
        dim: the dimension along which the groups lie.

    Returns:
        Tensors (before, groups, after, values), ``before`` and ``after`` being the elements in front of and behind
        ``dim``: first all full groups, then the short last ones. Parts without elements are left out. Views of a
        contiguous ``x``: writing to them fills it. The values of a square are two dimensions, and lie along the last
        two of ``x``, whichever ``dim`` is: first the full ones, then those at the rows' ends, the columns', both.
    """
    if x.numel() == 0:
        return []
    if group == "tensor":
        return [x.reshape(1, 1, 1, -1)]
    if isinstance(group, Square):
        return _squares(x, group.side)
    if x.dim() == 0:
        x = x.reshape(1)
    dim = dim % x.dim()
    length = x.shape[dim]
    values = length if group == "row" else min(group, length)
    x = x.reshape(math.prod(x.shape[:dim]), length, -1)
    full = length // values
    parts = [x[:, : full * values].unflatten(1, (full, values)).transpose(2, 3)]
    if length % values:
        parts.append(x[:, full * values :].unsqueeze(1).transpose(2, 3))
    return parts


def _squares(x: Tensor, side: int) -> list[Tensor]:
    rows, columns = (1, 1, *x.shape)[-2:]
    x = x.reshape(-1, rows, columns)

    def cuts(length: int) -> list[tuple[slice, int]]:
        """Where the whole squares lie, and the short one; and their sides."""
        end = length // side * side
        found = [(slice(0, end), side), (slice(end, length), length - end)]
        return [(piece, size) for piece, size in found if piece.start < piece.stop]

    return [
        x[:, high, wide].unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3)
        for high, height in cuts(rows)
        for wide, width in cuts(columns)
    ]


def _values(part: Tensor) -> Tensor:
    """A part of :func:`split_groups` with all values of a group in one dimension."""
    return part.flatten(3)


def _fill(part: Tensor, values: Tensor) -> Tensor:
    """Write values to a part; gives the part."""
    return part.copy_(values.view(part.shape) if part.dim() > 4 else values)


def _mix(h: Tensor) -> Tensor:
    """A permutation of the integers below 2^32 (int64 tensor) that changes half the bits when one bit changes.

    Source: C. Wellons, "Prospecting for Hash Functions", 2018 (lowbias32). A product that overflows int64 is right
    in its lower 32 bits.
    """
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def random_bits(index: Tensor, seed: int) -> Tensor:
    """Uniform integers below 2^32, int64.

    Args:
        index: int64, an element's place in the contiguous tensor. 2^32 elements apart they repeat.
        seed: 0 to 2^62 - 1, of one call.

    Returns:
        Of ``index``'s shape: a function of the two alone, so that every implementation and any order of work gives the
        same.
    """
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return _mix(_mix((index + low) & 0xFFFFFFFF) ^ high)


def noise(index: Tensor, seed: int) -> Tensor:
    """Uniform multiples of 2^-24 in [0, 1) for stochastic rounding, float32: the upper of :func:`random_bits`."""
    return (random_bits(index, seed) >> 8).to(torch.float32).mul_(2.0**-24)


def _group_noise(x: Tensor, fmt: Format, dim: int, seed: int | None) -> list[Tensor | None]:
    """The noise of each part of ``split_groups(x, ...)``; None where ``seed`` is None: nearest rounding."""
    if seed is None:
        return [None] * len(split_groups(x, fmt.group, dim))
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    return [noise(_values(part), seed) for part in split_groups(index, fmt.group, dim)]


def fake_quantize(x: Tensor, fmt: Format, dim: int, seed: int | None, dtype: torch.dtype) -> Tensor:
    """See :func:`fairseq_dsq.quantized.fake_quantize`; ``seed`` None rounds to nearest."""
    out, fmt = torch.empty(x.shape, dtype=dtype, device=x.device), fmt.of_tensor(x)
    sources, targets = split_groups(x, fmt.group, dim), split_groups(out, fmt.group, dim)
    for source, target, random in zip(sources, targets, _group_noise(x, fmt, dim, seed), strict=True):
        groups = _values(source).float()
        scale = fmt.scale_of(groups)
        _fill(target, fmt.decode(fmt.encode(groups, scale, random), scale))
    return out


def factorize(x: Tensor, fmt: Format, dim: int, seed: int | None) -> tuple[Tensor, Tensor]:
    """Elements of ``x``'s shape and the factor of each row along ``dim`` (of size 1 there), float32.

    For formats with one scale for each row or for the tensor; the product of both is the value. Where a group holds Inf
    or NaN its elements are NaN, whatever its factor.
    """
    elements, fmt = torch.empty(x.shape, device=x.device), fmt.of_tensor(x)
    sources = split_groups(x, fmt.group, dim)

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for source, random in zip(sources, _group_noise(x, fmt, dim, seed), strict=True):
            groups = _values(source).float()
            scale = fmt.scale_of(groups)
            yield fmt.factorize(fmt.encode(groups, scale, random), scale)

    return elements, _join_factors(elements, fmt, dim, parts())


def _join_factors(elements: Tensor, fmt: Format, dim: int, parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Write the elements of each part where they belong; gives their factors."""
    shape = [1 if axis == dim % elements.dim() else size for axis, size in enumerate(elements.shape)]
    factors = elements.new_ones(shape)
    for target, (part, factor) in zip(split_groups(elements, fmt.group, dim), parts, strict=True):
        _fill(target, part.masked_fill(factor.isnan(), math.nan))
        factor = factor.nan_to_num(1.0)
        factors.copy_(factor.view(()) if factor.numel() == 1 else factor.reshape(shape))
    return factors


def pack(x: Tensor, fmt: Format, dim: int, seed: int | None) -> Tensor:
    """The uint8 bytes of ``x``; see :func:`fairseq_dsq.quantized.pack`; ``seed`` None rounds to nearest."""
    if x.numel() == 0:
        return x.new_empty(0, dtype=torch.uint8)
    fmt = fmt.of_tensor(x)
    pieces = [fmt.tensor_to_bytes().to(x.device)]
    parts = split_groups(x, fmt.group, dim)
    for part, random in zip(parts, _group_noise(x, fmt, dim, seed), strict=True):
        groups = _values(part).float()
        scale = fmt.scale_of(groups)
        elements = fmt.encode(groups, scale, random)
        if fmt.scale_bytes:
            elements.nan_to_num_(0.0)  # the scale says NaN; the bytes are the same
        pieces.append(scale.contiguous().flatten().view(torch.uint8))
        pieces.append(to_bytes(fmt.to_codes(elements), fmt.bits).flatten())
    return torch.cat(pieces)


def _unpacked(data: Tensor, shape: Sequence[int], fmt: Format, dim: int) -> tuple[Format, list[tuple[Tensor, Tensor]]]:
    """The format of the tensor, and (elements, scales) of each part of ``split_groups``."""
    shared, data = data.tensor_split([fmt.tensor_bytes if data.numel() else 0])
    found = []
    for part in split_groups(torch.empty(shape, device="meta"), fmt.group, dim):
        *outer, values = _values(part).shape
        groups = part.numel() // values
        nbytes = fmt.codes_nbytes(values)
        scales, codes, data = data.tensor_split([groups * fmt.scale_bytes, groups * (fmt.scale_bytes + nbytes)])
        # Bytes may begin anywhere; a view of another dtype must not.
        scale = scales.clone().view(fmt.scale_dtype).view(*outer, fmt.scale_bytes // fmt.scale_dtype.itemsize)
        found.append((fmt.from_codes(from_bytes(codes.view(*outer, nbytes), values, fmt.bits)), scale))
    return (fmt.tensor_from_bytes(shared) if found else fmt), found


def unpack(data: Tensor, shape: Sequence[int], fmt: Format, dim: int, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`pack`, as a tensor of ``shape`` and ``dtype``."""
    out = torch.empty(shape, dtype=dtype, device=data.device)
    fmt, parts = _unpacked(data, shape, fmt, dim)
    for target, (elements, scale) in zip(split_groups(out, fmt.group, dim), parts, strict=True):
        _fill(target, fmt.decode(elements, scale))
    return out


def unpack_factors(data: Tensor, shape: Sequence[int], fmt: Format, dim: int) -> tuple[Tensor, Tensor]:
    """What :func:`factorize` gave of the tensor that was packed."""
    elements = torch.empty(shape, device=data.device)
    fmt, parts = _unpacked(data, shape, fmt, dim)
    return elements, _join_factors(elements, fmt, dim, (fmt.factorize(*part) for part in parts))


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


def code_dtype(bits: int) -> torch.dtype:
    """Wide enough for a code shifted by up to 7 bits; where uint8 drops the bits beyond, they are not wanted."""
    if bits <= 8:
        return torch.uint8
    return torch.int32 if bits <= 24 else torch.int64


def to_bytes(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., values) to uint8 (..., bytes); any strides."""
    values = codes.shape[-1]
    codes = codes.to(code_dtype(bits))
    if values % 8:
        codes = torch.nn.functional.pad(codes, (0, -values % 8))
    lanes = codes.unflatten(-1, (-1, 8)).unbind(-1)
    columns: list[Tensor | None] = [None] * bits
    for code, byte, shift in _overlaps(bits):
        piece = (_shift(lanes[code], shift) & 0xFF).to(torch.uint8)
        column = columns[byte]
        columns[byte] = piece if column is None else column.bitwise_or_(piece)
    data = torch.stack([column for column in columns if column is not None], dim=-1).flatten(-2)
    return data[..., : -(-values * bits // 8)]


def from_bytes(data: Tensor, values: int, bits: int) -> Tensor:
    """uint8 (..., bytes) to codes (..., values)."""
    groups = -(-values // 8)
    padding = groups * bits - data.shape[-1]
    if padding:
        data = torch.nn.functional.pad(data, (0, padding))
    dtype = code_dtype(bits)
    columns = [column.to(dtype) for column in data.unflatten(-1, (groups, bits)).unbind(-1)]
    lanes: list[Tensor | None] = [None] * 8
    for code, byte, shift in _overlaps(bits):
        piece = _shift(columns[byte], -shift)
        lane = lanes[code]
        lanes[code] = piece if lane is None else lane.bitwise_or_(piece)
    codes = torch.stack([lane for lane in lanes if lane is not None], dim=-1).flatten(-2)[..., :values]
    return codes & ((1 << bits) - 1)
