"""Linear layers and batched matrix products whose three GEMMs and stash are quantized.

One training step of ``y = x @ W^T`` with x: M x K, W: N x K, precision [q0, q1, q2, q3]::

    output:       fq(x, q0, dim=K) @ fq(W, q0, dim=K)^T           MxK @ KxN => MxN
    stash:        pack(x, q1, dim=M)                              the only copy of x kept for backward
    grad_input:   fq(dy, q3, dim=N) @ fq(W, q2, dim=N)            MxN @ NxK => MxK
    grad_weight:  fq(dy, q3, dim=M)^T @ unpack(stash)             NxM @ MxK => NxK
    grad_bias:    sum of dy over M, unquantized

Boxes lie along the reduction dimension of the GEMM that reads them. Source: arXiv 2303.05295, Figure 2 and section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_dsq import formats
from fairseq_dsq.formats import Float32, Format, ScaledInteger
from fairseq_dsq.nn.context import GemmConfig, Ledger
from fairseq_dsq.nn.gemm import Arithmetic, Operand, arithmetic, multiply, rounds_on_the_way
from fairseq_dsq.precision import StashRole
from fairseq_dsq.quant import Packed, fake_quantize, pack, quantize_and_pack

# The exponent of a float32, and of the least and the largest power of two among the normal ones.
_EXPONENT, _NORMAL = 0x7F800000, (1 << 23, 254 << 23)
# What is added to a call's seed for those who draw beside the forward's operands; ranks and layers lie further apart.
_BACKWARD, _STASH, _APART = 1, 2, 4


class _Seeds(NamedTuple):
    """Where one call's stochastic rounding starts.

    Attributes:
        values: of inputs and gradients; data-parallel replicas hold other ones, and draw other noise.
        weight: of weights, of which replicas hold the same and draw the same noise.
    """

    values: int
    weight: int

    def backward(self) -> _Seeds:
        """Those of the call's backward pass."""
        return _Seeds(self.values + _BACKWARD, self.weight + _BACKWARD)


def _draw_seeds(config: GemmConfig) -> _Seeds | None:
    """One draw from torch's default generator per call, whatever the call will round; None where nothing is drawn.

    Reentrant checkpointing runs a forward without grad, which stashes nothing, and repeats it from the same generator
    state: the second must draw what the first did. The generators of replicas part as soon as one has a longer batch
    to drop out of; the seed that all of them were given (by fairseq, anew for every update) does not.
    """
    if config.rounding != "stochastic":
        return None
    drawn = int(torch.randint(2**62, ()))
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed:
        return _Seeds(drawn, drawn + _STASH + _BACKWARD)
    return _Seeds(drawn + _APART * torch.distributed.get_rank(), torch.initial_seed() % 2**62)


class _Quantizer:
    """Quantizes the operands of one call's forward or backward.

    Stashes draw from a generator of their own: a forward without grad, which keeps none, must draw for its operands
    what one under grad does. So do weights.

    Args:
        config: what the operands are rounded to.
        seeds: of the forward, or of the backward.
    """

    def __init__(self, config: GemmConfig, seeds: _Seeds | None) -> None:
        self.config = config
        self.seeds = seeds
        self.generator = self.stash_generator = None
        if seeds is not None:
            self.generator = torch.Generator().manual_seed(seeds.values)
            self.stash_generator = torch.Generator().manual_seed(seeds.values + _STASH)

    def _boxed(self, reduction: int) -> bool:
        return self.config.dim(reduction) == reduction

    def _left_to_gemm(self, fmt: Format, reduction: int, how: Arithmetic) -> bool:
        return self.generator is None and self._boxed(reduction) and rounds_on_the_way(fmt, how)

    def arithmetic(self, x: Tensor, a: Format, b: Format, a_reduction: int, b_reduction: int) -> Arithmetic:
        """What multiplies two operands; ``x`` is any of them."""
        boxed = self._boxed(a_reduction) and self._boxed(b_reduction)
        return arithmetic(x, a, b, self.config.gemm, boxed)

    def operand(self, x: Tensor, fmt: Format, reduction: int, how: Arithmetic) -> Operand:
        """An operand of a GEMM that sums over ``reduction``; left to the GEMM if that rounds on the way."""
        return self._operand(x, fmt, reduction, how, self.generator)

    def weight(self, weight: Tensor, layer: int, fmt: Format, reduction: int, how: Arithmetic) -> Operand:
        """The same of a weight; ``layer`` tells it from the model's others."""
        generator = None
        if self.seeds is not None:
            generator = torch.Generator().manual_seed(self.seeds.weight + _APART * layer)
        return self._operand(weight, fmt, reduction, how, generator)

    def _operand(
        self, x: Tensor, fmt: Format, reduction: int, how: Arithmetic, generator: torch.Generator | None
    ) -> Operand:
        if not self._left_to_gemm(fmt, reduction, how):
            x = fake_quantize(x, fmt, self.config.dim(reduction), self.config.rounding, generator)
        return Operand(x, fmt, reduction, self._boxed(reduction))

    def stashed(self, stash: Packed | None, fmt: Format, reduction: int) -> Operand | None:
        """A stash as an operand."""
        return None if stash is None else Operand(stash.unpack(), fmt, reduction, self._boxed(reduction))

    def pack(self, x: Tensor, role: StashRole, reduction_dim: int, ledger: Ledger | None) -> Packed:
        fmt, dim = self.config.precision.stash_format(role), self.config.dim(reduction_dim)
        packed = pack(x, fmt, dim, self.config.rounding, self.stash_generator)
        self._record(packed, role, ledger)
        return packed

    def _record(self, packed: Packed, role: StashRole, ledger: Ledger | None) -> None:
        if ledger is not None:
            ledger.record_stash(role, tuple(packed.shape), packed.dim, self.config.precision, packed.nbytes)

    def operand_and_stash(
        self, x: Tensor, stash: bool, how: Arithmetic, ledger: Ledger | None
    ) -> tuple[Operand, Packed | None]:
        """A GEMM's first operand (..., M, K), and what is kept of it for grad_weight if ``stash``; read together."""
        precision = self.config.precision
        fmt = precision.output_operands
        left_to_gemm = self._left_to_gemm(fmt, -1, how)
        if left_to_gemm or not stash or isinstance(fmt, Float32) or self.generator is not None:
            operand = self.operand(x, fmt, -1, how)
            return operand, self.pack(x, "input", -2, ledger) if stash else None
        dims = self.config.dim(-1), self.config.dim(-2)
        rounded, packed = quantize_and_pack(x, fmt, precision.stash, *dims)
        self._record(packed, "input", ledger)
        return Operand(rounded, fmt, -1, self._boxed(-1)), packed

    def rows_apart(self, a: Tensor, b: Tensor, fmt: ScaledInteger) -> tuple[Operand, Operand]:
        """Operands of a (..., M, K) @ b (..., K, N) in which no two rows of b share an exponent.

        ``value_boxes`` says how. ``row``: each row of b has one scale, which goes over to the column of a that it
        meets, so that b is integers and boxes lie along the reduction: a @ b = (a * scale^T) @ (b / scale).
        ``feature``: the boxes of b lie along N.
        """
        rounding, generator = self.config.rounding, self.generator
        # The exponents of float16 do not reach so far.
        if self.config.value_boxes == "feature" or b.dtype is torch.float16 or not b.numel():
            b = fake_quantize(b, fmt, -1, rounding, generator)
            how = arithmetic(a, fmt, fmt, self.config.gemm, boxed=False)
            return self.operand(a, fmt, -1, how), Operand(b, fmt, -2, boxed=False)
        largest = torch.maximum(b.amax(-1, keepdim=True), -b.amin(-1, keepdim=True)).float()
        exponents = (largest.view(torch.int32) + fmt.headroom & _EXPONENT).clamp_(*_NORMAL)
        scale = exponents.view(torch.float32).to(b.dtype)
        codes = fake_quantize(b, formats.per_row(fmt), -1, rounding, generator).mul_(1 / scale)
        how = self.arithmetic(a, fmt, fmt, -1, -2)
        # Integers stay what they are when the GEMM rounds them again, in boxes along the reduction.
        return self.operand(a * scale.mT, fmt, -1, how), Operand(codes, fmt, -2, self._boxed(-2))

    def backward_arithmetic(self, x: Tensor, n_dim: int) -> tuple[Arithmetic, Arithmetic]:
        """What multiplies in grad_input, whose weight has N as ``n_dim``, and in grad_weight; ``x`` is any operand."""
        precision = self.config.precision
        return (
            self.arithmetic(x, precision.grad_output, precision.grad_input_weight, -1, n_dim),
            self.arithmetic(x, precision.grad_output, precision.stash, -2, -2),
        )

    def grad_outputs(
        self, grad: Tensor, need: tuple[bool, bool], how: tuple[Arithmetic, Arithmetic]
    ) -> tuple[Operand | None, Operand | None]:
        """grad_output (..., M, N) for the GEMMs that reduce over N (grad_input) and over M (grad_weight), as needed."""
        fmt = self.config.precision.grad_output
        along_n = self.operand(grad, fmt, -1, how[0]) if need[0] else None
        if not need[1]:
            return along_n, None
        same_boxes = self.config.box_dim == "last" or fmt.box_size is None
        if same_boxes and along_n is not None and along_n.tensor is not grad:
            return along_n, Operand(along_n.tensor, fmt, -2, self._boxed(-2))
        return along_n, self.operand(grad, fmt, -2, how[1])


def _rows(x: Tensor) -> Tensor:
    """(..., N) as a matrix; any of the sizes may be 0, which leaves nothing for reshape's -1 to follow from."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _reshaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``x``, a new contiguous tensor, in another shape: no view, which autograd lets nobody change in place."""
    return torch.ops.aten._unsafe_view(x, shape)  # type: ignore[no-any-return]


def _packed(data: Tensor | None, spec: Any) -> Packed | None:
    return None if data is None else Packed(data, *spec)


class _Linear(torch.autograd.Function):
    """Several linear layers on one input, which is quantized and stashed once."""

    @staticmethod
    def forward(
        ctx: Any,
        config: GemmConfig,
        ledger: Ledger | None,
        grad_enabled: bool,
        layers: Sequence[int],
        x: Tensor,
        *params: Tensor | None,
    ) -> tuple[Tensor, ...]:
        precision = config.precision
        weights, biases = params[0::2], params[1::2]
        rows = _rows(x)
        needs_x = grad_enabled and ctx.needs_input_grad[4]
        needs_weight = [grad_enabled and need for need in ctx.needs_input_grad[5::2]]
        seeds = _draw_seeds(config)
        quantizer = _Quantizer(config, seeds)
        fmt = precision.output_operands
        how = quantizer.arithmetic(x, fmt, fmt, -1, -1)
        operand, stash = quantizer.operand_and_stash(rows, any(needs_weight), how, ledger)
        outputs = []
        for layer, weight, bias, needs in zip(layers, weights, biases, needs_weight, strict=True):
            assert weight is not None
            # output: MxK @ KxN => MxN
            y = multiply(operand, quantizer.weight(weight, layer, fmt, -1, how), config.gemm, bias)
            outputs.append(_reshaped(y, (*x.shape[:-1], y.shape[-1])))
            if ledger is not None:
                record_linear(ledger, config, len(rows), weight, needs_x or needs)
        ctx.config, ctx.seeds, ctx.layers, ctx.x_shape = config, seeds, layers, x.shape
        ctx.ledger, ctx.scope = ledger, ledger and ledger.scope
        ctx.set_materialize_grads(False)
        # The packed bytes go through save_for_backward, so that checkpointing and saved-tensor hooks see them.
        ctx.stash_spec = None if stash is None else stash.spec
        ctx.save_for_backward(None if stash is None else stash.data, *weights)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        config: GemmConfig = ctx.config
        precision = config.precision
        ledger: Ledger | None = ctx.ledger
        data, *weights = ctx.saved_tensors
        quantizer = _Quantizer(config, ctx.seeds and ctx.seeds.backward())
        stashed = quantizer.stashed(_packed(data, ctx.stash_spec), precision.stash, -2)
        how = quantizer.backward_arithmetic(weights[0], -2)
        grad_x: Tensor | None = None
        grad_params: list[Tensor | None] = []
        for index, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            needs_weight, needs_bias = ctx.needs_input_grad[5 + 2 * index : 7 + 2 * index]
            grad_weight: Tensor | None = None
            grad_bias: Tensor | None = None
            if grad is not None:
                rows = _rows(grad)
                m, n, k = *rows.shape, weight.shape[1]
                along_n, along_m = quantizer.grad_outputs(rows, (ctx.needs_input_grad[4], needs_weight), how)
                if along_n is not None:
                    # grad_input: MxN @ NxK => MxK
                    if ledger is not None:
                        ledger.record("grad_input", m, n, k, 1, precision, True, ctx.scope)
                    layer = ctx.layers[index]
                    operand = quantizer.weight(weight, layer, precision.grad_input_weight, -2, how[0])
                    grad_x = multiply(along_n, operand, config.gemm, add_to=grad_x)
                if along_m is not None:
                    assert stashed is not None
                    # grad_weight: NxM @ MxK => NxK, the transpose of KxM @ MxN => KxN
                    if ledger is not None:
                        ledger.record("grad_weight", k, m, n, 1, precision, True, ctx.scope)
                    grad_weight = multiply(along_m, stashed, config.gemm)
                if needs_bias:
                    grad_bias = rows.sum(0)
            grad_params += [grad_weight, grad_bias]
        return None, None, None, None, None if grad_x is None else _reshaped(grad_x, ctx.x_shape), *grad_params


def record_linear(ledger: Ledger, config: GemmConfig, rows: int, weight: Tensor, training: bool) -> None:
    """Report a linear layer's output GEMM on ``rows`` rows."""
    n, k = weight.shape
    ledger.record("output", rows, k, n, 1, config.precision, training)


def autocast_device(x: Tensor) -> str:
    """The device type whose autocast state holds for ``x``; the meta device has none and follows the CPU's."""
    return "cpu" if x.is_meta else x.device.type


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Under torch.autocast, cast as it casts a GEMM's operands (backward then runs in the same dtype)."""
    device = next(autocast_device(tensor) for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def linear_group(
    x: Tensor,
    params: Sequence[tuple[Tensor, Tensor | None]],
    config: GemmConfig,
    ledger: Ledger | None = None,
    layers: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Apply several linear layers to one input; all share one quantized input and one packed stash.

    Args:
        x: (..., K).
        params: (weight N x K, bias N or None) of each layer.
        config: precision, rounding and box direction.
        ledger: where the GEMMs are counted.
        layers: a number of each layer, that tells the rounding noise of its weight from the others'; None counts
            these from 0.

    Returns:
        One (..., N) tensor per layer.
    """
    flat: list[Tensor | None] = [tensor for pair in params for tensor in pair]
    operands = _autocast(x, *flat)
    layers = range(len(params)) if layers is None else layers
    with torch.autocast(autocast_device(x), enabled=False):
        return _Linear.apply(config, ledger, torch.is_grad_enabled(), layers, *operands)  # type: ignore[no-any-return]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, config: GemmConfig, ledger: Ledger | None = None) -> Tensor:
    """``x @ weight^T + bias`` with the three GEMMs of this module's legend; shapes as :func:`linear_group`."""
    return linear_group(x, [(weight, bias)], config, ledger)[0]


class _Matmul(torch.autograd.Function):
    """Batched a @ b, or a @ b^T; a is stashed at q1, b, which plays the weight, at q2.

    With ``apart`` (of a @ b alone) no two rows of b share an exponent in the output GEMM.
    """

    @staticmethod
    def forward(
        ctx: Any,
        config: GemmConfig,
        ledger: Ledger | None,
        grad_enabled: bool,
        transpose_b: bool,
        apart: bool,
        a: Tensor,
        b: Tensor,
    ) -> Tensor:
        precision = config.precision
        needs_a, needs_b = (grad_enabled and need for need in ctx.needs_input_grad[5:])
        k_dim, n_dim = (-1, -2) if transpose_b else (-2, -1)  # of b as it is stored
        if ledger is not None:
            batch, m, k = a.shape
            n = b.shape[n_dim]
            ledger.record("output", m, k, n, batch, precision, needs_a or needs_b)
        seeds = _draw_seeds(config)
        quantizer = _Quantizer(config, seeds)
        # output: MxK @ KxN => MxN
        fmt = precision.output_operands
        if apart and not isinstance(fmt, Float32) and fmt.box_size is not None:
            operand_a, operand_b = quantizer.rows_apart(a, b, fmt)
            stash_a = quantizer.pack(a, "input", -2, ledger) if needs_b else None
        else:
            how = quantizer.arithmetic(a, fmt, fmt, -1, k_dim)
            operand_a, stash_a = quantizer.operand_and_stash(a, needs_b, how, ledger)
            operand_b = quantizer.operand(b, fmt, k_dim, how)
        y = multiply(operand_a, operand_b, config.gemm)
        stash_b = quantizer.pack(b, "weight", n_dim, ledger) if needs_a else None
        stashes = (stash_a, stash_b)
        ctx.config, ctx.seeds, ctx.transpose_b = config, seeds, transpose_b
        ctx.ledger, ctx.scope = ledger, ledger and ledger.scope
        ctx.stash_specs = [None if stash is None else stash.spec for stash in stashes]
        ctx.save_for_backward(*(None if stash is None else stash.data for stash in stashes))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        config, ledger = ctx.config, ctx.ledger
        precision = config.precision
        quantizer = _Quantizer(config, ctx.seeds and ctx.seeds.backward())
        stashes = [_packed(data, spec) for data, spec in zip(ctx.saved_tensors, ctx.stash_specs, strict=True)]
        n_dim = -2 if ctx.transpose_b else -1  # of b as it is stored
        a = quantizer.stashed(stashes[0], precision.stash, -2)
        b = quantizer.stashed(stashes[1], precision.grad_input_weight, n_dim)
        how = quantizer.backward_arithmetic(grad, n_dim)
        along_n, along_m = quantizer.grad_outputs(grad, (b is not None, a is not None), how)
        batch, m, n = grad.shape
        grad_a = grad_b = None
        if along_n is not None and b is not None:
            # grad_input: MxN @ NxK => MxK
            if ledger is not None:
                ledger.record("grad_input", m, n, b.rows.shape[-2], batch, precision, True, ctx.scope)
            grad_a = multiply(along_n, b, config.gemm)
        if along_m is not None and a is not None:
            # grad_weight: NxM @ MxK => NxK, the transpose of KxM @ MxN => KxN
            if ledger is not None:
                ledger.record("grad_weight", a.rows.shape[-2], m, n, batch, precision, True, ctx.scope)
            transposed = multiply(along_m, a, config.gemm)
            grad_b = transposed if ctx.transpose_b else transposed.mT
        return None, None, None, None, None, grad_a, grad_b


def matmul(
    a: Tensor,
    b: Tensor,
    config: GemmConfig,
    ledger: Ledger | None = None,
    transpose_b: bool = False,
    apart: bool = False,
) -> Tensor:
    """Batched product ``a @ b`` with quantized GEMMs and packed stashes of both operands.

    ::

        output:       fq(a, q0, dim=K) @ fq(b, q0, dim=K)          MxK @ KxN => MxN
        stash:        pack(a, q1, dim=M), pack(b, q2, dim=N)
        grad_input:   fq(dy, q3, dim=N) @ unpack(stash b)^T        MxN @ NxK => MxK
        grad_weight:  unpack(stash a)^T @ fq(dy, q3, dim=M)        KxM @ MxN => KxN

    Args:
        a: (batch, M, K).
        b: (batch, K, N), or (batch, N, K) with ``transpose_b``.
        config: precision, rounding and box direction.
        ledger: where the GEMMs are counted.
        transpose_b: multiply by b^T.
        apart: the rows of b are positions that must not see one another (attention's values): in the output GEMM none
            shares an exponent with another, see :meth:`_Quantizer.rows_apart`. Not with ``transpose_b``, whose rows
            share none.

    Returns:
        (batch, M, N).

    Raises:
        ValueError: operands that are not three-dimensional or do not fit.
    """
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2 if transpose_b else 1]:
        expected = "(B, M, K) @ (B, N, K)^T" if transpose_b else "(B, M, K) @ (B, K, N)"
        raise ValueError(f"matmul: got {tuple(a.shape)} and {tuple(b.shape)}, expected {expected}")
    operands = _autocast(a, b)
    with torch.autocast(autocast_device(a), enabled=False):
        return _Matmul.apply(config, ledger, torch.is_grad_enabled(), transpose_b, apart, *operands)  # type: ignore[no-any-return]
