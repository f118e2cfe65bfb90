"""NVFP4: blocks of 4-bit floats under an 8-bit float, and a float32 for the tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fairseq_dsq.formats.base import (
    BOXES,
    E4M3_SCALE,
    Format,
    FormatOptions,
    Group,
    KernelSpec,
    box_of,
    check_bits,
    check_box_size,
    register,
)
from fairseq_dsq.formats.float_scaled import scale_for
from fairseq_dsq.formats.minifloat import E2M1, E4M3, MinifloatElements

BLOCK_SIZE = 16
# The smallest scale of a tensor: its reciprocal over the smallest scale of a block is a normal float32.
LEAST_TENSOR_SCALE = 2.0**-110
_NAN_CODE = 0x7F


@dataclass(frozen=True)
class NVFP4(MinifloatElements, Format):
    """E2M1 under two scales: ``nvfp4``, ``nvfp4/32``, ``nvfp4/16x16``.

    value = element * block scale * tensor scale, with

        tensor scale = the tensor's largest finite magnitude / (448 * 6), a float32, at least 2^-110
        block scale  = the block's largest magnitude / 6 / tensor scale, rounded to E4M3, at least its smallest, 2^-9
        element      = x * ((1 / tensor scale) / block scale), rounded to E2M1; saturates at 6

    Elements round to nearest even, or stochastically between neighbours; scales to nearest. A block that holds Inf or
    NaN has the scale NaN and is NaN throughout; NVIDIA's description leaves that open. Values are rounded twice where
    the tensor scale is multiplied, so that rounding is not exactly idempotent. Which tensor scale follows from all of
    the tensor: a sentence's values depend on its batch.

    The scale of the tensor factors out of a product; an element times the scale of its block has 6 significant bits.

    Source: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv 2509.25149, section 2 and appendix B.

    Attributes:
        bits: 4.
        box_size: values that share an E4M3 scale; or a square of them, as the paper's weights have.
        tensor_scale: a float32 of no dimension, of the format of one tensor, see :meth:`Format.of_tensor`.

    Raises:
        TypeError, ValueError: another width, or a block size that is not defined.
    """

    bits: int = 4
    box_size: Group = BLOCK_SIZE
    tensor_scale: Tensor | None = field(default=None, compare=False, repr=False)

    family = "nvfp4"
    element = E2M1
    tensor_bytes = 4

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.bits != E2M1.bits:
            raise ValueError(f"bits: got {self.bits}, expected {E2M1.bits} for nvfp4")
        check_box_size(self.box_size)

    @property
    def group(self) -> Group:
        return self.box_size

    @property
    def significand_bits(self) -> int:
        """Of an element times the scale of its block."""
        return E2M1.significand_bits + E4M3.significand_bits

    @property
    def outer_scale(self) -> bool:
        return True

    def kernel_spec(self) -> KernelSpec | None:
        return E2M1.kernel_spec(self.group, scale=E4M3_SCALE)

    def of_tensor(self, x: Tensor) -> NVFP4:
        if x.numel() == 0:
            return self
        magnitudes = x.float().abs()
        largest = torch.where(magnitudes.isfinite(), magnitudes, 0.0).amax()
        scale = scale_for(largest, E4M3.largest * E2M1.largest)
        return replace(self, tensor_scale=scale.clamp_(min=LEAST_TENSOR_SCALE))

    def tensor_to_bytes(self) -> Tensor:
        return self._tensor_scale.reshape(1).view(torch.uint8)

    def tensor_from_bytes(self, data: Tensor) -> NVFP4:
        return replace(self, tensor_scale=data.clone().view(torch.float32).view(()))

    @property
    def _tensor_scale(self) -> Tensor:
        if self.tensor_scale is None:
            raise ValueError(f"{self}: has no tensor's scale, expected the format that of_tensor gives")
        return self.tensor_scale

    def scale_of(self, groups: Tensor) -> Tensor:
        """E4M3 codes."""
        largest = groups.abs().amax(dim=-1, keepdim=True)
        scale = (largest / E2M1.largest / self._tensor_scale).clamp_(E4M3.smallest, E4M3.largest)
        codes = E4M3.to_codes(E4M3.round(scale, None))
        return torch.where(largest.isfinite(), codes, _NAN_CODE).to(torch.uint8)

    def encode(self, groups: Tensor, scale: Tensor, noise: Tensor | None) -> Tensor:
        values = groups * (self._tensor_scale.reciprocal() / E4M3.from_codes(scale))
        return E2M1.round(values, noise).clamp_(-E2M1.largest, E2M1.largest)

    def decode(self, elements: Tensor, scale: Tensor) -> Tensor:
        return elements.mul_(E4M3.from_codes(scale)).mul_(self._tensor_scale)

    def factorize(self, elements: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Elements times the scales of their blocks, and the scale of the tensor."""
        return elements.mul_(E4M3.from_codes(scale)), self._tensor_scale

    def __str__(self) -> str:
        return "nvfp4" if self.box_size == BLOCK_SIZE else f"nvfp4/{self.box_size}"


def _make(q: int, options: FormatOptions) -> NVFP4:
    return NVFP4(options.bits(q), options.group(BLOCK_SIZE))


def _parse(text: str) -> NVFP4 | None:
    match = re.fullmatch(rf"nvfp4{BOXES}", text)
    return NVFP4(box_size=box_of(match, BLOCK_SIZE)) if match and match["box"] != "row" else None


register("nvfp4", _make, _parse, "nvfp4")
