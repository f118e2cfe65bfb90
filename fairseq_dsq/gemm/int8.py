"""8-bit integers with sums in 32-bit integers, for operands of one scale each on CPUs with VNNI."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fairseq_dsq.formats import FixedPoint
from fairseq_dsq.formats.power_of_two import MIN_EXPONENT
from fairseq_dsq.gemm.base import Engine, Operand, Side, finish

BITS = 8
# Below this many rows, columns or summands, converting to integers and back takes what they save.
LEAST = 128
# So many products of 8-bit numbers fit a 32-bit sum.
MOST_SUMMANDS = 2**31 // 2**14 - 1


class Int8Engine(Engine):
    """Fixed point with one scale for the tensor, and integers whose scale factors out."""

    name = "int8"

    def unavailable(self) -> str | None:
        return None if torch.cpu._is_vnni_supported() else "this CPU has no VNNI"

    def accepts(self, a: Side, b: Side, device: torch.device, dtype: torch.dtype) -> bool:
        fits = all(
            side.fmt.bits <= BITS
            and side.fmt.integer_elements
            and (side.factored or (isinstance(side.fmt, FixedPoint) and side.fmt.group == "tensor"))
            for side in (a, b)
        )
        return fits and device.type == "cpu" and dtype is torch.float32 and self.unavailable() is None

    def multiply(self, a: Operand, b: Operand, bias: Tensor | None, add_to: Tensor | None) -> Tensor | None:
        sizes = (*a.rows.shape, *b.rows.shape)
        if len(sizes) != 4 or min(sizes) < LEAST or a.rows.shape[-1] > MOST_SUMMANDS:
            return None
        codes_a, codes_b = _codes(a), _codes(b)
        if codes_a is None or codes_b is None:
            return None
        product = torch._int_mm(codes_a[0], codes_b[0].mT).to(torch.float32).mul_(codes_a[1]).mul_(codes_b[1])
        return finish(product, bias, add_to)


def _codes(operand: Operand) -> tuple[Tensor, float] | None:
    """int8 codes and their scale; None where an operand is not finite, or next to nothing.

    Fixed point's scale is found from the extremes; where the format's own is larger, the codes are multiples.
    """
    x = operand.rows
    low, high = (float(value) for value in torch.aminmax(x))
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    if operand.side.factored:
        return x.to(torch.int8), 1.0
    # Two's complement: codes from -128 to 127, so that an exact power of two takes a bit less if it is negative.
    magnitudes = max(high, 0.0), math.nextafter(max(-low, 0.0), 0.0)
    exponent = max(math.frexp(magnitude)[1] for magnitude in magnitudes) - (BITS - 1)
    if exponent < MIN_EXPONENT and (low, high) != (0.0, 0.0):
        return None
    scale = 2.0 ** max(exponent, MIN_EXPONENT)
    return (x * (1 / scale)).to(torch.int8), scale
