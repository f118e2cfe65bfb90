"""The log-softmax over a vocabulary, of which nothing is kept for backward but the probabilities at 8 bits.

The largest tensors of a step are tokens x vocabulary. torch keeps the log-probabilities twice over: for the gradient of
the log-softmax, and for those of ``gather`` and ``nll_loss``, which read nothing of them but their shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fairseq_dsq.nn.context import DSQContext
from fairseq_dsq.nn.saved import keeps_less, needs_gradient, pack_probabilities, pieces, unpack_probabilities
from fairseq_dsq.quantized import QuantizedTensor


class _LogSoftmax(torch.autograd.Function):
    """Along the last dimension, float32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        y = torch.log_softmax(logits, -1)
        kept = [pack_probabilities(piece.exp()) for piece in pieces(y)]
        ctx.save_for_backward(*(tensor for packed, *largest in kept for tensor in (packed.data, *largest)))
        ctx.specs = [packed.spec for packed, *_ in kept]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad_logits: Tensor = torch.empty_like(grad, memory_format=torch.contiguous_format)
        saved = iter(ctx.saved_tensors)
        for spec, target, source in zip(ctx.specs, pieces(grad_logits), pieces(grad), strict=True):
            probabilities = unpack_probabilities(QuantizedTensor(next(saved), *spec), next(saved), next(saved))
            # Not divided by their sum, as softmax's are: of one near 1 the gradient is what it lacks, which is
            # less than a float32 sum errs by.
            torch.sub(source, probabilities.mul_(source.sum(-1, keepdim=True)), out=target)
        return grad_logits


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
            result = _short_way(function, args, kwargs)
            if result is None:
                result = function(*args, **kwargs)
        return result.as_subclass(cls) if function in _VIEWS else result


_VIEWS = (Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.contiguous, Tensor.transpose, Tensor.__getitem__)


def _short_way(function: Any, args: Any, kwargs: Any) -> Tensor | None:
    """What ``function`` gives, its gradient by :class:`_Gather`; None where torch's own is to run, or to refuse."""
    way = _SHORT_WAYS.get(function)
    if way is None:
        return None
    try:
        bound = inspect.signature(way).bind(*args, **kwargs)
    except TypeError:
        return None
    return way(*bound.args, **bound.kwargs)


# These have the names and the order of torch's own arguments.


def _gather(input: Tensor, dim: int, index: Tensor) -> Tensor | None:
    if not needs_gradient(input) or not isinstance(dim, int):
        return None
    return _Gather.apply(input.as_subclass(Tensor), dim, index)  # type: ignore[no-any-return]


def _nll_loss(
    input: Tensor,
    target: Tensor,
    weight: None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
) -> Tensor | None:
    unusual = any(option is not None for option in (weight, size_average, reduce))
    if unusual or input.dim() != 2 or target.shape != input.shape[:1] or not needs_gradient(input):
        return None
    # The same loss of what the targets pick: each token has a vocabulary of one word, its target.
    ignored = target == ignore_index
    picked = _Gather.apply(input.as_subclass(Tensor), 1, target.long().masked_fill(ignored, 0)[:, None])
    first = torch.zeros_like(target, dtype=torch.int64).masked_fill_(ignored, -100)
    return nn.functional.nll_loss(picked, first, reduction=reduction)


_SHORT_WAYS: dict[Any, Callable[..., Tensor | None]] = {
    Tensor.gather: _gather,
    torch.gather: _gather,
    nn.functional.nll_loss: _nll_loss,
}


def log_softmax(x: Tensor, context: DSQContext) -> Tensor:
    """``torch.log_softmax(x, -1, dtype=torch.float32)``, of tokens over a vocabulary."""
    if keeps_less(context, x):
        return _LogSoftmax.apply(x.float()).as_subclass(_LogProbabilities)  # type: ignore[no-any-return]
    return torch.log_softmax(x, -1, dtype=torch.float32)
