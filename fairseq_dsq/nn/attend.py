"""Attention between its projections in one autograd function that keeps nothing of T x S: scores are computed twice.

::

    forward:   scores = q @ k^T;  p = softmax(mask(scores));  d = dropout(p);  y = d @ v
    kept:      the output GEMM's operands of q and k (at q0), the stashes of q, k and v, a seed
    backward:  scores, p and d again, bit for bit, the stash of d from them; then the gradients of both products

Instead of p at 8 bits and the stash of d, T x S each, T x C and S x C are kept, and the gradient of softmax is exact.
The repeated GEMM and softmax are the price, as with activation checkpointing; the idea is FlashAttention's (arXiv
2205.14135, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_dsq.kernels import ops
from fairseq_dsq.ledger import Ledger
from fairseq_dsq.nn.context import GemmConfig
from fairseq_dsq.nn.functional import Product, outside_autocast
from fairseq_dsq.nn.saved import KEPT, keep_rate_inverse
from fairseq_dsq.quantized import QuantizedTensor


class Masks(NamedTuple):
    """What hides keys.

    Attributes:
        additive: T x S, or None.
        padding: B x S, nonzero where a key is padding, or None.
        order: B x S, where the keys are not as they came, or None.
    """

    additive: Tensor | None
    padding: Tensor | None
    order: Tensor | None

    @classmethod
    def of(cls, attn_mask: Tensor | None, padding: Tensor | None, order: Tensor | None, q: Tensor, k: Tensor) -> Masks:
        """Of attention's arguments, q T x B x C and k B x heads x S x head_dim; a bool mask hides where it is true.

        Raises:
            ValueError: an ``attn_mask`` of another shape than T x S, or of integers.
        """
        if attn_mask is not None:
            expected = len(q), k.shape[2]
            hides = attn_mask.dtype is torch.bool
            if attn_mask.shape != expected or not (hides or attn_mask.is_floating_point()):
                raise ValueError(
                    f"attn_mask: got {attn_mask.dtype} of shape {tuple(attn_mask.shape)}, expected T x S, {expected}: "
                    "floats that are added to the scores, or bools, true where a key is hidden"
                )
            if hides:
                attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask, -torch.inf)
        return cls(attn_mask, padding, order)

    def apply(self, scores: Tensor, hidden: float) -> Tensor:
        """Scores B x heads x beam x T x S, masked; padded keys get ``hidden``."""
        if self.additive is not None:
            # T x S, or B x 1 x 1 x T x S with the keys in each sentence's order.
            ordered = self.order is not None
            scores = scores + (
                self.additive[:, self.order].transpose(0, 1)[:, None, None] if ordered else self.additive
            )
        return scores if self.padding is None else scores.masked_fill(self._padded(), hidden)

    def _padded(self) -> Tensor:
        assert self.padding is not None
        return self.padding.bool()[:, None, None, None]

    def of_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of the scores, of the masked ones'."""
        return grad if self.padding is None else grad.masked_fill_(self._padded(), 0.0)


def repeats_for_less(config: GemmConfig, q: Tensor, k: Tensor) -> bool:
    """Whether the operands of q (batch, T, D) and k (batch, S, D) take fewer bytes than what they make unnecessary."""
    probabilities = (*q.shape[:2], k.shape[1])
    rows = q.shape[:2].numel()
    largest = 8 * rows  # and their places
    made_unnecessary = KEPT.nbytes(probabilities) + largest
    made_unnecessary += config.precision.stash("input").nbytes(probabilities, config.dim(-2))
    first, second = config.precision.operands("output")
    return first.nbytes(q.shape, config.dim(-1)) + second.nbytes(k.shape, config.dim(-1)) < made_unnecessary


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        config: GemmConfig,
        ledger: Ledger | None,
        shape: tuple[int, ...],
        hidden: float,
        p: float,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *masks: Tensor | None,
    ) -> Tensor:
        scores, first, kept_of_scores = Product.run(config, ledger, q, k, (True, True), transpose_b=True)
        operands = first.pack_operands(q, k)
        probabilities = _softmax(scores, shape, Masks(*masks), hidden)
        dropping = (p, keep_rate_inverse(p), int(torch.randint(2**62, ()))) if p else None
        d = _dropped(probabilities, dropping, q)
        y, second, (_, kept_of_v) = Product.run(config, ledger, d, v, (False, True), apart=True, a_comes_again=True)
        ctx.save_for_backward(*kept_of_scores, kept_of_v, *(operand.data for operand in operands), *masks)
        ctx.products, ctx.specs = (first, second), [operand.spec for operand in operands]
        ctx.arguments = shape, hidden, dropping
        return y

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept_of_q, kept_of_k, kept_of_v, first_operand, second_operand, *tensors = ctx.saved_tensors
        (first, second), (shape, hidden, dropping), masks = ctx.products, ctx.arguments, Masks(*tensors)
        packed = (
            QuantizedTensor(data, *spec) for data, spec in zip((first_operand, second_operand), ctx.specs, strict=True)
        )
        scores = first.repeat(list(packed))
        probabilities = _softmax(scores, shape, masks, hidden)
        d = _dropped(probabilities, dropping, scores)
        grad_d, grad_v = second.grads((None, kept_of_v), grad, d)
        grad_p = grad_d if dropping is None else ops.dropout(grad_d, *dropping)
        grad_scores = torch.ops.aten._softmax_backward_data(
            grad_p.view(shape).float(), probabilities, -1, torch.float32
        )
        grad_scores = masks.of_gradient(grad_scores).view(scores.shape).to(scores.dtype)
        grad_q, grad_k = first.grads((kept_of_q, kept_of_k), grad_scores)
        return None, None, None, None, None, grad_q, grad_k, grad_v, None, None, None


def _softmax(scores: Tensor, shape: tuple[int, ...], masks: Masks, hidden: float) -> Tensor:
    return torch.softmax(masks.apply(scores.view(shape), hidden), -1, dtype=torch.float32)


def _dropped(probabilities: Tensor, dropping: tuple[float, float, int] | None, like: Tensor) -> Tensor:
    """(batch, T, S) in the dtype of ``like``."""
    d = probabilities.to(like.dtype)
    d = d if dropping is None else ops.dropout(d, *dropping)
    return d.view(len(like), -1, d.shape[-1])


attend: Callable[..., Tensor] = _Attend.apply
