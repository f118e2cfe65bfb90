"""The quantizers, dropout and bit masks as torch.library operators, ``torch.ops.fairseq_dsq.*``.

On the CPU they run the native kernels, on CUDA devices Triton's; plain torch where those are not available and on other
devices.
A format comes as the numbers of :class:`~fairseq_dsq.quant.reference.CodeSpec`: one that nobody here knows runs as
fast as the built-in ones. ``Library.define`` and not ``custom_op``, which takes 12 us a call where this takes 3: a
training step makes a thousand calls.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fairseq_dsq.formats import BlockFloat, packed_nbytes
from fairseq_dsq.quant import checks, masks, native, packing, reference
from fairseq_dsq.quant.reference import CodeSpec

# What bfloat16 holds exactly: a sign and 8 significant bits.
BFLOAT16_BITS = 9
_NUMBERS = len(CodeSpec._fields)
P = ParamSpec("P")
R = TypeVar("R")


def _spec_schema(whose: str = "") -> str:
    kinds = ("int", "int?", "int", "int", "bool", "int?", "int")
    return ", ".join(f"{kind} {whose}{name}" for kind, name in zip(kinds, CodeSpec._fields, strict=True))


_LIBRARY = torch.library.Library("fairseq_dsq", "DEF")
_SCHEMAS = {
    "fake_quantize": f"(Tensor x, int dim, {_spec_schema()}, int? seed, ScalarType dtype) -> Tensor",
    "pack": f"(Tensor x, int dim, {_spec_schema()}, int? seed) -> Tensor",
    "unpack": f"(Tensor data, SymInt[] shape, int dim, {_spec_schema()}, ScalarType dtype) -> Tensor",
    "quantize_and_pack": (
        f"(Tensor x, {_spec_schema('operand_')}, {_spec_schema('stash_')},"
        " int? operand_seed, int? stash_seed, ScalarType dtype) -> (Tensor, Tensor)"
    ),
    "gemm": (
        "(Tensor(a!) out, Tensor a, Tensor b, int a_bits, int b_bits, int terms, Tensor? bias, bool accumulate) -> ()"
    ),
    "dropout": "(Tensor x, float p, float scale, int seed) -> Tensor",
    "pack_positive": "(Tensor x) -> Tensor",
    "mask": "(Tensor x, Tensor data) -> Tensor",
}


def _shape_around(shape: Sequence[int], dim: int) -> native.Shape:
    """(before, length, after) of ``dim``."""
    if not shape:
        return 1, 1, 1
    dim = dim % len(shape)
    return math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])


def _kernel_dtype(dtype: torch.dtype, spec: CodeSpec) -> torch.dtype:
    """What the kernel writes, to be converted to ``dtype``, which rounds once as the reference does."""
    exact = dtype is torch.bfloat16 and spec.bits <= BFLOAT16_BITS
    return torch.bfloat16 if exact else torch.float32


@cache
def _triton_kernels(device: torch.device) -> Any:
    """The CUDA kernels; None without Triton, where FAIRSEQ_DSQ_ISA says torch, or where they do not work.

    No GPU was at hand when they were written: a device has to show that they equal the definition on it.
    """
    if os.environ.get(native.VARIABLE) == native.NO_KERNELS:
        return None
    try:
        from fairseq_dsq.quant import triton_kernels
    except ImportError:
        return None
    try:
        triton_kernels.check(device)
    except Exception as error:  # no C compiler for Triton's launcher, a GPU that it does not support, ...
        lines = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(f"{device}: no Triton kernels, quantization runs in plain, slow torch: {lines[0]}", stacklevel=2)
        return None
    return triton_kernels


def _cuda_kernels(x: Tensor, spec: CodeSpec) -> Any:
    """The kernels for a CUDA tensor in this format, or None."""
    kernels = _triton_kernels(x.device)
    return kernels if kernels is not None and kernels.covers(spec) else None


def _checked(check: Callable[..., None]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """An implementation that refuses what ``check`` does, before it runs."""

    def wrap(implementation: Callable[P, R]) -> Callable[P, R]:
        @wraps(implementation)
        def checked(*arguments: P.args, **options: P.kwargs) -> R:
            check(*arguments, **options)
            return implementation(*arguments, **options)

        return checked

    return wrap


# Each operator in plain torch for any device, on the CPU, on CUDA, and the shape of its result. Arguments are those of
# the schemas, a spec's numbers in a row.


@_checked(checks.fake_quantize)
def _fake_quantize(x: Tensor, dim: int, *arguments: Any) -> Tensor:
    *numbers, seed, dtype = arguments
    return reference.fake_quantize(x, CodeSpec._make(numbers), dim, seed, dtype)


@_checked(checks.fake_quantize)
def _fake_quantize_cpu(x: Tensor, dim: int, *arguments: Any) -> Tensor:
    return _fake_quantize_by(native.kernels, x, dim, *arguments)


@_checked(checks.fake_quantize)
def _fake_quantize_cuda(x: Tensor, dim: int, *arguments: Any) -> Tensor:
    return _fake_quantize_by(_cuda_kernels(x, CodeSpec._make(arguments[:_NUMBERS])), x, dim, *arguments)


def _fake_quantize_by(kernels: Any, x: Tensor, dim: int, *arguments: Any) -> Tensor:
    if kernels is None or x.numel() == 0:
        return _fake_quantize(x, dim, *arguments)
    *numbers, seed, dtype = arguments
    spec = CodeSpec._make(numbers)
    x = x.float().contiguous()
    out = torch.empty_like(x, dtype=_kernel_dtype(dtype, spec))
    kernels.fake_quantize(x, out, _shape_around(x.shape, dim), spec, seed)
    return out if out.dtype is dtype else out.to(dtype)


@_checked(checks.fake_quantize)
def _fake_quantize_fake(x: Tensor, dim: int, *arguments: Any) -> Tensor:
    return torch.empty(x.shape, dtype=arguments[-1], device=x.device)


@_checked(checks.pack)
def _pack(x: Tensor, dim: int, *arguments: Any) -> Tensor:
    *numbers, seed = arguments
    return packing.pack(x, CodeSpec._make(numbers), dim, seed)


@_checked(checks.pack)
def _pack_cpu(x: Tensor, dim: int, *arguments: Any) -> Tensor:
    return _pack_by(native.kernels, x, dim, *arguments)


@_checked(checks.pack)
def _pack_cuda(x: Tensor, dim: int, *arguments: Any) -> Tensor:
    return _pack_by(_cuda_kernels(x, CodeSpec._make(arguments[:_NUMBERS])), x, dim, *arguments)


def _pack_by(kernels: Any, x: Tensor, dim: int, *arguments: Any) -> Tensor:
    if kernels is None or x.numel() == 0:
        return _pack(x, dim, *arguments)
    *numbers, seed = arguments
    spec = CodeSpec._make(numbers)
    x = x.float().contiguous()
    data = x.new_empty(packed_nbytes(x.shape, dim, spec.bits, spec.box_size), dtype=torch.uint8)
    kernels.pack(x, data, _shape_around(x.shape, dim), spec, seed)
    return data


@_checked(checks.pack)
def _pack_fake(x: Tensor, dim: int, *arguments: Any) -> Tensor:
    bits, box_size, *_ = arguments
    return x.new_empty(packed_nbytes(x.shape, dim, bits, box_size), dtype=torch.uint8)


@_checked(checks.unpack)
def _unpack(data: Tensor, shape: Sequence[int], dim: int, *arguments: Any) -> Tensor:
    *numbers, dtype = arguments
    return packing.unpack(data, shape, CodeSpec._make(numbers), dim, dtype)


@_checked(checks.unpack)
def _unpack_cpu(data: Tensor, shape: Sequence[int], dim: int, *arguments: Any) -> Tensor:
    return _unpack_by(native.kernels, data, shape, dim, *arguments)


@_checked(checks.unpack)
def _unpack_cuda(data: Tensor, shape: Sequence[int], dim: int, *arguments: Any) -> Tensor:
    return _unpack_by(_cuda_kernels(data, CodeSpec._make(arguments[:_NUMBERS])), data, shape, dim, *arguments)


def _unpack_by(kernels: Any, data: Tensor, shape: Sequence[int], dim: int, *arguments: Any) -> Tensor:
    if kernels is None or data.numel() == 0:
        return _unpack(data, shape, dim, *arguments)
    *numbers, dtype = arguments
    spec = CodeSpec._make(numbers)
    out = data.new_empty(shape, dtype=_kernel_dtype(dtype, spec))
    kernels.unpack(data.contiguous(), out, _shape_around(shape, dim), spec)
    return out if out.dtype is dtype else out.to(dtype)


@_checked(checks.unpack)
def _unpack_fake(data: Tensor, shape: Sequence[int], dim: int, *arguments: Any) -> Tensor:
    return data.new_empty(shape, dtype=arguments[-1])


def _one_by_one(
    fake_quantize: Callable[..., Tensor], pack: Callable[..., Tensor], x: Tensor, arguments: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    operand, stash = arguments[:_NUMBERS], arguments[_NUMBERS : 2 * _NUMBERS]
    operand_seed, stash_seed, dtype = arguments[2 * _NUMBERS :]
    return fake_quantize(x, -1, *operand, operand_seed, dtype), pack(x, -2, *stash, stash_seed)


@_checked(checks.quantize_and_pack)
def _quantize_and_pack(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _one_by_one(_fake_quantize, _pack, x, arguments)


@_checked(checks.quantize_and_pack)
def _quantize_and_pack_cpu(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    kernels = native.kernels
    if kernels is None or x.numel() == 0:
        return _quantize_and_pack(x, *arguments)
    operand_spec, stash_spec = CodeSpec._make(arguments[:_NUMBERS]), CodeSpec._make(arguments[_NUMBERS : 2 * _NUMBERS])
    operand_seed, stash_seed, dtype = arguments[2 * _NUMBERS :]
    x = x.float().contiguous()
    operand = torch.empty_like(x, dtype=_kernel_dtype(dtype, operand_spec))
    stash = x.new_empty(packed_nbytes(x.shape, -2, stash_spec.bits, stash_spec.box_size), dtype=torch.uint8)
    seeds = None if operand_seed is None else (operand_seed, stash_seed)
    kernels.quantize_and_pack(x, operand, stash, _shape_around(x.shape, -2), operand_spec, stash_spec, seeds)
    return operand if operand.dtype is dtype else operand.to(dtype), stash


@_checked(checks.quantize_and_pack)
def _quantize_and_pack_cuda(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _one_by_one(_fake_quantize_cuda, _pack_cuda, x, arguments)


@_checked(checks.quantize_and_pack)
def _quantize_and_pack_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _one_by_one(_fake_quantize_fake, _pack_fake, x, arguments)


@_checked(checks.gemm)
def _gemm(
    out: Tensor, a: Tensor, b: Tensor, a_bits: int, b_bits: int, terms: int, bias: Tensor | None, accumulate: bool
) -> None:
    if a_bits:
        a = reference.fake_quantize(a, reference.code_spec(BlockFloat(a_bits)), -1, None, a.dtype)
    if b_bits:
        b = reference.fake_quantize(b, reference.code_spec(BlockFloat(b_bits)), -1, None, b.dtype)
    product = a @ b.mT
    if bias is not None:
        product += bias
    if accumulate:
        out.add_(product)
    else:
        out.copy_(product)


@_checked(checks.gemm)
def _gemm_cpu(out: Tensor, a: Tensor, b: Tensor, *arguments: Any) -> None:
    kernels = native.kernels
    a_bits, b_bits, terms, bias, accumulate = arguments
    # The kernel reads memory as it is told. Operands that do not fit are left to torch, which says so.
    runs = kernels is not None and kernels.has_gemm and (kernels.gemm_takes_values or (a_bits and b_bits))
    if kernels is None or not runs or not _fit(out, a, b, bias):
        return _gemm(out, a, b, *arguments)
    bias = None if bias is None else bias.contiguous()
    kernels.gemm(out, _matrix(a), _matrix(b), (a_bits, b_bits), terms, bias, accumulate)


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


@_checked(checks.gemm)
def _gemm_fake(out: Tensor, *arguments: Any) -> None:
    pass


@_checked(checks.dropout)
def _dropout_cpu(x: Tensor, p: float, scale: float, seed: int) -> Tensor:
    kernels = native.kernels
    if kernels is None or x.numel() == 0:
        return masks.dropout(x, p, scale, seed)
    values = x.float().contiguous()
    out = torch.empty_like(values)
    kernels.dropout(values, out, p, scale, seed)
    return out.to(x.dtype)


@_checked(checks.dropout)
def _dropout_fake(x: Tensor, p: float, scale: float, seed: int) -> Tensor:
    return x.new_empty(x.shape)


@_checked(checks.pack_positive)
def _pack_positive_cpu(x: Tensor) -> Tensor:
    kernels = native.kernels
    if kernels is None or x.numel() == 0:
        return masks.pack_positive(x)
    data = x.new_empty(masks.nbytes(x.numel()), dtype=torch.uint8)
    kernels.pack_positive(x.float().contiguous(), data)
    return data


@_checked(checks.pack_positive)
def _pack_positive_fake(x: Tensor) -> Tensor:
    return x.new_empty(masks.nbytes(x.numel()), dtype=torch.uint8)


@_checked(checks.mask)
def _mask_cpu(x: Tensor, data: Tensor) -> Tensor:
    kernels = native.kernels
    if kernels is None or x.numel() == 0:
        return masks.mask(x, data)
    values = x.float().contiguous()
    out = torch.empty_like(values)
    kernels.mask(values, data.contiguous(), out)
    return out.to(x.dtype)


@_checked(checks.mask)
def _mask_fake(x: Tensor, data: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any] | None, Any]] = {
    "fake_quantize": (_fake_quantize, _fake_quantize_cpu, _fake_quantize_cuda, _fake_quantize_fake),
    "pack": (_pack, _pack_cpu, _pack_cuda, _pack_fake),
    "unpack": (_unpack, _unpack_cpu, _unpack_cuda, _unpack_fake),
    "quantize_and_pack": (
        *(_quantize_and_pack, _quantize_and_pack_cpu, _quantize_and_pack_cuda),
        _quantize_and_pack_fake,
    ),
    "gemm": (_gemm, _gemm_cpu, None, _gemm_fake),
    "dropout": (_checked(checks.dropout)(masks.dropout), _dropout_cpu, None, _dropout_fake),
    "pack_positive": (
        _checked(checks.pack_positive)(masks.pack_positive),
        _pack_positive_cpu,
        None,
        _pack_positive_fake,
    ),
    "mask": (_checked(checks.mask)(masks.mask), _mask_cpu, None, _mask_fake),
}
for _name, (_any_device, _cpu, _cuda, _fake) in _IMPLEMENTATIONS.items():
    _LIBRARY.define(_name + _SCHEMAS[_name])
    _LIBRARY.impl(_name, _any_device, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _cpu, "CPU")
    if _cuda is not None:
        _LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"fairseq_dsq::{_name}", _fake, lib=_LIBRARY)

fake_quantize: Callable[..., Tensor] = torch.ops.fairseq_dsq.fake_quantize.default
pack: Callable[..., Tensor] = torch.ops.fairseq_dsq.pack.default
unpack: Callable[..., Tensor] = torch.ops.fairseq_dsq.unpack.default
quantize_and_pack: Callable[..., tuple[Tensor, Tensor]] = torch.ops.fairseq_dsq.quantize_and_pack.default
gemm: Callable[..., None] = torch.ops.fairseq_dsq.gemm.default
dropout: Callable[..., Tensor] = torch.ops.fairseq_dsq.dropout.default
pack_positive: Callable[..., Tensor] = torch.ops.fairseq_dsq.pack_positive.default
mask: Callable[..., Tensor] = torch.ops.fairseq_dsq.mask.default
