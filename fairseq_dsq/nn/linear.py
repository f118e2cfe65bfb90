"""DSQLinear: nn.Linear with quantized GEMMs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_dsq.nn.context import DSQContext
from fairseq_dsq.nn.functional import autocast_device, linear_group, record_linear
from fairseq_dsq.precision import PrecisionConfig
from fairseq_dsq.quant import fake_quantize


class DSQLinear(nn.Linear):
    """``nn.Linear`` (same parameters, same names) whose GEMMs follow a :class:`DSQContext`.

    Args:
        in_features: K.
        out_features: N.
        context: the model's precision and ledger.
        bias, device, dtype: as for nn.Linear.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        context: DSQContext,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.context = context
        self.number = context.number_layer()
        # The quantized weight and what it was made from; see _quantized_weight.
        self._inference_weight: tuple[PrecisionConfig, Tensor, int, Tensor] | None = None

    @classmethod
    def from_float(cls, module: nn.Linear, context: DSQContext) -> DSQLinear:
        """The twin of ``module``, holding its very parameters (so that ties survive)."""
        twin = cls(module.in_features, module.out_features, context, module.bias is not None, device="meta")
        twin.weight, twin.bias = module.weight, module.bias
        return twin.train(module.training)

    # Optimizers and casts write through .data, which leaves a weight's version as it is: what is held is dropped when
    # the mode or the dtype changes, and does not travel with a copy.
    def train(self, mode: bool = True) -> DSQLinear:
        self._inference_weight = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DSQLinear:
        self._inference_weight = None
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inference_weight": None}

    def _quantized_weight(self, precision: PrecisionConfig) -> Tensor:
        """The output GEMM's weight operand, held between the steps of a decoder."""
        weight = self.weight
        version = -1 if weight.is_inference() else weight._version
        held = self._inference_weight
        if held is not None and version >= 0 and held[0] == precision and held[1] is weight and held[2] == version:
            return held[3]
        dim = self.context.for_mode(training=False).dim(-1)
        quantized = fake_quantize(weight, precision.output_operands, dim)
        self._inference_weight = (precision, weight, version, quantized)
        return quantized

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        return forward_group(input, [self])[0]

    def infer(self, quantized: Tensor) -> Tensor:
        """Forward of an already quantized input where nothing needs a gradient and the weight does not change."""
        precision = self.context.config.precision
        record_linear(self.context.ledger, self.context.config, quantized.shape[:-1].numel(), self.weight, False)
        return nn.functional.linear(quantized, self._quantized_weight(precision), self.bias)


def forward_group(x: Tensor, layers: Sequence[DSQLinear]) -> list[Tensor]:
    """Outputs of several layers of one context on one input, quantized and stashed once."""
    first = layers[0]
    context = first.context
    if not torch.is_grad_enabled() and not first.training and not torch.is_autocast_enabled(autocast_device(x)):
        config = context.for_mode(training=False)
        quantized = fake_quantize(x, config.precision.output_operands, -1)
        return [layer.infer(quantized) for layer in layers]
    params = [(layer.weight, layer.bias) for layer in layers]
    numbers = [layer.number for layer in layers]
    return list(linear_group(x, params, context.for_mode(first.training), context.ledger, numbers))
