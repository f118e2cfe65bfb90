"""The quantizers, GEMM, dropout and bit masks as torch.library operators, ``torch.ops.fairseq_dsq.*``.

A format comes as its text. On the CPU the native kernels run it, on CUDA devices Triton's, where its ``kernel_spec``
says that they can; else its definition runs, in plain torch. ``Library.define`` and not ``custom_op``, which takes
12 us a call where this takes 3: a training step makes a thousand calls.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_dsq import formats
from fairseq_dsq.formats import Format, definition
from fairseq_dsq.kernels import checks, masks, native

# What bfloat16 holds exactly.
BFLOAT16_SIGNIFICAND_BITS = 8


def _shape_around(shape: Sequence[int], dim: int) -> native.Shape:
    """(before, length, after) of ``dim``."""
    if not shape:
        return 1, 1, 1
    dim = dim % len(shape)
    return math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])


def _kernel_dtype(dtype: torch.dtype, fmt: Format, kernels: Any) -> torch.dtype:
    """What the kernel writes, to be converted to ``dtype``, which rounds once as the definition does.

    Minifloats under the smallest scales reach further down than bfloat16.
    """
    exact = dtype is torch.bfloat16 and fmt.significand_bits <= BFLOAT16_SIGNIFICAND_BITS
    exact = exact and fmt.spec is not None and not fmt.spec.exponent_bits
    return dtype if exact or _is_gpu(kernels) else torch.float32


def _values(x: Tensor, kernels: Any) -> Tensor:
    """A contiguous tensor of a dtype that the kernels read: the CPU's float32 alone."""
    return (x if _is_gpu(kernels) else x.float()).contiguous()


@cache
def _triton_kernels(device: torch.device) -> Any:
    """The CUDA kernels; None where FAIRSEQ_DSQ_ISA says torch, and where they do not work, which is said.

    No GPU was at hand when they were written: a device has to show that they equal the definition on it.
    """
    if os.environ.get(native.VARIABLE) == native.NO_KERNELS:
        return None
    try:
        from fairseq_dsq.kernels import triton_kernels
    except ImportError as error:
        _say_without_kernels(device, error, "pip install triton")
        return None
    try:
        triton_kernels.check(device)
    except Exception as error:  # no C compiler for Triton's launcher, a GPU that it does not support, ...
        if isinstance(error, triton_kernels.DifferentResult):
            remedy = "please report it"
        else:
            remedy = "Triton wants a C compiler and Python.h (apt install gcc python3-dev) and a GPU of 7.5 or later"
        _say_without_kernels(device, error, remedy)
        return None
    return triton_kernels


def _say_without_kernels(device: torch.device, error: Exception, remedy: str) -> None:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    warnings.warn(
        f"{device}: no Triton kernels, quantization runs in plain torch, about ten times slower: {line}: {remedy}",
        stacklevel=3,
    )


@cache
def _say_without_native_kernels() -> None:
    if os.environ.get(native.VARIABLE) != native.NO_KERNELS:
        warnings.warn(
            f"cpu: no kernels, quantization runs in plain torch, about ten times slower: {native.unavailable}",
            stacklevel=3,
        )


def _kernels(device: torch.device) -> Any:
    """The kernels of a device; None for one that has none."""
    if device.type == "cpu":
        if native.kernels is None:
            _say_without_native_kernels()
        return native.kernels
    return _triton_kernels(device) if device.type == "cuda" else None


def _is_gpu(kernels: Any) -> bool:
    """Whether these are a GPU's kernels, which read and write every dtype."""
    return kernels is not None and kernels is not native.kernels


def _kernels_for(x: Tensor, fmt: Format) -> Any:
    """The kernels that run ``fmt`` on a tensor; None where its definition is to."""
    kernels = _kernels(x.device)
    if kernels is None or x.numel() == 0:
        return None
    if fmt.spec is not None and kernels.covers(fmt.spec):
        return kernels
    _say_slow(fmt.text)
    return None


def _row_kernels(device: torch.device, shape: Sequence[int], dim: int, fmt: Format) -> native.Kernels | None:
    """The kernels that pack and unpack ``fmt`` row by row; None where its definition is to, or no row is contiguous."""
    along_rows = len(shape) > 0 and dim in (-1, len(shape) - 1) and math.prod(shape) > 0
    return native.kernels if fmt.row_kernel and along_rows and device.type == "cpu" else None


@cache
def _say_slow(fmt: str) -> None:
    warnings.warn(f"{fmt}: no kernels run this format; it is quantized in plain torch, which is slower", stacklevel=2)


def _fake_quantize(x: Tensor, dim: int, fmt: str, seed: int | None, dtype: torch.dtype) -> Tensor:
    checks.quantize(x, dim, seed, dtype)
    parsed = formats.parse(fmt)
    if _row_kernels(x.device, x.shape, dim, parsed):
        return _unpack(_pack(x, dim, fmt, seed), x.shape, dim, fmt, dtype)
    kernels = _kernels_for(x, parsed)
    if kernels is None:
        return definition.fake_quantize(x, parsed, dim, seed, dtype)
    x = _values(x, kernels)
    out = torch.empty_like(x, dtype=_kernel_dtype(dtype, parsed, kernels))
    kernels.fake_quantize(x, out, _shape_around(x.shape, dim), parsed.spec, seed)
    return out if out.dtype is dtype else out.to(dtype)


def _round_terms(x: Tensor, dim: int, fmt: str, seed: int | None) -> Tensor:
    checks.quantize(x, dim, seed, torch.float32)
    parsed = formats.parse(fmt)
    kernels = _kernels_for(x, parsed)
    if not _is_gpu(kernels):
        return split(_fake_quantize(x, dim, fmt, seed, torch.float32), terms(parsed.significand_bits))
    x = x.contiguous()
    out = _terms_like(x, parsed)
    kernels.fake_quantize(x, out, _shape_around(x.shape, dim), parsed.spec, seed, len(out))
    return out


def _factorize(x: Tensor, dim: int, fmt: str, seed: int | None) -> tuple[Tensor, Tensor]:
    checks.factorize(x, dim, seed)
    parsed = formats.parse(fmt)
    kernels, around = _kernels_for(x, parsed), _shape_around(x.shape, dim)
    if kernels is None or not kernels.factorizes(parsed.spec, around, packed=False):
        return definition.factorize(x, parsed, dim, seed)
    x = _values(x, kernels)
    elements = torch.empty_like(x, dtype=torch.float32)
    factors = _factors_of(elements, parsed, dim)
    kernels.factorize(x, elements, factors, around, parsed.spec, seed)
    return elements, _of_each_row(factors, elements, dim)


def _factors_of(elements: Tensor, fmt: Format, dim: int) -> Tensor:
    """Room for a factor of each row along ``dim``, or one of the tensor."""
    one = fmt.group == "tensor" or fmt.tensor_bytes
    return elements.new_empty(1 if one else _shape_of_rows(elements, dim))


def _of_each_row(factors: Tensor, elements: Tensor, dim: int) -> Tensor:
    shape = _shape_of_rows(elements, dim)
    return factors if list(factors.shape) == shape else factors.expand(shape).clone()


def _shape_of_rows(x: Tensor, dim: int) -> list[int]:
    return [1 if axis == dim % x.dim() else size for axis, size in enumerate(x.shape)]


def _pack(x: Tensor, dim: int, fmt: str, seed: int | None) -> Tensor:
    checks.quantize(x, dim, seed, torch.float32)
    parsed = formats.parse(fmt)
    if row_kernels := _row_kernels(x.device, x.shape, dim, parsed):
        data = torch.empty(parsed.nbytes(x.shape, dim), dtype=torch.uint8)
        row_kernels.pack_rows(x.float().contiguous(), data, parsed, seed)
        return data
    kernels = _kernels_for(x, parsed)
    if kernels is None:
        return definition.pack(x, parsed, dim, seed)
    x = _values(x, kernels)
    data = x.new_empty(parsed.nbytes(x.shape, dim), dtype=torch.uint8)
    kernels.pack(x, data, _shape_around(x.shape, dim), parsed.spec, seed)
    return data


def _unpack(data: Tensor, shape: Sequence[int], dim: int, fmt: str, dtype: torch.dtype) -> Tensor:
    parsed = formats.parse(fmt)
    checks.packed(data, shape, dim, parsed, dtype)
    if row_kernels := _row_kernels(data.device, shape, dim, parsed):
        values = torch.empty(shape)
        row_kernels.unpack_rows(data.contiguous(), values, parsed)
        return values.to(dtype)
    kernels = _kernels_for(data, parsed)
    if kernels is None:
        return definition.unpack(data, shape, parsed, dim, dtype)
    out = data.new_empty(shape, dtype=_kernel_dtype(dtype, parsed, kernels))
    kernels.unpack(data.contiguous(), out, _shape_around(shape, dim), parsed.spec)
    return out if out.dtype is dtype else out.to(dtype)


def _unpack_terms(data: Tensor, shape: Sequence[int], dim: int, fmt: str) -> Tensor:
    parsed = formats.parse(fmt)
    checks.packed(data, shape, dim, parsed, torch.float32)
    kernels = _kernels_for(data, parsed)
    if not _is_gpu(kernels):
        return split(_unpack(data, shape, dim, fmt, torch.float32), terms(parsed.significand_bits))
    out = data.new_empty((terms(parsed.significand_bits), *shape), dtype=torch.bfloat16)
    kernels.unpack(data.contiguous(), out, _shape_around(shape, dim), parsed.spec, len(out))
    return out


def _unpack_factors(data: Tensor, shape: Sequence[int], dim: int, fmt: str) -> tuple[Tensor, Tensor]:
    parsed = formats.parse(fmt)
    checks.packed(data, shape, dim, parsed, torch.float32)
    kernels, around = _kernels_for(data, parsed), _shape_around(shape, dim)
    if kernels is None or not kernels.factorizes(parsed.spec, around, packed=True):
        return definition.unpack_factors(data, shape, parsed, dim)
    elements = data.new_empty(shape, dtype=torch.float32)
    factors = _factors_of(elements, parsed, dim)
    kernels.unpack_factors(data.contiguous(), elements, factors, around, parsed.spec)
    return elements, _of_each_row(factors, elements, dim)


def _quantize_and_pack(x: Tensor, operand: str, stash: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    fmt, stash_fmt = formats.parse(operand), formats.parse(stash)
    checks.quantize_and_pack(x, fmt, stash_fmt, dtype)
    if reads_once(x, [fmt, stash_fmt]):
        out, _, data = _quantize_both([x], operand, "", stash, dtype, False)
        return out, data
    kernels = _kernels_for(x, fmt)
    if kernels is None or _kernels_for(x, stash_fmt) is None or not kernels.packs_with(fmt.spec, stash_fmt.spec):
        return _fake_quantize(x, -1, operand, None, dtype), _pack(x, -2, stash, None)
    x = x.float().contiguous()
    out = torch.empty_like(x, dtype=_kernel_dtype(dtype, fmt, kernels))
    data = x.new_empty(stash_fmt.nbytes(x.shape, -2), dtype=torch.uint8)
    kernels.quantize_and_pack(x, out, data, _shape_around(x.shape, -2), fmt.spec, stash_fmt.spec)
    return out if out.dtype is dtype else out.to(dtype), data


def _quantize_both(
    xs: list[Tensor], along: str, across: str, stash: str, dtype: torch.dtype, in_terms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if len(xs) != 1:
        checks.stacked(xs, (along, across, stash))
    x = xs[0]
    kernels = _kernels(x.device)
    once = _once(kernels, _stacked(xs), x.dtype, (along, across, stash), dtype, in_terms)
    if len(xs) > 1 and (once is None or x.dim() != 2 or len(xs) > kernels.MOST_APART):
        return _quantize_both([torch.stack(xs)], along, across, stash, dtype, in_terms)
    if once is None:
        return _each_alone(x, along, across, stash, dtype, in_terms)
    xs = [each.contiguous() for each in xs]
    outs = [part and (x.new_empty(part.shape, dtype=part.dtype), part.spec, part.terms) for part in once.rounded]
    data = once.stash and (x.new_empty(once.stash.shape, dtype=torch.uint8), once.stash.spec)
    once.kernels.quantize_both(xs, once.around, *outs, data)
    first, second = (_none(x, dtype) if out is None else out[0] for out in outs)
    return first, second, _none(x, torch.uint8) if data is None else data[0]


def _stacked(xs: Sequence[Tensor]) -> torch.Size:
    """The shape of what is made of tensors of one shape: several are stacked in front."""
    return xs[0].shape if len(xs) == 1 else torch.Size((len(xs), *xs[0].shape))


def _each_alone(
    x: Tensor, along: str, across: str, stash: str, dtype: torch.dtype, in_terms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    first, second = (
        _in_terms(_fake_quantize(x, dim, fmt, None, dtype), formats.parse(fmt), in_terms) if fmt else _none(x, dtype)
        for fmt, dim in ((along, -1), (across, -2))
    )
    return first, second, _pack(x, -2, stash, None) if stash else _none(x, torch.uint8)


class _Part(NamedTuple):
    """One of the tensors that are made when another is read once."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    spec: Any
    terms: int = 0


class _Once(NamedTuple):
    """What is made of a tensor that is read once."""

    kernels: Any
    around: native.Shape
    rounded: tuple[_Part | None, _Part | None]
    stash: _Part | None


# Training calls with the same few shapes: what follows from them takes longer to find out than a launch.
@lru_cache(maxsize=4096)
def _once(
    kernels: Any,
    shape: torch.Size,
    x_dtype: torch.dtype,
    texts: tuple[str, str, str],
    dtype: torch.dtype,
    in_terms: bool,
) -> _Once | None:
    """None where no kernel gives all of it."""
    along, across, stash = (formats.parse(text) if text else None for text in texts)
    checks.quantize_both(torch.empty(shape, dtype=x_dtype, device="meta"), along, across, stash, dtype, in_terms)
    if not _reads_once(kernels, shape, tuple(fmt for fmt in (along, across, stash) if fmt)):
        return None

    def part(fmt: Format | None) -> _Part | None:
        if fmt is None:
            return None
        if not in_terms:
            return _Part(shape, dtype, fmt.spec)
        count = terms(fmt.significand_bits)
        return _Part((count, *shape), torch.bfloat16, fmt.spec, count)

    packed = None if stash is None else _Part((stash.nbytes(shape, -2),), torch.uint8, stash.spec)
    return _Once(kernels, _shape_around(shape, -2), (part(along), part(across)), packed)


@lru_cache(maxsize=4096)
def _reads_once(kernels: Any, shape: torch.Size, fmts: tuple[Format, ...]) -> bool:
    specs = [fmt.spec for fmt in fmts]
    if not _is_gpu(kernels) or shape.numel() == 0 or None in specs:
        return False
    return kernels.reads_once(specs, _shape_around(shape, -2))  # type: ignore[no-any-return]


def reads_once(x: Tensor, fmts: Sequence[Format]) -> bool:
    """Whether one kernel gives all that :func:`quantize_both` is asked for in these formats."""
    return _reads_once(_kernels(x.device), x.shape, tuple(fmts))


# Elements: where one matrix of many begins, loads and stores of 16 bytes stay whole.
_ALIGNED = 64


class Matrices:
    """Matrices that one launch rounds to nearest, as often as it is asked; no operator, since it reads addresses.

    Args:
        matrices: contiguous, of one dtype and one CUDA device; :func:`reads_once` holds for each.
        dim: -1 or -2, along which boxes lie.
        fmt: what they are rounded to.
    """

    def __init__(self, matrices: Sequence[Tensor], dim: int, fmt: Format) -> None:
        first = matrices[0]
        self._kernels, self._fmt, self._along = _kernels(first.device), fmt, dim == -1
        self._dtype, self._device = first.dtype, first.device
        self._terms = terms(fmt.significand_bits) if self._dtype is torch.float32 else 0
        self._addresses = _addresses(matrices)
        front = (self._terms,) if self._terms else ()
        self._shapes = [(*front, *x.shape) for x in matrices]
        # Each with what is left free behind it.
        self._sizes = [-(-math.prod(shape) // _ALIGNED) * _ALIGNED for shape in self._shapes]
        begins = [0, *itertools.accumulate(self._sizes)]
        self._table = self._kernels.table_of(matrices, begins[:-1])

    def are(self, matrices: Sequence[Tensor]) -> bool:
        """Whether these are the matrices, where they were."""
        return _addresses(matrices) == self._addresses

    def quantize(self) -> list[Tensor]:
        """The values of each matrix; of a float32 one its bfloat16 terms, stacked in front."""
        dtype = torch.bfloat16 if self._terms else self._dtype
        out = torch.empty(sum(self._sizes), dtype=dtype, device=self._device)
        of_all = out, self._dtype, self._along, self._fmt.spec, self._terms
        self._kernels.quantize_many(self._table, len(self._shapes), *of_all)
        pieces = zip(out.split(self._sizes), self._shapes, strict=True)
        return [piece[: math.prod(shape)].view(shape) for piece, shape in pieces]


def _addresses(matrices: Sequence[Tensor]) -> list[tuple[int, torch.Size]]:
    return [(x.data_ptr(), x.shape) for x in matrices]


def terms(significand_bits: int) -> int:
    """bfloat16 terms that hold so many significant bits exactly: eight each."""
    return -(-significand_bits // BFLOAT16_SIGNIFICAND_BITS)


def split(x: Tensor, count: int) -> Tensor:
    """float32 ``x`` as the exact sum of bfloat16 terms, the largest first, stacked in front.

    Bits below the smallest bfloat16, 2^-133, are lost. What is not finite stays in the first.
    """
    parts = []
    for _ in range(count - 1):
        high = (x.view(torch.int32) & -0x10000).view(torch.float32)
        parts.append(high)
        x = torch.where(high.isfinite(), x - high, 0.0)
    return torch.stack([*parts, x]).bfloat16()


def _in_terms(x: Tensor, fmt: Format, in_terms: bool) -> Tensor:
    return split(x, terms(fmt.significand_bits)) if in_terms else x


def _rounded_like(x: Tensor, fmt: Format, dtype: torch.dtype, in_terms: bool) -> Tensor:
    return _terms_like(x, fmt) if in_terms else torch.empty_like(x, dtype=dtype)


def _terms_like(x: Tensor, fmt: Format) -> Tensor:
    return x.new_empty((terms(fmt.significand_bits), *x.shape), dtype=torch.bfloat16)


def _none(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(0, dtype=dtype)


def _gemm(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    a_bits: int,
    b_bits: int,
    a_terms: int,
    b_terms: int,
    bias: Tensor | None,
    accumulate: bool,
) -> None:
    checks.gemm((a_bits, b_bits), (a_terms, b_terms), out=out, a=a, b=b, bias=bias)
    kernels = native.kernels
    # The kernel reads memory as it is told. Operands that do not fit are left to torch, which says so.
    runs = kernels is not None and kernels.has_gemm and (kernels.gemm_takes_values or (a_bits and b_bits))
    if kernels is not None and runs and out.device.type == "cpu" and _fit(out, a, b, bias):
        bias = None if bias is None else bias.contiguous()
        kernels.gemm(out, _matrix(a), _matrix(b), (a_bits, b_bits), (a_terms, b_terms), bias, accumulate)
        return
    if a_bits:
        a = definition.fake_quantize(a, formats.BlockFloat(a_bits), -1, None, a.dtype)
    if b_bits:
        b = definition.fake_quantize(b, formats.BlockFloat(b_bits), -1, None, b.dtype)
    product = a @ b.mT
    if bias is not None:
        product += bias
    if accumulate:
        out.add_(product)
    else:
        out.copy_(product)


def _fit(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    """Whether the tensors of a product are what the kernel takes."""
    if a.dim() != 3 or b.dim() != 3 or out.stride(-1) != 1:
        return False
    (batch, m, k), n = a.shape, b.shape[1]
    shapes = b.shape == (batch, n, k) and out.shape == (batch, m, n) and (bias is None or bias.shape == (n,))
    return shapes and all(x is None or x.dtype is torch.float32 for x in (out, a, b, bias))


def _matrix(x: Tensor) -> Tensor:
    """``x``, contiguous along one of its last two dimensions."""
    return x if x.stride(-1) == 1 or x.stride(-2) == 1 else x.contiguous()


def _dropout(x: Tensor, p: float, scale: float, seed: int) -> Tensor:
    checks.dropout(x, p, seed)
    kernels = _kernels(x.device) if x.numel() else None
    if kernels is None:
        return masks.dropout(x, p, scale, seed)
    values = _values(x, kernels)
    out = torch.empty_like(values)
    kernels.dropout(values, out, p, scale, seed)
    return out.to(x.dtype)


def _pack_positive(x: Tensor) -> Tensor:
    checks.tensor(x)
    kernels = _kernels(x.device) if x.numel() else None
    if kernels is None:
        return masks.pack_positive(x)
    data = x.new_empty(masks.nbytes(x.numel()), dtype=torch.uint8)
    kernels.pack_positive(_values(x, kernels), data)
    return data


def _mask(x: Tensor, data: Tensor) -> Tensor:
    checks.mask(x, data)
    kernels = _kernels(x.device) if x.numel() else None
    if kernels is None:
        return masks.mask(x, data)
    values = _values(x, kernels)
    out = torch.empty_like(values)
    kernels.mask(values, data.contiguous(), out)
    return out.to(x.dtype)


# What each operator gives, without computing it.


def _fake_quantize_fake(x: Tensor, dim: int, fmt: str, seed: int | None, dtype: torch.dtype) -> Tensor:
    checks.quantize(x, dim, seed, dtype)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _round_terms_fake(x: Tensor, dim: int, fmt: str, seed: int | None) -> Tensor:
    checks.quantize(x, dim, seed, torch.float32)
    return _terms_like(x, formats.parse(fmt))


def _unpack_terms_fake(data: Tensor, shape: Sequence[int], dim: int, fmt: str) -> Tensor:
    parsed = formats.parse(fmt)
    checks.packed(data, shape, dim, parsed, torch.float32)
    return data.new_empty((terms(parsed.significand_bits), *shape), dtype=torch.bfloat16)


def _factorize_fake(x: Tensor, dim: int, fmt: str, seed: int | None) -> tuple[Tensor, Tensor]:
    checks.factorize(x, dim, seed)
    elements = torch.empty(x.shape, device=x.device)
    return elements, elements.narrow(dim, 0, 1).clone()


def _pack_fake(x: Tensor, dim: int, fmt: str, seed: int | None) -> Tensor:
    checks.quantize(x, dim, seed, torch.float32)
    return x.new_empty(formats.parse(fmt).nbytes(x.shape, dim), dtype=torch.uint8)


def _unpack_fake(data: Tensor, shape: Sequence[int], dim: int, fmt: str, dtype: torch.dtype) -> Tensor:
    checks.packed(data, shape, dim, formats.parse(fmt), dtype)
    return data.new_empty(shape, dtype=dtype)


def _unpack_factors_fake(data: Tensor, shape: Sequence[int], dim: int, fmt: str) -> tuple[Tensor, Tensor]:
    checks.packed(data, shape, dim, formats.parse(fmt), torch.float32)
    elements = data.new_empty(shape, dtype=torch.float32)
    return elements, elements.narrow(dim, 0, 1).clone()


def _quantize_and_pack_fake(x: Tensor, operand: str, stash: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    checks.quantize_and_pack(x, formats.parse(operand), formats.parse(stash), dtype)
    return _fake_quantize_fake(x, -1, operand, None, dtype), _pack_fake(x, -2, stash, None)


def _quantize_both_fake(
    xs: list[Tensor], along: str, across: str, stash: str, dtype: torch.dtype, in_terms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    checks.stacked(xs, (along, across, stash))
    x = xs[0].new_empty(_stacked(xs))
    along_fmt, across_fmt, stash_fmt = (formats.parse(fmt) if fmt else None for fmt in (along, across, stash))
    checks.quantize_both(x, along_fmt, across_fmt, stash_fmt, dtype, in_terms)
    first, second = (
        _rounded_like(x, fmt, dtype, in_terms) if fmt else _none(x, dtype) for fmt in (along_fmt, across_fmt)
    )
    return first, second, _pack_fake(x, -2, stash, None) if stash else _none(x, torch.uint8)


def _gemm_fake(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    a_bits: int,
    b_bits: int,
    a_terms: int,
    b_terms: int,
    bias: Tensor | None,
    accumulate: bool,
) -> None:
    checks.gemm((a_bits, b_bits), (a_terms, b_terms), out=out, a=a, b=b, bias=bias)


def _dropout_fake(x: Tensor, p: float, scale: float, seed: int) -> Tensor:
    checks.dropout(x, p, seed)
    return x.new_empty(x.shape)


def _pack_positive_fake(x: Tensor) -> Tensor:
    checks.tensor(x)
    return x.new_empty(masks.nbytes(x.numel()), dtype=torch.uint8)


def _mask_fake(x: Tensor, data: Tensor) -> Tensor:
    checks.mask(x, data)
    return x.new_empty(x.shape)


_LIBRARY = torch.library.Library("fairseq_dsq", "DEF")
_OPERATORS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "fake_quantize": (
        "(Tensor x, int dim, str fmt, int? seed, ScalarType dtype) -> Tensor", _fake_quantize, _fake_quantize_fake
    ),
    "factorize": ("(Tensor x, int dim, str fmt, int? seed) -> (Tensor, Tensor)", _factorize, _factorize_fake),
    "pack": ("(Tensor x, int dim, str fmt, int? seed) -> Tensor", _pack, _pack_fake),
    "unpack": (
        "(Tensor data, SymInt[] shape, int dim, str fmt, ScalarType dtype) -> Tensor", _unpack, _unpack_fake
    ),
    "round_terms": ("(Tensor x, int dim, str fmt, int? seed) -> Tensor", _round_terms, _round_terms_fake),
    "unpack_terms": (
        "(Tensor data, SymInt[] shape, int dim, str fmt) -> Tensor", _unpack_terms, _unpack_terms_fake
    ),
    "unpack_factors": (
        "(Tensor data, SymInt[] shape, int dim, str fmt) -> (Tensor, Tensor)", _unpack_factors, _unpack_factors_fake
    ),
    "quantize_and_pack": (
        "(Tensor x, str operand, str stash, ScalarType dtype) -> (Tensor, Tensor)",
        _quantize_and_pack, _quantize_and_pack_fake,
    ),
    "quantize_both": (
        "(Tensor[] xs, str along, str across, str stash, ScalarType dtype, bool in_terms) -> (Tensor, Tensor, Tensor)",
        _quantize_both, _quantize_both_fake,
    ),
    "gemm": (
        "(Tensor(a!) out, Tensor a, Tensor b, int a_bits, int b_bits, int a_terms, int b_terms,"
        " Tensor? bias, bool accumulate) -> ()",
        _gemm, _gemm_fake,
    ),
    "dropout": ("(Tensor x, float p, float scale, int seed) -> Tensor", _dropout, _dropout_fake),
    "pack_positive": ("(Tensor x) -> Tensor", _pack_positive, _pack_positive_fake),
    "mask": ("(Tensor x, Tensor data) -> Tensor", _mask, _mask_fake),
}  # fmt: skip
for _name, (_schema, _run, _fake) in _OPERATORS.items():
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fairseq_dsq::{_name}", _fake, lib=_LIBRARY)

fake_quantize: Callable[..., Tensor] = torch.ops.fairseq_dsq.fake_quantize.default
factorize: Callable[..., tuple[Tensor, Tensor]] = torch.ops.fairseq_dsq.factorize.default
pack: Callable[..., Tensor] = torch.ops.fairseq_dsq.pack.default
unpack: Callable[..., Tensor] = torch.ops.fairseq_dsq.unpack.default
unpack_factors: Callable[..., tuple[Tensor, Tensor]] = torch.ops.fairseq_dsq.unpack_factors.default
quantize_and_pack: Callable[..., tuple[Tensor, Tensor]] = torch.ops.fairseq_dsq.quantize_and_pack.default
round_terms: Callable[..., Tensor] = torch.ops.fairseq_dsq.round_terms.default
unpack_terms: Callable[..., Tensor] = torch.ops.fairseq_dsq.unpack_terms.default
quantize_both: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.fairseq_dsq.quantize_both.default
gemm: Callable[..., None] = torch.ops.fairseq_dsq.gemm.default
dropout: Callable[..., Tensor] = torch.ops.fairseq_dsq.dropout.default
pack_positive: Callable[..., Tensor] = torch.ops.fairseq_dsq.pack_positive.default
mask: Callable[..., Tensor] = torch.ops.fairseq_dsq.mask.default
