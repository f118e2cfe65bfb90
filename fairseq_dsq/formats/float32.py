"""IEEE float32, the identity: nothing is rounded, and a stash is the tensor itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_dsq.formats.base import Format, Group, register


@dataclass(frozen=True)
class Float32(Format):
    """``float32``: values as they are. Nobody encodes them, and nothing is shared.

    Raises:
        ValueError: another width.
    """

    bits: int = 32

    family = "float32"
    scale_bytes = 0

    def __post_init__(self) -> None:
        if self.bits != 32:
            raise ValueError(f"bits: got {self.bits!r}, expected 32 for float32")

    @property
    def group(self) -> Group:
        return 1

    def nbytes(self, shape: Sequence[int], dim: int = -1) -> int:
        """Bytes of a float32 tensor of ``shape``; ``dim`` does not matter."""
        return 4 * math.prod(shape)

    def scale_of(self, groups: Tensor) -> Tensor:
        return groups.new_ones(*groups.shape[:-1], 1)

    def encode(self, groups: Tensor, scale: Tensor, noise: Tensor | None) -> Tensor:
        return groups

    def decode(self, elements: Tensor, scale: Tensor) -> Tensor:
        return elements

    def factorize(self, elements: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return elements, scale

    def to_codes(self, elements: Tensor) -> Tensor:
        return elements.view(torch.int32)

    def from_codes(self, codes: Tensor) -> Tensor:
        return codes.view(torch.float32)

    def __str__(self) -> str:
        return "float32"


def _parse(text: str) -> Float32 | None:
    return Float32() if text == "float32" else None


register("float32", lambda q, options: Float32(q), _parse, "float32")
