"""Linear layers with quantized GEMMs: DSQLinear, an nn.Linear, and DSQConv1D, GPT-2's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fairseq_dsq.gemm import Operand, Plan, Side, plan
from fairseq_dsq.nn.coded import CodedWeight
from fairseq_dsq.nn.context import DSQContext, GemmConfig
from fairseq_dsq.nn.functional import as_rows, autocast_device, linear_group, record_linear, rounded_operand


class DSQLinear(nn.Linear):
    """``nn.Linear`` (same parameters, same names) whose GEMMs follow a :class:`DSQContext`.

    Args:
        in_features: K.
        out_features: N.
        context: the model's precision and ledger.
        bias, device, dtype: as for nn.Linear.
    """

    # See fairseq_dsq.nn.convert.left_float.
    products_are_quantized = True

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
        # Whether the weight is declared final.
        self.frozen = False
        # Of a frozen layer: what the weight was quantized for, the weight, and its quantized values.
        self._held: tuple[GemmConfig, Tensor, Operand] | None = None

    @classmethod
    def from_float(cls, module: Any, context: DSQContext) -> Self:
        """The twin of ``module``, holding its very parameters (so that ties survive)."""
        twin = cls(module.in_features, module.out_features, context, module.bias is not None, device="meta")
        twin.weight, twin.bias = module.weight, module.bias
        return twin.train(module.training)

    @property
    def matrix(self) -> Tensor:
        """The weight, N x K."""
        return self.weight

    @property
    def coded(self) -> CodedWeight | None:
        """The weight where it is held as codes; None for a float."""
        return None

    @property
    def config(self) -> GemmConfig:
        """How its GEMMs are quantized now."""
        return self.context.for_mode(self.training)

    def alike(self, other: DSQLinear) -> bool:
        """Whether two layers have one configuration, whatever the level."""
        return self.context is other.context and type(self) is type(other)

    def freeze(self) -> None:
        """Declare the weight final: in evaluation without gradients its quantized values are computed once and held.

        Nothing notices a write to a weight that is declared final. ``train()`` takes the declaration back, and no copy
        inherits it; a load, a cast or move, another weight and another precision have the values computed anew.
        """
        self.frozen = True

    def make_generation_fast_(self, **options: Any) -> None:
        """fairseq's commands that only generate or evaluate call this once the model is loaded."""
        self.freeze()

    def train(self, mode: bool = True) -> Self:
        self._held = None
        self.frozen = self.frozen and not mode
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._held = None
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def _load_from_state_dict(self, *args: Any) -> None:
        self._held = None
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "frozen": False, "_held": None}

    def _held_weight(self, config: GemmConfig, output: Plan) -> Operand:
        """The output GEMM's weight operand, held between the steps of a decoder."""
        if self._held is None or self._held[0] != config or self._held[1] is not self.weight:
            self._held = config, self.weight, rounded_operand(self.matrix, output, 1, config)
        return self._held[2]

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        return forward_group(input, [self])[0]

    def _infer(self, x: Operand, output: Plan, config: GemmConfig) -> Tensor:
        """Forward of an already quantized input by the held weight."""
        record_linear(self.context.ledger, config, x.tensor.shape[-2], self.matrix.shape, False)
        return output.multiply(x, self._held_weight(config, output), self.bias)


class DSQConv1D(DSQLinear):
    """Hugging Face's ``Conv1D`` (GPT-2's linear layer, whose weight is K x N) with quantized GEMMs.

    Its attributes are that class's own: ``nx`` is K, ``nf`` is N.
    """

    @classmethod
    def from_float(cls, module: Any, context: DSQContext) -> Self:
        """The twin of ``module``, holding its very parameters."""
        nx, nf = module.weight.shape
        twin = cls(nx, nf, context, device="meta")
        twin.weight, twin.bias = module.weight, module.bias
        twin.nx, twin.nf = nx, nf
        return twin.train(module.training)

    @property
    def matrix(self) -> Tensor:
        return self.weight.t()


def forward_group(x: Tensor, layers: Sequence[DSQLinear]) -> list[Tensor]:
    """Outputs of several layers of one configuration on one input, quantized and stashed once."""
    first = layers[0]
    config = first.config
    autocast = torch.is_autocast_enabled(autocast_device(x))
    if all(layer.frozen for layer in layers) and not (torch.is_grad_enabled() or first.training or autocast):
        side, weight_side = (Side(fmt, config.dim(-1) == -1) for fmt in config.precision.operands("output"))
        output = plan(side, weight_side, x.device, x.dtype, "float32")
        operand = rounded_operand(as_rows(x), output, 0, config)
        outputs = (layer._infer(operand, output, config).to(x.dtype) for layer in layers)
        return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]
    params = [(layer.matrix, layer.bias) for layer in layers]
    numbers, coded = [layer.number for layer in layers], [layer.coded for layer in layers]
    context = first.context
    return list(linear_group(x, params, config, context.ledger, numbers, coded, context.together))
