"""The quantizers, GEMM, dropout and bit masks as torch.library operators, ``torch.ops.fairseq_dsq.*``.

A format comes as its text. On the CPU the native kernels run it, on CUDA devices Triton's, where its ``kernel_spec``
says that they can; else its definition runs, in plain torch. ``Library.define`` and not ``custom_op``, which takes
12 us a call where this takes 3: a training step makes a thousand calls.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

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


def _kernel_dtype(dtype: torch.dtype, fmt: Format) -> torch.dtype:
    """What the kernel writes, to be converted to ``dtype``, which rounds once as the definition does.

    Minifloats under the smallest scales reach further down than bfloat16.
    """
    exact = dtype is torch.bfloat16 and fmt.significand_bits <= BFLOAT16_SIGNIFICAND_BITS
    exact = exact and fmt.spec is not None and not fmt.spec.exponent_bits
    return torch.bfloat16 if exact else torch.float32


@cache
def _triton_kernels(device: torch.device) -> Any:
    """The CUDA kernels; None without Triton, where FAIRSEQ_DSQ_ISA says torch, or where they do not work.

    No GPU was at hand when they were written: a device has to show that they equal the definition on it.
    """
    if os.environ.get(native.VARIABLE) == native.NO_KERNELS:
        return None
    try:
        from fairseq_dsq.kernels import triton_kernels
    except ImportError:
        return None
    try:
        triton_kernels.check(device)
    except Exception as error:  # no C compiler for Triton's launcher, a GPU that it does not support, ...
        lines = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(f"{device}: no Triton kernels, quantization runs in plain, slow torch: {lines[0]}", stacklevel=2)
        return None
    return triton_kernels


def _kernels(device: torch.device) -> Any:
    """The kernels of a device; None for one that has none."""
    if device.type == "cpu":
        return native.kernels
    return _triton_kernels(device) if device.type == "cuda" else None


def _kernels_for(x: Tensor, fmt: Format) -> Any:
    """The kernels that run ``fmt`` on a tensor; None where its definition is to."""
    kernels = _kernels(x.device)
    if kernels is None or x.numel() == 0:
        return None
    if fmt.spec is None:
        _say_slow(fmt.text)
        return None
    return kernels if kernels.covers(fmt.spec) else None


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
    x = x.float().contiguous()
    out = torch.empty_like(x, dtype=_kernel_dtype(dtype, parsed))
    kernels.fake_quantize(x, out, _shape_around(x.shape, dim), parsed.spec, seed)
    return out if out.dtype is dtype else out.to(dtype)


def _factorize(x: Tensor, dim: int, fmt: str, seed: int | None) -> tuple[Tensor, Tensor]:
    checks.factorize(x, dim, seed)
    parsed = formats.parse(fmt)
    by_row = parsed.group == "row" and dim in (-1, x.dim() - 1) and x.device.type == "cpu"
    kernels = _kernels_for(x, parsed) if by_row else None
    if kernels is None:
        return definition.factorize(x, parsed, dim, seed)
    x = x.float().contiguous()
    elements, factors = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
    kernels.factorize(x, elements, factors, parsed.spec, seed)
    return elements, factors


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
    x = x.float().contiguous()
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
    out = data.new_empty(shape, dtype=_kernel_dtype(dtype, parsed))
    kernels.unpack(data.contiguous(), out, _shape_around(shape, dim), parsed.spec)
    return out if out.dtype is dtype else out.to(dtype)


def _unpack_factors(data: Tensor, shape: Sequence[int], dim: int, fmt: str) -> tuple[Tensor, Tensor]:
    parsed = formats.parse(fmt)
    checks.packed(data, shape, dim, parsed, torch.float32)
    return definition.unpack_factors(data, shape, parsed, dim)


def _quantize_and_pack(x: Tensor, operand: str, stash: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    fmt, stash_fmt = formats.parse(operand), formats.parse(stash)
    checks.quantize_and_pack(x, fmt, stash_fmt, dtype)
    kernels = _kernels_for(x, fmt) if _kernels_for(x, stash_fmt) is native.kernels else None
    if kernels is None:
        return _fake_quantize(x, -1, operand, None, dtype), _pack(x, -2, stash, None)
    x = x.float().contiguous()
    out = torch.empty_like(x, dtype=_kernel_dtype(dtype, fmt))
    data = x.new_empty(stash_fmt.nbytes(x.shape, -2), dtype=torch.uint8)
    kernels.quantize_and_pack(x, out, data, _shape_around(x.shape, -2), fmt.spec, stash_fmt.spec)
    return out if out.dtype is dtype else out.to(dtype), data


def _gemm(
    out: Tensor, a: Tensor, b: Tensor, a_bits: int, b_bits: int, terms: int, bias: Tensor | None, accumulate: bool
) -> None:
    checks.gemm(a_bits, b_bits, terms)
    kernels = native.kernels
    # The kernel reads memory as it is told. Operands that do not fit are left to torch, which says so.
    runs = kernels is not None and kernels.has_gemm and (kernels.gemm_takes_values or (a_bits and b_bits))
    if kernels is not None and runs and out.device.type == "cpu" and _fit(out, a, b, bias):
        bias = None if bias is None else bias.contiguous()
        kernels.gemm(out, _matrix(a), _matrix(b), (a_bits, b_bits), terms, bias, accumulate)
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


def _cpu_kernels(x: Tensor) -> native.Kernels | None:
    return native.kernels if x.device.type == "cpu" and x.numel() else None


def _dropout(x: Tensor, p: float, scale: float, seed: int) -> Tensor:
    checks.dropout(x, p, seed)
    kernels = _cpu_kernels(x)
    if kernels is None:
        return masks.dropout(x, p, scale, seed)
    values = x.float().contiguous()
    out = torch.empty_like(values)
    kernels.dropout(values, out, p, scale, seed)
    return out.to(x.dtype)


def _pack_positive(x: Tensor) -> Tensor:
    checks.tensor(x)
    kernels = _cpu_kernels(x)
    if kernels is None:
        return masks.pack_positive(x)
    data = x.new_empty(masks.nbytes(x.numel()), dtype=torch.uint8)
    kernels.pack_positive(x.float().contiguous(), data)
    return data


def _mask(x: Tensor, data: Tensor) -> Tensor:
    checks.mask(x, data)
    kernels = _cpu_kernels(x)
    if kernels is None:
        return masks.mask(x, data)
    values = x.float().contiguous()
    out = torch.empty_like(values)
    kernels.mask(values, data.contiguous(), out)
    return out.to(x.dtype)


# What each operator gives, without computing it.


def _fake_quantize_fake(x: Tensor, dim: int, fmt: str, seed: int | None, dtype: torch.dtype) -> Tensor:
    checks.quantize(x, dim, seed, dtype)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


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


def _gemm_fake(out: Tensor, a: Tensor, b: Tensor, a_bits: int, b_bits: int, terms: int, *arguments: Any) -> None:
    checks.gemm(a_bits, b_bits, terms)


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
    "unpack_factors": (
        "(Tensor data, SymInt[] shape, int dim, str fmt) -> (Tensor, Tensor)", _unpack_factors, _unpack_factors_fake
    ),
    "quantize_and_pack": (
        "(Tensor x, str operand, str stash, ScalarType dtype) -> (Tensor, Tensor)",
        _quantize_and_pack, _quantize_and_pack_fake,
    ),
    "gemm": (
        "(Tensor(a!) out, Tensor a, Tensor b, int a_bits, int b_bits, int terms, Tensor? bias, bool accumulate) -> ()",
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
gemm: Callable[..., None] = torch.ops.fairseq_dsq.gemm.default
dropout: Callable[..., Tensor] = torch.ops.fairseq_dsq.dropout.default
pack_positive: Callable[..., Tensor] = torch.ops.fairseq_dsq.pack_positive.default
mask: Callable[..., Tensor] = torch.ops.fairseq_dsq.mask.default
