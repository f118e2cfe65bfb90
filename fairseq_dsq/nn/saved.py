"""What operations other than GEMMs keep for backward: bit masks, 8-bit values, seeds.

Their forward passes are torch's own. Their gradients are torch's own too, of the values that were kept:

=================  =========================================  ====================
operation          kept                                       gradient
=================  =========================================  ====================
ReLU               one bit per value                          exact
other activations  the input at 8 bits                        of the rounded input
LayerNorm          the input at 8 bits, mean and 1/deviation  of the rounded input
softmax            the probabilities at 8 bits but for the    of these
                   largest of each row
dropout            a seed                                     exact
=================  =========================================  ====================

Eight bits are block floating point with boxes along the last dimension, rounded to nearest: 17 bytes for 16 values.
Where the context's precision is float32, or nothing needs a gradient, torch's own operations run. What is kept here is
no operand of a GEMM, and the ledger does not count it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fairseq_dsq.formats import BlockFloat
from fairseq_dsq.nn.context import DSQContext
from fairseq_dsq.nn.functional import autocast_device
from fairseq_dsq.quant import Packed, ops, pack

KEPT = BlockFloat(8)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would keep anything of an operation on these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


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


class _Elementwise(torch.autograd.Function):
    """Any function of single values, computed again from the rounded input."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        packed = pack(x, KEPT)
        ctx.save_for_backward(packed.data)
        ctx.function, ctx.spec = function, packed.spec
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (data,) = ctx.saved_tensors
        x = Packed(data, *ctx.spec).unpack().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        return None, torch.autograd.grad(y, x, grad.to(y.dtype))[0]


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shape: tuple[int, ...], eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        packed = pack(x, KEPT)
        ctx.save_for_backward(packed.data, mean, rstd, weight, bias)
        ctx.spec, ctx.shape = packed.spec, shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        data, mean, rstd, weight, bias = ctx.saved_tensors
        x = Packed(data, *ctx.spec).unpack()
        arguments = grad, x, ctx.shape, mean, rstd, weight, bias, ctx.needs_input_grad[2:]
        return None, None, *torch.ops.aten.native_layer_norm_backward(*arguments)


def pack_probabilities(probabilities: Tensor) -> tuple[Packed, Tensor, Tensor]:
    """Probabilities (..., N), which are changed, at 8 bits but for the largest of each row.

    Where one probability is nearly 1, the gradient is made of what it lacks and of the small ones beside it, all finer
    than the steps of 8 bits near 1: the largest is kept as it is, and does not share a box with the others.

    Returns:
        The others packed, the largest, and their places (int32), both (..., 1).
    """
    largest, place = probabilities.max(-1, keepdim=True)
    return pack(probabilities.scatter_(-1, place, 0.0), KEPT), largest, place.int()


def unpack_probabilities(packed: Packed, largest: Tensor, place: Tensor) -> Tensor:
    """What :func:`pack_probabilities` packed."""
    return packed.unpack().scatter_(-1, place.long(), largest)


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
        probabilities = unpack_probabilities(Packed(data, *ctx.spec), *largest)
        grad_scores: Tensor = torch.ops.aten._softmax_backward_data(grad, probabilities, -1, torch.float32)
        return grad_scores


def softmax(x: Tensor, context: DSQContext) -> Tensor:
    """``torch.softmax(x, -1, dtype=torch.float32)``."""
    if context.packs_everything and needs_gradient(x):
        return _Softmax.apply(x.float())  # type: ignore[no-any-return]
    return torch.softmax(x, -1, dtype=torch.float32)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.arguments = p, 1 / (1 - p) if p < 1 else 0.0, seed
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
        if needs_gradient(x):
            if self.function in _RELU and self.context.packs:
                return _ReLU.apply(x)  # type: ignore[no-any-return]
            if self.function not in _RELU and self.context.packs_everything:
                return _Elementwise.apply(self.function, x)  # type: ignore[no-any-return]
        return self.function(x)


_RELU = (nn.functional.relu, torch.relu)
_ELEMENTWISE = (nn.functional.gelu, nn.functional.silu, nn.functional.sigmoid, torch.tanh, nn.functional.tanh)
# By name, since only the registrations import fairseq.
_FAIRSEQ_ELEMENTWISE = {
    ("fairseq.modules.gelu", "gelu"),
    ("fairseq.modules.gelu", "gelu_accurate"),
    ("fairseq.utils", "relu_squared"),
}


def is_known_activation(function: Any) -> TypeGuard[Callable[[Tensor], Tensor]]:
    """Whether :class:`Activation` may take the place of ``function``."""
    name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    return function in (*_RELU, *_ELEMENTWISE) or name in _FAIRSEQ_ELEMENTWISE


class DSQLayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` (same parameters, same names) that keeps its input at 8 bits."""

    context: DSQContext

    @classmethod
    def from_float(cls, module: nn.LayerNorm, context: DSQContext) -> DSQLayerNorm:
        """The twin of ``module``, holding its very parameters."""
        twin = cls(module.normalized_shape, module.eps, elementwise_affine=False)
        twin.elementwise_affine = module.elementwise_affine
        twin.weight, twin.bias = module.weight, module.bias
        twin.context = context
        return twin.train(module.training)

    def forward(self, input: Tensor) -> Tensor:
        tensors: list[Tensor | None] = [input, self.weight, self.bias]
        # Autocast may have the operation run in another dtype: that differs from device to device.
        autocast = torch.is_autocast_enabled(autocast_device(input))
        if autocast or not self.context.packs_everything or not needs_gradient(*tensors):
            return super().forward(input)
        return _LayerNorm.apply(self.normalized_shape, self.eps, *tensors)  # type: ignore[no-any-return]


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
        active = self.module.training or getattr(self.module, "apply_during_inference", False)
        if not (active and self.module.p > 0 and self.context.packs_everything):
            return self.module(x)  # type: ignore[no-any-return]
        return dropout(x, self.module.p)
