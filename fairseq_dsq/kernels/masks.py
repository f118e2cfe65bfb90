"""The definition of dropout by seed and of masks of one bit per value, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_dsq.formats.definition import noise

_BITS = tuple(1 << place for place in range(8))


def nbytes(values: int) -> int:
    """Bytes of a mask."""
    return -(-values // 8)


def dropout(x: Tensor, p: float, scale: float, seed: int) -> Tensor:
    """``x * scale`` where the noise of an element (its place in contiguous ``x``) is at least ``p``, else 0."""
    keep = noise(torch.arange(x.numel(), device=x.device), seed).view(x.shape) >= p
    return torch.where(keep, x.float() * scale, 0.0).to(x.dtype)


def pack_positive(x: Tensor) -> Tensor:
    """One bit per value, the first the lowest of its byte: 0 where ``x <= 0``, so 1 for NaN."""
    ones = (~(x <= 0)).flatten().to(torch.uint8)
    ones = torch.nn.functional.pad(ones, (0, 8 * nbytes(x.numel()) - x.numel()))
    return (ones.view(-1, 8) * ones.new_tensor(_BITS)).sum(1, dtype=torch.uint8)


def mask(x: Tensor, data: Tensor) -> Tensor:
    """``x``, or 0 where its bit is 0."""
    ones = (data[:, None] & data.new_tensor(_BITS)).flatten()[: x.numel()].view(x.shape)
    return torch.where(ones != 0, x, 0)
