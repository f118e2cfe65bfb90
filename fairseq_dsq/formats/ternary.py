"""Ternary numbers under their mean magnitude, as BitNet b1.58 has weights."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_dsq.formats.base import FormatOptions, Group, check_bits, register
from fairseq_dsq.formats.float_scaled import group_of
from fairseq_dsq.formats.integer import Integer


@dataclass(frozen=True)
class Ternary(Integer):
    """-1, 0 and 1 times the mean magnitude: ``ternary``, one scale for the tensor, and ``ternary/row``.

    scale = mean |x|, a float32; code = x / scale, rounded to nearest even, or stochastically; what lies beyond 1 clips.
    A code takes two bits. A group that holds Inf or NaN has the scale NaN.

    Source: "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits", arXiv 2402.17764, section 2.

    Attributes:
        bits: 2.
        group_size: as for :class:`Integer`.

    Raises:
        TypeError, ValueError: another width, or a group that is not defined.
    """

    bits: int = 2
    group_size: Group = "tensor"

    family = "ternary"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.bits != 2:
            raise ValueError(f"bits: got {self.bits}, expected 2 for ternary")
        super().__post_init__()

    def scale_of(self, groups: Tensor) -> Tensor:
        # In float64 a sum of float32 neither overflows nor depends on its order.
        mean = groups.abs().mean(dim=-1, keepdim=True, dtype=torch.float64).float()
        return torch.where(mean.isfinite(), mean, math.nan)

    def __str__(self) -> str:
        return "ternary" if self.group_size == "tensor" else f"ternary/{self.group_size}"


def _make(q: int, options: FormatOptions) -> Ternary:
    return Ternary(options.bits(q), options.group("tensor"))


def _parse(text: str) -> Ternary | None:
    match = re.fullmatch(r"ternary(?:/([0-9]+|row|tensor))?", text)
    if match is None:
        return None
    return Ternary(group_size=group_of(match[1] or "tensor"))


register("ternary", _make, _parse, "ternary, ternary/row")
