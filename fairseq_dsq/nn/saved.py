"""What operations other than GEMMs keep for backward: bit masks, 8-bit values, seeds.

Their forward passes are torch's own. Their gradients are torch's own too, of the values that were kept:

=================  ===============================================  ===================
operation          kept                                             gradient
=================  ===============================================  ===================
ReLU               one bit per value                                exact
other activations  the derivative at 8 bits                         of these
LayerNorm, RMSNorm the normalized input at 8 bits, and 1/deviation  of these
gated activation   both derivatives of the product at 8 bits        of these
softmax            the probabilities at 8 bits but for the largest  of these, scaled to
                   of each row                                      a sum of 1 again
dropout            a seed                                           exact
=================  ===============================================  ===================

What is rounded is what the gradient is multiplied with, after every subtraction that cancels: an input far from zero
would lose in rounding what its normalized value and its derivative are made of. A derivative that is not finite comes
back as NaN and touches no other value. A row of a norm or softmax that holds Inf or NaN is NaN throughout, as
torch's is.

Eight bits are block floating point with boxes along the last dimension, rounded to nearest: 17 bytes for 16 values.
Where the context's precision is float32, nothing needs a gradient (but for dropout), or a tensor has no elements,
torch's own operations run. What is kept here is no operand of a GEMM, and the ledger does not count it. Attention whose
scores are computed twice (:mod:`fairseq_dsq.nn.attend`) keeps no probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fairseq_dsq.formats import DEFAULT_BOX_SIZE, BlockFloat
from fairseq_dsq.kernels import ops
from fairseq_dsq.nn.context import DSQContext
from fairseq_dsq.nn.functional import autocast_device
from fairseq_dsq.quantized import QuantizedTensor, pack

KEPT = BlockFloat(8)
# Rows go through the caches in pieces of about so many values: a second float copy would show in the peak.
VALUES_PER_PIECE = 1 << 18
# A code of KEPT takes a byte. That of -0 is none that a derivative needs, and marks one that is not finite.
_NOT_FINITE = 0x80


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would keep anything of an operation on these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def keeps_less(context: DSQContext, x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether an operation other than a GEMM on ``x`` is to keep less for its gradient than torch's own does."""
    return context.packs_everything and needs_gradient(x, *parameters) and x.numel() > 0


def pieces(x: Tensor, length: int | None = None) -> Sequence[Tensor]:
    """Rows of ``length`` values, the last dimension's unless given, some at a time; views of a contiguous tensor."""
    length = length or (x.shape[-1] if x.dim() else 1)
    rows: Tensor = x.reshape(-1, length)
    return rows.split(_rows_per_piece(length))  # type: ignore[no-any-return]


def _rows_per_piece(length: int) -> int:
    return max(1, VALUES_PER_PIECE // length)


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        ctx.save_for_backward(ops.pack_positive(y))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (bits,) = ctx.saved_tensors
        return ops.mask(grad, bits)


def _derivatives(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of a function of single values, at each value."""
    x = x.detach().requires_grad_()
    # Hooks on saved tensors, such as checkpointing's, are not meant for a graph that is gone in a moment.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
        y = function(x)
        return torch.autograd.grad(y, x, torch.ones_like(y))[0]


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _pack_apart(x: Tensor) -> QuantizedTensor:
    """Rows (rows, N) at 8 bits; what is not finite is no part of its box."""
    finite = x.isfinite()
    packed = pack(x.where(finite, 0.0), KEPT)
    # Bytes: exponents and codes of the full boxes, then exponents and codes of the short last ones.
    rows, (full, rest) = len(x), divmod(x.shape[1], DEFAULT_BOX_SIZE)
    in_full, in_short = rows * full * DEFAULT_BOX_SIZE, rows * rest
    _, codes, _, short = packed.data.split(
        [rows * full, in_full, len(packed.data) - rows * full - in_full - in_short, in_short]
    )
    for part, known in zip((codes, short), finite.split([full * DEFAULT_BOX_SIZE, rest], 1), strict=True):
        part.masked_fill_(part == _NOT_FINITE, 0).masked_fill_(~known.flatten(), _NOT_FINITE)
    return packed


def _unpack_apart(packed: QuantizedTensor) -> Tensor:
    """What :func:`_pack_apart` packed; NaN where it was not finite."""
    x = packed.dequantize()
    return x.masked_fill_(x.signbit() & (x == 0), torch.nan)


class _Elementwise(torch.autograd.Function):
    """Any function of single values."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        kept = [_pack_apart(_derivatives(function, piece)) for piece in pieces(x)]
        ctx.save_for_backward(*(packed.data for packed in kept))
        ctx.specs, ctx.dtype = [packed.spec for packed in kept], x.dtype
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        grad_x = torch.empty_like(grad, dtype=ctx.dtype, memory_format=torch.contiguous_format)
        parts = zip(pieces(grad_x), pieces(grad), ctx.saved_tensors, ctx.specs, strict=True)
        for target, source, data, spec in parts:
            target.copy_(_unpack_apart(QuantizedTensor(data, *spec)).mul_(source))
        return None, grad_x


class _Gated(torch.autograd.Function):
    """``function(gate) * up``; keeps its derivatives by either."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
        kept = []
        for gates, ups in zip(pieces(gate), pieces(up), strict=True):
            kept += [_pack_apart(_derivatives(function, gates) * ups), _pack_apart(function(gates))]
        ctx.save_for_backward(*(packed.data for packed in kept))
        ctx.specs, ctx.dtypes = [packed.spec for packed in kept], (gate.dtype, up.dtype)
        return function(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        grads = [torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format) for dtype in ctx.dtypes]
        kept = [QuantizedTensor(data, *spec) for data, spec in zip(ctx.saved_tensors, ctx.specs, strict=True)]
        for index, target in enumerate(grads):
            for rows, source, packed in zip(pieces(target), pieces(grad), kept[index::2], strict=True):
                rows.copy_(_unpack_apart(packed).mul_(source))
        return None, *grads  # type: ignore[return-value]


def gated(function: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor, context: DSQContext) -> Tensor:
    """``function(gate) * up``, as SwiGLU has it of SiLU; ``function`` is one of single values."""
    if keeps_less(context, gate, up):
        return _Gated.apply(function, gate, up)  # type: ignore[no-any-return]
    return function(gate) * up


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shape: tuple[int, ...], eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        length = math.prod(shape)
        statistics = (each.view(-1, 1).split(_rows_per_piece(length)) for each in (mean, rstd))
        kept = []
        for rows, row_mean, row_rstd in zip(pieces(x, length), *statistics, strict=True):
            kept.append(pack((rows.float() - row_mean).mul_(row_rstd), KEPT))
        ctx.save_for_backward(rstd, weight, bias, *(packed.data for packed in kept))
        ctx.specs, ctx.shape = [packed.spec for packed in kept], shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rstd, weight, bias, *kept = ctx.saved_tensors
        normalized = torch.empty_like(grad, memory_format=torch.contiguous_format)
        targets = pieces(normalized, math.prod(ctx.shape))
        for target, data, spec in zip(targets, kept, ctx.specs, strict=True):
            target.copy_(QuantizedTensor(data, *spec).dequantize())
        # The gradient of an input that is normalized already: its mean is 0 and its deviation 1.
        arguments = grad, normalized, ctx.shape, torch.zeros_like(rstd), torch.ones_like(rstd), weight, bias
        grad_x, *grads = torch.ops.aten.native_layer_norm_backward(*arguments, ctx.needs_input_grad[2:])
        return None, None, None if grad_x is None else grad_x.mul_(rstd), *grads


class _RMSNorm(torch.autograd.Function):
    """``y = n * weight`` with ``n = x * rstd`` and ``rstd = (mean(x^2) + eps)^-1/2``."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], eps: float | None, x: Tensor, weight: Tensor | None) -> Tensor:
        kept, deviations = [], []
        # torch's own, of the dtype that it computes in
        added = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps
        for rows in pieces(x, math.prod(shape)):
            rows = rows.float()
            mean = rows.square().mean(-1, keepdim=True)
            deviations.append(mean.add_(added).rsqrt_())
            kept.append(pack(rows * deviations[-1], KEPT))
        ctx.save_for_backward(torch.cat(deviations), weight, *(packed.data for packed in kept))
        ctx.specs, ctx.shape = [packed.spec for packed in kept], shape
        return nn.functional.rms_norm(x, shape, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, Tensor | None]:
        rstd, weight, *kept = ctx.saved_tensors
        length = math.prod(ctx.shape)
        grad_x = torch.empty_like(grad, memory_format=torch.contiguous_format)
        grad_weight = None if weight is None else torch.zeros(length, device=grad.device)
        parts = zip(pieces(grad_x, length), pieces(grad, length), rstd.split(_rows_per_piece(length)), strict=True)
        for (target, source, deviation), data, spec in zip(parts, kept, ctx.specs, strict=True):
            normalized, source = QuantizedTensor(data, *spec).dequantize().float(), source.float()
            if grad_weight is not None:
                grad_weight += (source * normalized).sum(0)
                source = source * weight.view(-1)
            # dx = rstd * (dn - n * mean(dn * n))
            source = source - normalized * (source * normalized).mean(-1, keepdim=True)
            target.copy_(source.mul_(deviation))
        return None, None, grad_x, None if grad_weight is None else grad_weight.view(ctx.shape).to(weight.dtype)


def pack_probabilities(probabilities: Tensor) -> tuple[QuantizedTensor, Tensor, Tensor]:
    """Probabilities (..., N), which are changed, at 8 bits but for the largest of each row.

    Where one probability is nearly 1, the gradient is made of what it lacks and of the small ones beside it, all finer
    than the steps of 8 bits near 1: the largest is kept as it is, and does not share a box with the others.

    Returns:
        The others packed, the largest, and their places (int32), both (..., 1).
    """
    largest, place = probabilities.max(-1, keepdim=True)
    return pack(probabilities.scatter_(-1, place, 0.0), KEPT), largest, place.int()


def unpack_probabilities(packed: QuantizedTensor, largest: Tensor, place: Tensor) -> Tensor:
    """What :func:`pack_probabilities` packed."""
    return packed.dequantize().scatter_(-1, place.long(), largest)


class _Softmax(torch.autograd.Function):
    """Along the last dimension, float32."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        probabilities = torch.softmax(scores, -1)
        packed, *largest = pack_probabilities(probabilities.clone())
        ctx.save_for_backward(packed.data, *largest)
        ctx.spec = packed.spec
        return probabilities

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        data, *largest = ctx.saved_tensors
        probabilities = unpack_probabilities(QuantizedTensor(data, *ctx.spec), *largest)
        # Of a sum of 1 again: what all gradients of a row have in common cancels.
        probabilities.div_(probabilities.sum(-1, keepdim=True))
        grad_scores: Tensor = torch.ops.aten._softmax_backward_data(grad, probabilities, -1, torch.float32)
        return grad_scores


def softmax(x: Tensor, context: DSQContext) -> Tensor:
    """``torch.softmax(x, -1, dtype=torch.float32)``."""
    if keeps_less(context, x):
        return _Softmax.apply(x.float())  # type: ignore[no-any-return]
    return torch.softmax(x, -1, dtype=torch.float32)


def keep_rate_inverse(p: float) -> float:
    """What dropout multiplies by what it keeps."""
    return 1 / (1 - p) if p < 1 else 0.0


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.arguments = p, keep_rate_inverse(p), seed
        return ops.dropout(x, *ctx.arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ops.dropout(grad, *ctx.arguments), None, None


def dropout(x: Tensor, p: float) -> Tensor:
    """``torch.nn.functional.dropout(x, p)`` whose mask follows from one draw of torch's default generator.

    The draw does not depend on whether a gradient is needed: reentrant checkpointing runs a forward pass without one
    and repeats it with one.
    """
    return _Dropout.apply(x, p, int(torch.randint(2**62, ())))  # type: ignore[no-any-return]


class Activation:
    """An activation function that keeps less for backward; takes its place as a module's attribute."""

    def __init__(self, function: Callable[[Tensor], Tensor], context: DSQContext) -> None:
        self.function = function
        self.context = context

    def __call__(self, x: Tensor) -> Tensor:
        if self.function in _RELU and self.context.packs and needs_gradient(x):
            return _ReLU.apply(x)  # type: ignore[no-any-return]
        if self.function not in _RELU and keeps_less(self.context, x):
            return _Elementwise.apply(self.function, x)  # type: ignore[no-any-return]
        return self.function(x)


_RELU = (nn.functional.relu, torch.relu)
_ELEMENTWISE = [nn.functional.gelu, nn.functional.silu, nn.functional.sigmoid, torch.tanh, nn.functional.tanh]


def register_elementwise(*functions: Callable[[Tensor], Tensor]) -> None:
    """Have :class:`Activation` take the place of functions of single values."""
    _ELEMENTWISE.extend(functions)


def is_known_activation(function: Any) -> TypeGuard[Callable[[Tensor], Tensor]]:
    """Whether :class:`Activation` may take the place of ``function``."""
    return function in (*_RELU, *_ELEMENTWISE)


class _Norm(nn.Module):
    context: DSQContext

    @classmethod
    def from_float(cls, module: Any, context: DSQContext) -> Self:
        """The twin of ``module``, holding its very parameters."""
        twin = cls(module.normalized_shape, module.eps, elementwise_affine=False)
        twin.elementwise_affine = module.elementwise_affine
        for name in twin._parameters:
            setattr(twin, name, getattr(module, name))
        twin.context = context
        return twin.train(module.training)


class DSQLayerNorm(_Norm, nn.LayerNorm):
    """``nn.LayerNorm`` (same parameters, same names) that keeps its normalized input at 8 bits."""

    def forward(self, input: Tensor) -> Tensor:
        tensors = input, self.weight, self.bias
        # Autocast may have the operation run in another dtype: that differs from device to device.
        autocast = torch.is_autocast_enabled(autocast_device(input))
        if autocast or not keeps_less(self.context, *tensors):
            return super().forward(input)
        return _LayerNorm.apply(self.normalized_shape, self.eps, *tensors)  # type: ignore[no-any-return]


class DSQRMSNorm(_Norm, nn.RMSNorm):
    """``nn.RMSNorm`` (same parameter, same name) that keeps its normalized input at 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(autocast_device(x)) or not keeps_less(self.context, x, self.weight):
            return super().forward(x)
        return _RMSNorm.apply(self.normalized_shape, self.eps, x, self.weight)  # type: ignore[no-any-return]


class DSQDropout(nn.Module):
    """A dropout module, ``nn.Dropout`` or fairseq's, whose mask is not kept but drawn again.

    Args:
        module: holds ``p`` and, fairseq's, ``apply_during_inference``; its own forward runs at float32.
        context: the model's precision.
    """

    module: Any

    def __init__(self, module: nn.Module, context: DSQContext) -> None:
        super().__init__()
        self.module = module
        self.context = context

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """``x`` with values dropped, of any shape; ``inplace`` is a permission that goes unused."""
        if not (self.probability and self.context.packs_everything):
            return self.module(x)  # type: ignore[no-any-return]
        return dropout(x, self.probability)

    @property
    def probability(self) -> float:
        """Of a value to be dropped now."""
        active = self.module.training or getattr(self.module, "apply_during_inference", False)
        return float(self.module.p) if active else 0.0
