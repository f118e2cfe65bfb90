"""Block floating point (Microsoft floating point): boxes of values share one exponent."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from fairseq_dsq.formats.base import (
    BOXES,
    DEFAULT_BOX_SIZE,
    FormatOptions,
    Group,
    ScaleRule,
    box_of,
    check_box_size,
    register,
)
from fairseq_dsq.formats.scaled_integer import ScaledInteger


@dataclass(frozen=True)
class BlockFloat(ScaledInteger):
    """Block floating point: ``bfp4``, ``bfp4/32``, ``bfp4/row``, ``bfp4/16x16``, ``bfp4-fit``.

    With E = floor(log2 of the box's largest magnitude), clamped to float32's normal range: scale =
    2^(E - (bits - 2)) and codes are sign-magnitude integers of up to 2^(bits-1) - 1. Two bits are ternary.
    Values above the largest code's clip to it: at 2 bits those from 2^E to 2^(E+1), at 8 the last 1.6 % of these. With
    the scale ``fit``, E is one more where the largest magnitude would clip.
    Source: Rouhani et al., "Pushing the Limits of Narrow Precision Inferencing at Cloud Scale with Microsoft
    Floating Point", NeurIPS 2020.

    Attributes:
        bits: bits of an element, sign included; 2 to 32.
        box_size: values that share an exponent; ``row``: all along the reduction; or a square of them.
        scale: ``floor``, or ``fit``, under which nothing clips but what is within a step of float32's largest number.

    Raises:
        TypeError, ValueError: a width, box size or scale that is not defined.
    """

    box_size: Group = DEFAULT_BOX_SIZE
    scale: ScaleRule = "floor"

    family = "bfp"
    signed_zero = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.box_size != "row":
            check_box_size(self.box_size)

    @property
    def group(self) -> Group:
        return self.box_size

    def by_row(self) -> BlockFloat:
        return replace(self, box_size="row")

    def __str__(self) -> str:
        boxes = "" if self.box_size == DEFAULT_BOX_SIZE else f"/{self.box_size}"
        return f"bfp{self.bits}{boxes}{'-fit' if self.scale == 'fit' else ''}"


def _make(q: int, options: FormatOptions) -> BlockFloat:
    return BlockFloat(options.bits(q), options.group(DEFAULT_BOX_SIZE), options.scale)


def _parse(text: str) -> BlockFloat | None:
    match = re.fullmatch(rf"bfp([0-9]+){BOXES}(?P<fit>-fit)?", text)
    if match is None:
        return None
    return BlockFloat(int(match[1]), box_of(match, DEFAULT_BOX_SIZE), "fit" if match["fit"] else "floor")


register("bfp", _make, _parse, "bfp4, bfp8, bfp16, bfp4/32, bfp4-fit, bfp4/row, bfp4/16x16")
