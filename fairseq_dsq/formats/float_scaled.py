"""Elements under a float32 scale: what integers, ternary numbers and logarithmic codes have in common."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fairseq_dsq.formats.base import Format, Group, check_bits, check_box_size

MOST_BITS = 16


def scale_for(largest: Tensor, greatest: float) -> Tensor:
    """The float32 scale under which an element ``greatest`` stands for ``largest``, finite values.

    Where rounding has made it so large that their product is no float32, the next smaller one.
    """
    scale = largest / greatest
    return torch.where((scale * greatest).isinf(), scale.nextafter(torch.zeros_like(scale)), scale)


@dataclass(frozen=True)
class FloatScaled(Format):
    """A format whose scale is a float32, of a row, a tensor or a number of values: ``int8/row``, ``log8/128``.

    Attributes:
        bits: bits of a code; 2 to 16.
        group_size: values that share a scale: ``row`` (one for each token or channel along the reduction), ``tensor``,
            or a number of them.

    Raises:
        TypeError, ValueError: a width or group that is not defined.
    """

    group_size: Group = "row"

    scale_bytes = 4
    scale_dtype = torch.float32

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.bits > MOST_BITS:
            raise ValueError(f"bits: got {self.bits}, expected 2 to {MOST_BITS} for {self.family}")
        if self.group_size not in ("row", "tensor"):
            check_box_size(self.group_size)

    @property
    def group(self) -> Group:
        return self.group_size

    @property
    def outer_scale(self) -> bool:
        return isinstance(self.group_size, str)

    def by_row(self) -> Self:
        return replace(self, group_size="row")

    def decode(self, elements: Tensor, scale: Tensor) -> Tensor:
        return elements.mul_(scale)

    def factorize(self, elements: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return elements, scale

    @classmethod
    def parsed(cls, text: str) -> Self | None:
        """The inverse of ``str``; None for a text of another family."""
        match = re.fullmatch(rf"{cls.family}([0-9]+)/([0-9]+|row|tensor)", text)
        return cls(int(match[1]), group_of(match[2])) if match else None

    def __str__(self) -> str:
        return f"{self.family}{self.bits}/{self.group_size}"


def group_of(text: str) -> Group:
    """A group from its part of a format's text: ``row``, ``tensor`` or a number."""
    return int(text) if text.isdigit() else text  # type: ignore[return-value]
