"""Quantize: float to float, and float to bytes and back, in any format.

:class:`QuantizedTensor` is what a stash or an optimizer's state is held in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fairseq_dsq.formats import Float32, Format
from fairseq_dsq.kernels import checks, ops
from fairseq_dsq.kernels.ops import BFLOAT16_SIGNIFICAND_BITS
from fairseq_dsq.text import check_choice, quoted

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic")
# What a call's seed comes from: a generator, None for torch's default, or it is given.
Draw = torch.Generator | int | None


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor as the bytes of its codes and scales.

    Attributes:
        data: uint8, laid out as :mod:`fairseq_dsq.formats.definition` says; for :class:`Float32` the tensor itself,
            not a copy.
        shape: shape of the tensor that was quantized.
        dtype: its dtype.
        fmt: its format.
        dim: the dimension along which the groups lie.
    """

    data: Tensor
    shape: torch.Size
    dtype: torch.dtype
    fmt: Format
    dim: int

    @property
    def spec(self) -> tuple[torch.Size, torch.dtype, Format, int]:
        """All but the bytes: ``QuantizedTensor(data, *spec)`` puts a tensor together again."""
        return self.shape, self.dtype, self.fmt, self.dim

    @property
    def nbytes(self) -> int:
        """Bytes held; equals ``fmt.nbytes(shape, dim)`` (for a half-precision tensor in Float32: its own size)."""
        return self.data.numel() * self.data.element_size()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, equal bit for bit to ``fake_quantize`` of what was packed.

        ``dtype`` as for :func:`fake_quantize`.
        """
        dtype = _result_dtype(self.dtype, self.fmt, dtype)
        if isinstance(self.fmt, Float32):
            return self.data.to(dtype)
        return ops.unpack(self.data, self.shape, self.dim, self.fmt.text, dtype)

    def terms(self) -> Tensor:
        """The tensor as bfloat16 terms, see :func:`round_terms`."""
        return ops.unpack_terms(self.data, self.shape, self.dim, self.fmt.text)

    def factorize(self) -> tuple[Tensor, Tensor]:
        """The tensor as elements times a scale, see :func:`factorize`."""
        return ops.unpack_factors(self.data, self.shape, self.dim, self.fmt.text)

    def requantize(self, dim: int) -> QuantizedTensor:
        """The same values with groups along another dimension, rounded to nearest once more."""
        return pack(self.dequantize(), self.fmt, dim)

    def copy_(self, values: Tensor, rounding: Rounding = "nearest", generator: Draw = None) -> QuantizedTensor:
        """Quantize ``values`` into the bytes that are held.

        Raises:
            ValueError: values of another shape.
        """
        if values.shape != self.shape:
            raise ValueError(f"values: got {tuple(values.shape)}, expected {tuple(self.shape)}")
        self.data.copy_(pack(values, self.fmt, self.dim, rounding, generator).data)
        return self

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same on another device."""
        return replace(self, data=self.data.to(device))


def _check(x: Tensor, fmt: Format, dim: int, rounding: str) -> None:
    checks.tensor(x)
    if not isinstance(fmt, Format):
        raise TypeError(f"fmt: got {quoted(fmt)}, expected a format such as formats.parse('bfp4')")
    checks.along(x.shape, dim)
    check_choice("rounding", rounding, ROUNDINGS)


def _result_dtype(own: torch.dtype, fmt: Format, wanted: torch.dtype | None) -> torch.dtype:
    """The result's dtype: one that holds its values exactly."""
    if wanted is None or wanted in (own, torch.float32):
        return wanted or own
    if wanted is torch.bfloat16 and fmt.significand_bits <= BFLOAT16_SIGNIFICAND_BITS and not fmt.outer_scale:
        return wanted
    raise ValueError(
        f"dtype: got {wanted} for {own} in {fmt}, expected {own}, torch.float32,"
        f" or torch.bfloat16 in a format of at most {BFLOAT16_SIGNIFICAND_BITS} significant bits"
    )


def _without_grad(x: Tensor) -> Tensor:
    """Rounding has no gradient. Cheaper than a no_grad block around the call."""
    return x.detach() if x.requires_grad else x


def _seed(rounding: Rounding, generator: Draw) -> int | None:
    """The one draw of a call; None where nothing is drawn."""
    if rounding == "nearest":
        return None
    if isinstance(generator, int):
        return generator
    return int(torch.randint(checks.SEEDS, (), generator=generator, device=generator.device if generator else None))


def _mix(h: int) -> int:
    """A permutation of the integers below 2^64 that changes half the bits when one bit changes (splitmix64's)."""
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    h = (h ^ (h >> 27)) * 0x94D049BB133111EB & (1 << 64) - 1
    return h ^ (h >> 31)


def noise_seed(*place: int) -> int:
    """The seed of one rounding, 0 to 2^62 - 1, which follows from nothing but its place.

    Args:
        place: integers below 2^64 that name the rounding: the training's seed, the update, the parameter's index, and
            which of the parameter's roundings, say.
    """
    found = 0
    for part in place:
        found = _mix((found + part + 0x9E3779B97F4A7C15) & (1 << 64) - 1)
    return found >> 2


def fake_quantize(
    x: Tensor,
    fmt: Format,
    dim: int = -1,
    rounding: Rounding = "nearest",
    generator: Draw = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Round ``x`` to the values that ``fmt`` can hold.

    Args:
        x: any shape and strides; float32, bfloat16 or float16.
        fmt: the number format.
        dim: the dimension along which the groups lie: the reduction dimension of the GEMM that reads the result.
        rounding: ``nearest`` (ties to even) or ``stochastic``: up or down, the expected value being the value itself,
            to 2^-24 of a code. That holds for values that do not clip: none does in a format whose ``scale`` is
            ``fit``, nor from 25 bits on; under ``floor`` those above the largest code's value do, which takes 9 % of a
            Gaussian's mean magnitude at 2 bits.
        generator: draws one seed a call for stochastic rounding; None takes torch's default; an integer, 0 to
            2^62 - 1, is the seed, such as :func:`noise_seed` gives: integers side by side have one stream of noise,
            shifted by an element.
        dtype: of the result; None takes ``x``'s. float32, or bfloat16 for formats of up to 8 significant bits, whose
            values it holds exactly, but for those below its smallest, 2^-133, that minifloats have in tiny blocks.

    Returns:
        A tensor of ``x``'s shape, without gradient; ``x`` itself for :class:`Float32`. A group that holds Inf or NaN
        comes back as NaN throughout; in a format without groups, such as ``bf16``, each stays what it is. Exact in each
        dtype where the scale is a power of two: rounding to a coarser grid never needs more significant bits than the
        input had; but what is rounded up past float16's largest number is Inf there. The result of a transposed matrix
        may be transposed in memory too.

    Raises:
        TypeError, IndexError, ValueError: a dtype, dim or rounding that is not supported.
    """
    _check(x, fmt, dim, rounding)
    dtype = _result_dtype(x.dtype, fmt, dtype)
    if isinstance(fmt, Float32):
        return x.to(dtype)
    seed = _seed(rounding, generator)
    x = _without_grad(x)
    # Stochastic rounding numbers the elements row by row; otherwise a transposed matrix is read as it lies.
    if seed is None and not x.is_contiguous() and x.dim() >= 2 and x.mT.is_contiguous():
        swapped = {-1: -2, -2: -1}
        from_last = dim if dim < 0 else dim - x.dim()
        return ops.fake_quantize(x.mT, swapped.get(from_last, dim), fmt.text, seed, dtype).mT
    return ops.fake_quantize(x, dim, fmt.text, seed, dtype)


def round_terms(
    x: Tensor, fmt: Format, dim: int = -1, rounding: Rounding = "nearest", generator: Draw = None
) -> Tensor:
    """``fake_quantize(x, fmt, dim, ...)`` as the exact sum of bfloat16 terms, stacked in front.

    Eight significant bits of ``fmt`` take one each, the largest first. Bits below the smallest bfloat16, 2^-133, are
    lost.
    """
    _check(x, fmt, dim, rounding)
    return ops.round_terms(_without_grad(x), dim, fmt.text, _seed(rounding, generator))


def factorize(
    x: Tensor, fmt: Format, dim: int = -1, rounding: Rounding = "nearest", generator: Draw = None
) -> tuple[Tensor, Tensor]:
    """``fake_quantize(x, fmt, dim, ...)`` as elements times a scale, of formats with one for each row or the tensor.

    Args:
        x: as for :func:`fake_quantize`, with at least one element.
        fmt, dim, rounding, generator: likewise; the same generator state gives the same values.

    Returns:
        float32 elements of ``x``'s shape, with at most ``fmt.significand_bits`` significant bits, and float32 scales of
        the same shape but for a 1 along ``dim``. Their product is the value. Elements of a group with Inf or NaN are
        NaN.

    Raises:
        TypeError, IndexError, ValueError: as for :func:`fake_quantize`, or a format with groups inside of a row.
    """
    _check(x, fmt, dim, rounding)
    if not isinstance(fmt.group, str) and not fmt.outer_scale:
        raise ValueError(f"fmt: got {fmt}, expected one scale for each row or for the tensor")
    return ops.factorize(_without_grad(x), dim, fmt.text, _seed(rounding, generator))


def pack(
    x: Tensor,
    fmt: Format,
    dim: int = -1,
    rounding: Rounding = "nearest",
    generator: Draw = None,
) -> QuantizedTensor:
    """Quantize ``x`` and hold it in ``fmt.nbytes(x.shape, dim)`` bytes.

    ``pack(x, fmt, dim).dequantize()`` equals ``fake_quantize(x, fmt, dim)`` bit for bit, also under stochastic rounding
    with generators of equal state. Arguments and errors as for :func:`fake_quantize`.
    """
    _check(x, fmt, dim, rounding)
    if isinstance(fmt, Float32):
        return QuantizedTensor(x, x.shape, x.dtype, fmt, dim)
    data = ops.pack(_without_grad(x), dim, fmt.text, _seed(rounding, generator))
    return QuantizedTensor(data, x.shape, x.dtype, fmt, dim)


def quantize_and_pack(
    x: Tensor, operand_fmt: Format, stash_fmt: Format, operand_dim: int = -1, stash_dim: int = -2
) -> tuple[Tensor, QuantizedTensor]:
    """A GEMM's operand and its stash from one tensor, rounded to nearest.

    The same as ``fake_quantize(x, operand_fmt, operand_dim)`` and ``pack(x, stash_fmt, stash_dim)``. With groups in
    both formats, the operand's along the last dimension and the stash's along the one before, ``x`` is read once.

    Args:
        x: (..., M, K), as for :func:`fake_quantize`.
        operand_fmt, operand_dim: of the operand.
        stash_fmt, stash_dim: of the stash.

    Returns:
        The operand and the stash.
    """
    _check(x, operand_fmt, operand_dim, "nearest")
    _check(x, stash_fmt, stash_dim, "nearest")
    axes = x.dim()
    fused = axes >= 2 and (operand_dim - axes if operand_dim >= 0 else operand_dim) == -1
    fused = fused and (stash_dim - axes if stash_dim >= 0 else stash_dim) == -2
    # Where a whole tensor shares a scale there is nothing to go group by group.
    if not fused or any(isinstance(fmt, Float32) or fmt.group == "tensor" for fmt in (operand_fmt, stash_fmt)):
        return fake_quantize(x, operand_fmt, operand_dim), pack(x, stash_fmt, stash_dim)
    operand, data = ops.quantize_and_pack(_without_grad(x), operand_fmt.text, stash_fmt.text, x.dtype)
    return operand, QuantizedTensor(data, x.shape, x.dtype, stash_fmt, stash_dim)
