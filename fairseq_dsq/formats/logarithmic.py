"""Logarithmic codes without sign and zero, for an optimizer's second moments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fairseq_dsq.formats.base import RowKernel, register
from fairseq_dsq.formats.float_scaled import FloatScaled

# From a group's largest value down to its smallest code, in powers of two.
OCTAVES = 32


@lru_cache(maxsize=64)
def _rising(bits: int, device: torch.device) -> Tensor:
    """The elements 2^(-k * OCTAVES / (2^bits - 1)), as float32, smallest first: of k = 2^bits - 1 down to 0."""
    last = (1 << bits) - 1
    elements = [2.0 ** (-code * OCTAVES / last) for code in range(last, -1, -1)]
    return torch.tensor(elements, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Logarithmic(FloatScaled):
    """Unsigned and zero-free: ``log8/row``, ``log8/128``; value = largest value * 2^(-code * 32 / (2^bits - 1)).

    For values >= 0, such as means of squares. The scale is the largest value, a float32. A value rounds to the nearer
    of its two neighbours, of two equally near to the larger; or stochastically, by its distance to them, so that the
    expected value is the value itself. Values below 2^-32 of the largest, zero among them, saturate to that: too large,
    never too small. A group of zeros stays zero. A group that holds Inf, NaN or a negative value has the scale NaN.
    """

    family = "log"
    signed = False

    @property
    def row_kernel(self) -> RowKernel | None:
        return "log8" if (self.bits, self.group_size) == (8, "row") else None

    def scale_of(self, groups: Tensor) -> Tensor:
        largest = groups.abs().amax(dim=-1, keepdim=True)
        sound = largest.isfinite() & (groups.amin(dim=-1, keepdim=True) >= 0)
        return torch.where(sound, largest, math.nan)

    def encode(self, groups: Tensor, scale: Tensor, noise: Tensor | None) -> Tensor:
        elements = _rising(self.bits, groups.device)
        values = torch.where(scale > 0, groups / scale, 1.0)
        below = torch.bucketize(values, elements, right=True).sub_(1).clamp_(0, len(elements) - 2)
        lower, upper = elements[below], elements[below + 1]
        share = values.sub_(lower).div_(upper - lower)
        return torch.where(share >= 0.5 if noise is None else noise < share, upper, lower)

    def to_codes(self, elements: Tensor) -> Tensor:
        last = (1 << self.bits) - 1
        return elements.log2().mul_(-last / OCTAVES).round_().clamp_(0, last).to(torch.int32)

    def from_codes(self, codes: Tensor) -> Tensor:
        return _rising(self.bits, codes.device).flip(0)[codes.to(torch.int32)]


register("log", None, Logarithmic.parsed, "log8/row, log8/128")
