"""DSQLinear: nn.Linear with quantized GEMMs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fairseq_dsq.nn.context import DSQContext
from fairseq_dsq.nn.functional import linear_group, record_linear
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
        self._inference_weight: tuple[PrecisionConfig, int, Tensor] | None = None

    @classmethod
    def from_float(cls, module: nn.Linear, context: DSQContext) -> DSQLinear:
        """The twin of ``module``, holding its very parameters (so that ties survive)."""
        twin = cls(module.in_features, module.out_features, context, module.bias is not None, device="meta")
        twin.weight, twin.bias = module.weight, module.bias
        return twin.train(module.training)

    def train(self, mode: bool = True) -> DSQLinear:
        # An optimizer may write through .data, which leaves the version counter as it is.
        self._inference_weight = None
        return super().train(mode)

    def _quantized_weight(self, precision: PrecisionConfig) -> Tensor:
        """The output GEMM's weight operand, kept between the steps of a decoder."""
        held = self._inference_weight
        if held is None or held[0] != precision or held[1] != self.weight._version:
            config = self.context.for_mode(training=False)
            quantized = fake_quantize(self.weight, precision.output_operands, config.dim(-1))
            held = self._inference_weight = (precision, self.weight._version, quantized)
        return held[2]

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        return forward_group(input, [self])[0]

    def infer(self, quantized: Tensor) -> Tensor:
        """Forward of an already quantized input where nothing needs a gradient and the weight does not change."""
        precision = self.context.config.precision
        record_linear(self.context.ledger, self.context.config, quantized.shape[:-1].numel(), self.weight, False, False)
        return nn.functional.linear(quantized, self._quantized_weight(precision), self.bias)


def forward_group(x: Tensor, layers: Sequence[DSQLinear]) -> list[Tensor]:
    """Outputs of several layers of one context on one input, quantized and stashed once."""
    first = layers[0]
    context = first.context
    if not torch.is_grad_enabled() and not first.training and not torch.is_autocast_enabled(x.device.type):
        config = context.for_mode(training=False)
        quantized = fake_quantize(x, config.precision.output_operands, -1)
        return [layer.infer(quantized) for layer in layers]
    params = [(layer.weight, layer.bias) for layer in layers]
    return list(linear_group(x, params, context.for_mode(first.training), context.ledger))
