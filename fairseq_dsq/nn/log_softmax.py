"""The log-softmax over a vocabulary, of which nothing is kept for backward but the probabilities at 8 bits.

The largest tensors of a step are tokens x vocabulary. torch keeps the log-probabilities twice over: for the gradient of
the log-softmax, and for those of ``gather`` and ``nll_loss``, which read nothing of them but their shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fairseq_dsq.nn.context import DSQContext
from fairseq_dsq.nn.saved import needs_gradient, pack_probabilities, unpack_probabilities
from fairseq_dsq.quant import Packed

# Rows go through the caches in pieces of about so many values: a second float copy would show in the peak.
VALUES_PER_PIECE = 1 << 18


class _LogSoftmax(torch.autograd.Function):
    """Along the last dimension, float32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        y = torch.log_softmax(logits, -1)
        pieces = [pack_probabilities(piece.exp()) for piece in _pieces(y)]
        ctx.save_for_backward(*(tensor for packed, *largest in pieces for tensor in (packed.data, *largest)))
        ctx.specs = [packed.spec for packed, *_ in pieces]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad_logits: Tensor = torch.empty_like(grad, memory_format=torch.contiguous_format)
        saved = iter(ctx.saved_tensors)
        for spec, target, source in zip(ctx.specs, _pieces(grad_logits), _pieces(grad), strict=True):
            probabilities = unpack_probabilities(Packed(next(saved), *spec), next(saved), next(saved))
            torch.sub(source, probabilities.mul_(source.sum(-1, keepdim=True)), out=target)
        return grad_logits


def _pieces(x: Tensor) -> Sequence[Tensor]:
    """Rows of a tensor (..., N); views of a contiguous one."""
    pieces: Sequence[Tensor] = x.flatten(0, -2).split(max(1, VALUES_PER_PIECE // max(1, x.shape[-1])))
    return pieces


class _Gather(torch.autograd.Function):
    """``x.gather(dim, index)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.dim = x.shape, dim
        return x.gather(dim, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter_add_(ctx.dim, index, grad), None, None


class _LogProbabilities(Tensor):
    """Log-probabilities that know how to be gathered, as fairseq's criteria do, without being kept.

    Views are of this class too; what else is computed from it is a plain tensor, by torch's own operation.
    """

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function in _GATHERS:
                return _gather(*args, **kwargs)
            if function is nn.functional.nll_loss:
                return _nll_loss(*args, **kwargs)
            result = function(*args, **kwargs)
        return result.as_subclass(cls) if function in _VIEWS else result


_GATHERS = (Tensor.gather, torch.gather)
_VIEWS = (Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.contiguous, Tensor.transpose, Tensor.__getitem__)


def _gather(x: Tensor, dim: int, index: Tensor, sparse_grad: bool = False) -> Tensor:
    if sparse_grad or not needs_gradient(x):
        return torch.gather(x, dim, index, sparse_grad=sparse_grad)
    return _Gather.apply(x.as_subclass(Tensor), dim, index)  # type: ignore[no-any-return]


def _nll_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    plain = weight is None and size_average is None and reduce is None and x.dim() == 2
    if plain and needs_gradient(x):
        # The same loss of what the targets pick: each token has a vocabulary of one word, its target.
        ignored = target == ignore_index
        x = _Gather.apply(x.as_subclass(Tensor), 1, target.masked_fill(ignored, 0)[:, None])
        target, ignore_index = torch.zeros_like(target).masked_fill_(ignored, -100), -100
    return nn.functional.nll_loss(x, target, weight, size_average, ignore_index, reduce, reduction)


def log_softmax(x: Tensor, context: DSQContext) -> Tensor:
    """``torch.log_softmax(x, -1, dtype=torch.float32)``, of tokens over a vocabulary."""
    if context.packs_everything and needs_gradient(x):
        return _LogSoftmax.apply(x.float()).as_subclass(_LogProbabilities)  # type: ignore[no-any-return]
    return torch.log_softmax(x, -1, dtype=torch.float32)
