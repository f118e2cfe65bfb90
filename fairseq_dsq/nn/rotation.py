"""Random Hadamard rotation of a GEMM's operands along its reduction, before they are quantized.

With H a Hadamard matrix and S a diagonal of random signs, Q = H S / sqrt(size) is orthogonal::

    a @ b = (a Q^T) @ (Q b)                       MxK @ KxN => MxN

The product of the rotated operands is the same but for rounding, and an outlier of one position is spread over its
block: a block's shared scale no longer follows from it alone.

Source: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv 2509.25149, which rotates the operands of
grad_weight in blocks of 16, by one vector of signs that stays the same for the whole training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from fairseq_dsq.precision import GemmKind

# Both GEMMs that read a gradient, or the one that sums over tokens.
RotatedGemms = Literal["grad_weight", "backward"]
RotationBlock = Literal[16, 32]
OFF = "off"
ROTATIONS = (OFF, *(f"{gemms}/{block}" for gemms in get_args(RotatedGemms) for block in get_args(RotationBlock)))


@dataclass(frozen=True)
class Rotation:
    """What is rotated, and by which matrix.

    Attributes:
        gemms: ``grad_weight``, along tokens; or ``backward``, also grad_input, along output features.
        block: positions that are mixed with one another, 16 or 32. What is left at the end is mixed in blocks of the
            powers of two that it is made of: 13 are 8, 4 and 1.
        seed: of the signs, which are the same for every block, tensor and update.

    Raises:
        ValueError: other GEMMs, or a block of another size.
    """

    gemms: RotatedGemms
    block: int
    seed: int

    def __post_init__(self) -> None:
        if f"{self.gemms}/{self.block}" not in ROTATIONS:
            raise ValueError(f"got {self.gemms}/{self.block}, expected one of {', '.join(ROTATIONS)}")

    @classmethod
    def of(cls, text: str, seed: int) -> Rotation | None:
        """Of a text of :data:`ROTATIONS`; None for ``off``.

        Raises:
            ValueError: another text.
        """
        if text not in ROTATIONS:
            raise ValueError(f"got {text!r}, expected one of {', '.join(ROTATIONS)}")
        if text == OFF:
            return None
        gemms, _, block = text.partition("/")
        return cls(gemms, int(block), seed)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"the rotation {self.gemms}/{self.block}"

    def covers(self, kind: GemmKind) -> bool:
        """Whether the operands of a GEMM are rotated."""
        return kind == "grad_weight" or (kind == "grad_input" and self.gemms == "backward")


@lru_cache
def _signs(rotation: Rotation, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(rotation.seed)
    return torch.randint(2, (rotation.block,), generator=generator).mul_(2).sub_(1).float().to(device)


def rotate(x: Tensor, dim: int, rotation: Rotation) -> Tensor:
    """``x`` rotated along ``dim``, a new tensor of its dtype; computed in float32.

    A block's values may grow by the root of its size: in float16 those past 65504 are Inf.

    Adds and subtracts, as the fast Walsh-Hadamard transform does: no setting of torch cuts a product's operands.
    """
    if x.numel() == 0:
        return x
    dim = dim % x.dim()
    rows = x.float().movedim(dim, 0)  # positions first: each sum reads and writes whole rows of memory
    length, block = len(rows), rotation.block
    signs = _signs(rotation, x.device).repeat(-(-length // block))[:length]
    out = rows.reshape(length, -1) * signs[:, None]
    start = 0
    while start < length:
        taken = (length - start) // block * block
        if taken:
            _transform(out[start : start + taken].unflatten(0, (-1, block)))
            start += taken
        block //= 2
    return out.view(rows.shape).movedim(0, dim).to(x.dtype).contiguous()


def _transform(blocks: Tensor) -> None:
    """Multiply (blocks, positions, values) by a Hadamard matrix over the root of its size, in place."""
    size, half = blocks.shape[1], 1
    while half < size:
        first, second = blocks.unflatten(1, (-1, 2, half)).unbind(2)
        total = first + second
        torch.sub(first, second, out=second)
        first.copy_(total)
        half *= 2
    blocks.mul_(size**-0.5)
