"""Peers, as plain torch; qtorch itself where it is installed. All round blocks of 16 along the last dimension."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fairseq_dsq.formats import DEFAULT_BOX_SIZE

Quantize = Callable[[Tensor, int], Tensor]


def naive(x: Tensor, bits: int) -> Tensor:
    """Block floating point as one writes it down in torch."""
    boxes = x.reshape(-1, DEFAULT_BOX_SIZE)
    largest = boxes.abs().amax(dim=1, keepdim=True).clamp(min=2.0**-126)
    scale = torch.exp2(torch.floor(torch.log2(largest)) - (bits - 2))
    limit = 2 ** (bits - 1) - 1
    return (torch.round(boxes / scale).clamp(-limit, limit) * scale).reshape(x.shape)


def microxcaling_style(x: Tensor, bits: int) -> Tensor:
    """The passes that microxcaling's emulation of an MX format takes (Rouhani et al., arXiv 2310.10537)."""
    boxes = x.unflatten(-1, (-1, DEFAULT_BOX_SIZE))
    exponent = boxes.abs().amax(dim=-1, keepdim=True)
    exponent = torch.floor(torch.log2(exponent + 2.0**-126 * (exponent == 0).to(x.dtype)))
    exponent = torch.where(exponent < -127, torch.full_like(exponent, -127), exponent)
    scaled = boxes / 2**exponent * 2.0 ** (bits - 2)
    rounded = torch.sign(scaled) * torch.floor(torch.abs(scaled) + 0.5)
    limit = 2 ** (bits - 1) - 1
    clamped = torch.clamp(rounded, -limit, limit) / 2.0 ** (bits - 2)
    result = clamped * 2**exponent
    result = torch.where(torch.isinf(boxes), boxes, result)
    return result.flatten(-2).contiguous()


def qtorch(x: Tensor, bits: int) -> Tensor:
    from qtorch.quant import block_quantize

    rounded: Tensor = block_quantize(x.view(-1, DEFAULT_BOX_SIZE), wl=bits, dim=0, rounding="nearest")
    return rounded.view(x.shape)


def all_peers(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Quantize]:
    """By name; qtorch for float32 on the CPU alone: elsewhere it compiles an extension, and it takes no other dtype."""
    peers: dict[str, Quantize] = {"naive torch": naive, "microxcaling-style": microxcaling_style}
    return peers | (
        {"qtorch": qtorch} if (device, dtype) == ("cpu", torch.float32) and importlib.util.find_spec("qtorch") else {}
    )


class PeerLinear(torch.autograd.Function):
    """A linear layer as emulators train it: rounded copies, and the input kept in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, quantize: Callable[[Tensor, int], Tensor], q: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.quantize, ctx.q = quantize, q
        return quantize(x, q[0]) @ quantize(weight, q[0]).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        quantize, (_, q1, q2, q3) = ctx.quantize, ctx.q
        # Each operand along the dimension that its GEMM sums over.
        grad_x = quantize(grad, q3) @ quantize(weight.t().contiguous(), q2).t()
        grad_weight = quantize(grad.t().contiguous(), q3) @ quantize(x.t().contiguous(), q1).t()
        return grad_x, grad_weight, None, None
