"""Linear layers and batched matrix products whose three GEMMs and stash are quantized.

One training step of ``y = x @ W^T`` with x: M x K, W: N x K, precision [q0, q1, q2, q3]::

    output:       fq(x, q0, dim=K) @ fq(W, q0, dim=K)^T           MxK @ KxN => MxN
    stash:        pack(x, q1, dim=M)                              the only copy of x kept for backward
    grad_input:   fq(dy, q3, dim=N) @ fq(W, q2, dim=N)            MxN @ NxK => MxK
    grad_weight:  fq(dy, q3, dim=M)^T @ dequantize(stash)         NxM @ MxK => NxK
    grad_bias:    sum of dy over M, unquantized

Boxes lie along the reduction dimension of the GEMM that reads them. Source: arXiv 2303.05295, Figure 2 and section 3.

Where the configuration rotates a GEMM, both operands are, along its reduction, before they are quantized: the stash
holds the rotated input.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_dsq.formats import Float32, Format, Square
from fairseq_dsq.gemm import Operand, Plan, Side, base, plan
from fairseq_dsq.kernels import ops
from fairseq_dsq.ledger import Gemm, Ledger
from fairseq_dsq.nn.coded import CodedWeight
from fairseq_dsq.nn.context import GemmConfig
from fairseq_dsq.nn.rotation import rotate
from fairseq_dsq.nn.together import Pass, Together
from fairseq_dsq.precision import FOR_REPEATS, GemmKind, StashRole
from fairseq_dsq.quantized import (
    QuantizedTensor,
    factorize,
    fake_quantize,
    noise_seed,
    pack,
    quantize_and_pack,
    round_terms,
)

# What is added to a call's seed for those who draw beside the forward's operands; ranks and layers lie further apart.
_BACKWARD, _STASH, _APART = 1, 2, 4
# The GEMM that reads a stash.
_READER: dict[StashRole, GemmKind] = {"input": "grad_weight", "weight": "grad_input"}


class _Seeds(NamedTuple):
    """Where one call's stochastic rounding starts.

    Attributes:
        values: of inputs and gradients; data-parallel replicas hold other ones, and draw other noise.
        weight: of weights, of which replicas hold the same and draw the same noise.
        forward_weight: the forward's, also in backward.
    """

    values: int
    weight: int
    forward_weight: int

    def backward(self) -> _Seeds:
        """Those of the call's backward pass."""
        return _Seeds(self.values + _BACKWARD, self.weight + _BACKWARD, self.forward_weight)


def _draw_seeds(config: GemmConfig, number: int = 0) -> _Seeds | None:
    """One draw from torch's default generator per call, whatever the call will round; None where nothing is drawn.

    Reentrant checkpointing runs a forward without grad, which stashes nothing, and repeats it from the same generator
    state: the second must draw what the first did. The generators of replicas part as soon as one has a longer batch
    to drop out of; the seed that all of them were given (by fairseq, anew for every update) does not, nor does the
    number of passes since.

    Args:
        number: of the model's pass, see :class:`~fairseq_dsq.nn.together.Together`.
    """
    if config.rounding != "stochastic":
        return None
    drawn = int(torch.randint(2**62, ()))
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed:
        weight = drawn + _STASH + _BACKWARD
    else:
        drawn += _APART * torch.distributed.get_rank()
        weight = noise_seed(torch.initial_seed() % 2**64, number)
    return _Seeds(drawn, weight, weight)


def _plans(config: GemmConfig, x: Tensor, n_dim: int) -> dict[GemmKind, Plan]:
    """What multiplies in the three GEMMs of a call, ``x`` being any operand, decided once for forward and backward.

    Args:
        n_dim: where N lies in the second operand as it is stored, -1 or -2; -2 for a layer's weight.
    """
    key = x.device, x.dtype, n_dim, base.generation
    found: dict[GemmKind, Plan] | None = config.plans.get(key)
    if found is None:
        reductions: dict[GemmKind, tuple[int, int]] = {
            "output": (-1, -3 - n_dim),
            "grad_input": (-1, n_dim),
            "grad_weight": (-2, -2),
        }
        found = config.plans[key] = {}
        for kind, dims in reductions.items():
            operands = zip(config.precision.operands(kind), dims, strict=True)
            first, second = (Side(fmt, config.dim(dim) == dim) for fmt, dim in operands)
            if config.coded and kind == "grad_input":
                second = second._replace(along=False)
            # grad_weight is multiplied as its transpose, NxM @ MxK => NxK.
            sides = (second, first) if kind == "grad_weight" else (first, second)
            found[kind] = plan(*sides, x.device, x.dtype, config.gemm)
    return found


class _Quantizer:
    """Quantizes the operands of one call's forward or backward.

    Stashes draw from a generator of their own: a forward without grad, which keeps none, must draw for its operands
    what one under grad does. So do weights.

    Args:
        config: what the operands are rounded to.
        seeds: of the forward, or of the backward.
        weights: the pass that rounds weights together, if any does.
    """

    def __init__(self, config: GemmConfig, seeds: _Seeds | None, weights: Pass | None = None) -> None:
        self.config = config
        self.seeds = seeds
        self.weights = weights
        self.generator = self.stash_generator = None
        if seeds is not None:
            self.generator = torch.Generator().manual_seed(seeds.values)
            self.stash_generator = torch.Generator().manual_seed(seeds.values + _STASH)

    def rotated(self, x: Tensor, kind: GemmKind, reduction: int) -> Tensor:
        """An operand of a GEMM that sums over ``reduction`` of it, rotated if that GEMM's are."""
        rotation = self.config.rotation
        return rotate(x, reduction, rotation) if rotation and self.config.rotates(kind) else x

    def operand(self, x: Tensor, plan: Plan, which: int, reduction: int) -> Operand:
        """The first or second operand, 0 or 1, of a GEMM that sums over ``reduction`` of it.

        Left to the engine if that rounds it, to nearest.
        """
        return self._operand(x, plan, which, reduction, self.generator)

    def weight(
        self, weight: Tensor | CodedWeight, layer: int, plan: Plan, reduction: int, dtype: torch.dtype
    ) -> Operand:
        """A product's second operand, a weight; ``layer`` tells it from the model's others.

        Codes are an operand as they are, of ``dtype`` where their scale is multiplied in.
        """
        if isinstance(weight, CodedWeight):
            return weight.operand(plan.sides[1], reduction, dtype)
        generator = None
        if self.seeds is not None:
            # Squares are the same in both GEMMs, and so is what they are rounded to.
            squares = isinstance(plan.sides[1].fmt.group, Square)
            seed = self.seeds.forward_weight if squares else self.seeds.weight
            generator = torch.Generator().manual_seed(seed + _APART * layer)
        elif self.weights is not None and plan.in_terms and self._reads_once(weight, plan.sides[1].fmt):
            side = plan.sides[1]
            together = self.weights.rounded(weight, side.fmt, reduction)
            if together is not None:
                return _of_terms(together, side, reduction, weight)
        return self._operand(weight, plan, 1, reduction, generator)

    def _operand(self, x: Tensor, plan: Plan, which: int, reduction: int, generator: torch.Generator | None) -> Operand:
        side = plan.sides[which]
        if plan.fused[which] and generator is None:
            return Operand(x, side, reduction, rounded=False)
        if isinstance(side.fmt, Float32):
            return Operand(x, side, reduction)
        if plan.in_terms and self._reads_once(x, side.fmt):
            along, across = (side.fmt, None) if reduction == -1 else (None, side.fmt)
            return _of_terms(self._round_once([x], along, across, None, True)[0 if along else 1], side, reduction, x)
        dim, rounding = self.config.dim(reduction), self.config.rounding
        if side.factored and x.numel():
            return _factored(*factorize(x, side.fmt, dim, rounding, generator), side, reduction)
        if plan.in_terms and x.dtype is torch.float32:
            return _of_terms(round_terms(x, side.fmt, dim, rounding, generator), side, reduction, x)
        return Operand(fake_quantize(x, side.fmt, dim, rounding, generator), side, reduction)

    def _reads_once(self, x: Tensor, *fmts: Format) -> bool:
        """Whether one kernel reads ``x`` once for operands and stashes of these formats, on a GPU."""
        once = self.seeds is None and self.config.box_dim == "reduction" and ops.reads_once(x, fmts)
        return once and not any(isinstance(fmt, Float32) for fmt in fmts)

    def _round_once(
        self, xs: list[Tensor], along: Format | None, across: Format | None, stash: Format | None, in_terms: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        texts = (fmt.text if fmt else "" for fmt in (along, across, stash))
        dtype = xs[0].dtype
        xs = [x.detach() if x.requires_grad else x for x in xs]
        return ops.quantize_both(xs, *texts, dtype, in_terms and dtype is torch.float32)

    def pack(self, x: Tensor, role: StashRole, reduction_dim: int, ledger: Ledger | None) -> QuantizedTensor:
        fmt, dim = self.config.precision.stash(role), self.config.dim(reduction_dim)
        if not isinstance(fmt, Float32):  # else the tensor itself is kept, and rotated when it is read
            x = self.rotated(x, _READER[role], reduction_dim)
        packed = pack(x, fmt, dim, self.config.rounding, self.stash_generator)
        self.record(packed, role, ledger)
        return packed

    def skip_stash(self) -> None:
        """Leave out the noise of a stash, for :meth:`stashed_now` to draw."""
        if self.stash_generator is not None:
            torch.randint(2**62, (), generator=self.stash_generator)

    def record(self, packed: QuantizedTensor, role: StashRole, ledger: Ledger | None) -> None:
        """Count a stash."""
        if ledger is not None:
            ledger.record_stash(role, tuple(packed.shape), packed.dim, self.config.precision, packed.nbytes)

    def operand_and_stash(
        self, x: Tensor, plan: Plan, which: int, reduction: int, stash: StashRole | None, ledger: Ledger | None
    ) -> tuple[Operand, QuantizedTensor | None]:
        """The operand of a GEMM that sums over ``reduction`` of it, -1 or -2, and what is kept of it, if anything.

        Its groups lie along the other dimension. Read together.
        """
        side, kept_along = plan.sides[which], -3 - reduction
        if stash is None:
            return self.operand(x, plan, which, reduction), None
        stash_fmt = self.config.precision.stash(stash)
        left_to_engine = plan.fused[which] and self.generator is None
        alone = left_to_engine or isinstance(side.fmt, Float32) or side.factored or self.config.rotates(_READER[stash])
        # Kernels pack along M; where all of a tensor has one scale it is all the same.
        alone = alone or (reduction != -1 and not side.fmt.group == stash_fmt.group == "tensor")
        if alone or self.generator is not None:
            return self.operand(x, plan, which, reduction), self.pack(x, stash, kept_along, ledger)
        if plan.in_terms and self._reads_once(x, side.fmt, stash_fmt):
            rounded, _, data = self._round_once([x], side.fmt, None, stash_fmt, True)
            packed = QuantizedTensor(data, x.shape, x.dtype, stash_fmt, kept_along)
            operand = _of_terms(rounded, side, reduction, x)
        else:
            dims = self.config.dim(reduction), self.config.dim(kept_along)
            rounded, packed = quantize_and_pack(x, side.fmt, stash_fmt, *dims)
            operand = Operand(rounded, side, reduction)
        self.record(packed, stash, ledger)
        return operand, packed

    def rows_apart(self, a: Tensor, b: Tensor, output: Plan) -> tuple[Operand, Operand, Plan]:
        """Operands of a (..., M, K) @ b (..., K, N) in which no two rows of b share a scale, and what multiplies them.

        ``value_boxes`` says how. ``row``: each row of b has one scale, which goes over to the column of a that it
        meets, so that b is integers and groups lie along the reduction: a @ b = (a * scale^T) @ (b / scale).
        ``feature``: the groups of b lie along N; so too in float16, and of formats that have no scale for a row.
        """
        side_a, side_b = output.sides
        rounding, generator = self.config.rounding, self.generator
        per_row = side_b.fmt.by_row()
        # A row's scale times a probability may lie below all exponents of float16; of values over a float scale,
        # bfloat16 holds eight bits.
        wide = per_row is not None and per_row.outer_scale and ops.terms(per_row.significand_bits) > 1
        lacking = b.dtype is torch.float16 or (wide and b.dtype is torch.bfloat16)
        if self.config.value_boxes == "feature" or per_row is None or lacking or not b.numel():
            if self.config.value_boxes != "feature" and b.numel():
                dtype = str(b.dtype).removeprefix("torch.")
                _say_in_features(side_b.fmt.text if per_row is None else f"{side_b.fmt.text} in {dtype}")
            b = fake_quantize(b, side_b.fmt, -1, rounding, generator)
            across = side_b._replace(along=False)
            output = plan(side_a, across, a.device, a.dtype, self.config.gemm)
            return self.operand(a, output, 0, -1), Operand(b, across, -2), output
        codes, scale = factorize(b, per_row, -1, rounding, generator)
        # Integers stay what they are when the engine rounds them again, in groups along the reduction.
        return (
            self.operand(a * scale.to(b.dtype).mT, output, 0, -1),
            Operand(codes.to(b.dtype), side_b, -2),
            output,
        )

    def grad_outputs(
        self, grad: Tensor, need: tuple[bool, bool], plans: dict[GemmKind, Plan]
    ) -> tuple[Operand | None, Operand | None]:
        """grad_output (..., M, N) for the GEMMs that reduce over N (grad_input) and over M (grad_weight), as needed."""
        if read := self._read_together([grad], [need], plans):
            return read[0]
        along_n = along_m = None
        input_plan, weight_plan = plans["grad_input"], plans["grad_weight"]
        side_n, side_m = input_plan.sides[0], weight_plan.sides[0]
        alike = not (self.config.rotates("grad_input") or self.config.rotates("grad_weight"))
        if need[0]:
            along_n = self.operand(self.rotated(grad, "grad_input", -1), input_plan, 0, -1)
        if need[1]:
            same = side_n.fmt == side_m.fmt and self.config.dim(-1) == self.config.dim(-2)
            same = same or (side_n.fmt == side_m.fmt and side_n.fmt.group == "tensor")
            ready = along_n is not None and along_n.rounded and along_n.scale is None
            if same and alike and along_n is not None and ready and (weight_plan.in_terms or not along_n.terms):
                along_m = along_n._replace(side=side_m, reduction=-2)
            else:
                along_m = self.operand(self.rotated(grad, "grad_weight", -2), weight_plan, 0, -2)
        return along_n, along_m

    def each_grad_outputs(
        self, grads: Sequence[Tensor | None], needs: Sequence[tuple[bool, bool]], plans: dict[GemmKind, Plan]
    ) -> Iterator[tuple[Operand | None, Operand | None]]:
        """:meth:`grad_outputs` of several gradients, one after the other where one kernel does not read them all."""
        there = [grad for grad in grads if grad is not None]
        alike = len(there) == len(grads) > 1 and len({grad.shape for grad in there}) == 1
        if alike and (read := self._read_together(there, needs, plans)):
            yield from read
            return
        for grad, need in zip(grads, needs, strict=True):
            yield (None, None) if grad is None else self.grad_outputs(grad, need, plans)

    def _read_together(
        self, grads: list[Tensor], needs: Sequence[tuple[bool, bool]], plans: dict[GemmKind, Plan]
    ) -> list[tuple[Operand, Operand]]:
        """:meth:`grad_outputs` of gradients (M, N) that one kernel reads once; empty where none does.

        What has one scale is rounded alike in both directions: once will do, and each gradient has its own.
        """
        input_plan, weight_plan = plans["grad_input"], plans["grad_weight"]
        side_n, side_m, first = input_plan.sides[0], weight_plan.sides[0], grads[0]
        planned = input_plan.in_terms and weight_plan.in_terms and all(map(all, needs))
        planned = planned and not (side_n.fmt.mixes or side_m.fmt.mixes)
        rotated = self.config.rotates("grad_input") or self.config.rotates("grad_weight")
        if rotated or not (planned and self._reads_once(first, side_n.fmt, side_m.fmt)):
            return []
        *rounded, _ = self._round_once(grads, side_n.fmt, side_m.fmt, None, True)
        if len(grads) > 1:  # stacked behind the terms
            stacked = 1 if first.dtype is torch.float32 else 0
            each = list(zip(*(tensor.unbind(stacked) for tensor in rounded), strict=True))
        else:
            each = [(rounded[0], rounded[1])]
        return [
            (_of_terms(along_n, side_n, -1, first), _of_terms(along_m, side_m, -2, first)) for along_n, along_m in each
        ]

    def stashed_now(self, x: Tensor, role: StashRole, plan: Plan, reduction: int) -> Operand:
        """What :meth:`stashed` gives of what :meth:`pack` packs of ``x``; of the forward's quantizer."""
        rotated = self.rotated(x, _READER[role], reduction)
        return self._operand(rotated, plan, 1, reduction, self.stash_generator)

    def stashed(self, stash: QuantizedTensor | None, role: StashRole, plan: Plan, reduction: int) -> Operand | None:
        """A stash as a product's second operand."""
        if stash is None:
            return None
        if isinstance(plan.sides[1].fmt, Float32):
            return Operand(self.rotated(stash.dequantize(), _READER[role], reduction), plan.sides[1], reduction)
        return _unpacked(stash, plan, 1, reduction)


@cache
def _say_in_features(what: str) -> None:
    warnings.warn(
        f"value boxes: got row, which {what} has not: attention's values are quantized along the features, as feature "
        "has it",
        stacklevel=2,
    )


def _unpacked(packed: QuantizedTensor, plan: Plan, which: int, reduction: int) -> Operand:
    """The first or second operand of a product, 0 or 1, that has been packed."""
    side = plan.sides[which]
    if side.factored and packed.data.numel():
        return _factored(*packed.factorize(), side, reduction)
    if plan.in_terms and packed.dtype is torch.float32 and not isinstance(side.fmt, Float32):
        terms = packed.terms()
        return Operand(terms, side, reduction, terms=terms.size(0))
    return Operand(packed.dequantize(), side, reduction)


def rounded_operand(x: Tensor, plan: Plan, which: int, config: GemmConfig) -> Operand:
    """The first or second operand of the output GEMM, (..., rows, K), rounded to nearest."""
    return _Quantizer(config, None).operand(x, plan, which, -1)


def _of_terms(rounded: Tensor, side: Side, reduction: int, x: Tensor) -> Operand:
    """What was rounded of ``x``: a float32 comes as bfloat16 terms."""
    return Operand(rounded, side, reduction, terms=rounded.size(0) if x.dtype is torch.float32 else 0)


def _factored(elements: Tensor, scale: Tensor, side: Side, reduction: int) -> Operand:
    """An operand whose scale is kept out of the product; one for the tensor, wherever its groups lie, is one number."""
    if side.fmt.group == "tensor":
        scale = scale.reshape(-1)[:1].view([1] * elements.dim())
    return Operand(elements, side, reduction, scale=scale if reduction == -1 else scale.mT)


def as_rows(x: Tensor) -> Tensor:
    """(..., N) as a matrix; any of the sizes may be 0, which leaves nothing for reshape's -1 to follow from."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _reshaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``x``, a new contiguous tensor, in another shape: no view, which autograd lets nobody change in place."""
    return torch.ops.aten._unsafe_view(x, shape)  # type: ignore[no-any-return]


def _held(data: Tensor | None, spec: Any) -> QuantizedTensor | None:
    return None if data is None else QuantizedTensor(data, *spec)


Backward = TypeVar("Backward", bound=Callable[..., Any])


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    device = autocast_device(x)
    # To enter and leave that of torch takes as long as the GEMMs of a small layer.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def outside_autocast(backward: Backward) -> Backward:
    """Have a backward pass see no autocast, as its forward pass does: its products would be cut."""

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        there = next((grad for grad in grads if grad is not None), None)
        with contextlib.nullcontext() if there is None else _without_autocast(there):
            return backward(ctx, *grads)

    return run  # type: ignore[return-value]


class _Linear(torch.autograd.Function):
    """Several linear layers on one input, which is quantized and stashed once."""

    @staticmethod
    def forward(
        ctx: Any,
        config: GemmConfig,
        ledger: Ledger | None,
        grad_enabled: bool,
        layers: Sequence[int],
        coded: Sequence[CodedWeight | None],
        together: Together | None,
        x: Tensor,
        *params: Tensor | None,
    ) -> tuple[Tensor, ...]:
        # In place of a coded weight, its placeholder stands among the parameters, which gets the gradient.
        weights = [held or weight for held, weight in zip(coded, params[0::2], strict=True)]
        biases = params[1::2]
        rows = as_rows(x)
        needs_x = grad_enabled and ctx.needs_input_grad[6]
        needs_weight = [grad_enabled and need for need in ctx.needs_input_grad[7::2]]
        seeds = _draw_seeds(config, together.number if together else 0)
        running = together.current if together else None
        quantizer, plans = _Quantizer(config, seeds, running), _plans(config, x, -2)
        output = plans["output"]
        kept_as: StashRole | None = "input" if any(needs_weight) else None
        operand, stash = quantizer.operand_and_stash(rows, output, 0, -1, kept_as, ledger)
        outputs = []
        for layer, weight, bias, needs in zip(layers, weights, biases, needs_weight, strict=True):
            assert weight is not None
            # output: MxK @ KxN => MxN
            y = output.multiply(operand, quantizer.weight(weight, layer, output, -1, x.dtype), bias)
            outputs.append(_reshaped(y.to(x.dtype), (*x.shape[:-1], y.shape[-1])))
            if ledger is not None:
                record_linear(ledger, config, len(rows), weight.shape, needs_x or needs)
        ctx.config, ctx.seeds, ctx.plans, ctx.layers, ctx.x_shape = config, seeds, plans, layers, x.shape
        ctx.together = running
        ctx.ledger, ctx.scope = ledger, ledger and ledger.scope
        ctx.set_materialize_grads(False)
        # The packed bytes go through save_for_backward, so that checkpointing and saved-tensor hooks see them.
        ctx.stash_spec = None if stash is None else stash.spec
        ctx.coded = [held and held.spec for held in coded]
        kept = [part for weight in weights for part in _parts(weight)]
        ctx.save_for_backward(None if stash is None else stash.data, *kept)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        config: GemmConfig = ctx.config
        precision = config.precision
        ledger: Ledger | None = ctx.ledger
        data, *kept = ctx.saved_tensors
        weights = [
            first if spec is None else CodedWeight(first, second, *spec)
            for first, second, spec in zip(kept[0::2], kept[1::2], ctx.coded, strict=True)
        ]
        quantizer = _Quantizer(config, ctx.seeds and ctx.seeds.backward(), ctx.together)
        grad_input = ctx.plans["grad_input"]
        stashed = quantizer.stashed(_held(data, ctx.stash_spec), "input", ctx.plans["grad_weight"], -2)
        grad_x: Tensor | None = None
        grad_params: list[Tensor | None] = []
        grad_rows = [None if grad is None else as_rows(grad) for grad in grads]
        needs = [(ctx.needs_input_grad[6], need) for need in ctx.needs_input_grad[7::2]]
        read = quantizer.each_grad_outputs(grad_rows, needs, ctx.plans)
        for index, (rows, weight, (along_n, along_m)) in enumerate(zip(grad_rows, weights, read, strict=True)):
            grad_weight: Tensor | None = None
            grad_bias: Tensor | None = None
            if rows is not None:
                m, n, k = *rows.shape, weight.shape[1]
                if along_n is not None:
                    # grad_input: MxN @ NxK => MxK
                    if ledger is not None:
                        ledger.record(*Gemm.of_product("grad_input", m, k, n), precision, True, ctx.scope)
                    if not isinstance(weight, CodedWeight):
                        weight = quantizer.rotated(weight, "grad_input", -2)
                    operand = quantizer.weight(weight, ctx.layers[index], grad_input, -2, rows.dtype)
                    grad_x = grad_input.multiply(along_n, operand, add_to=grad_x)
                if along_m is not None:
                    assert stashed is not None
                    # grad_weight: NxM @ MxK => NxK, the transpose of KxM @ MxN => KxN
                    if ledger is not None:
                        ledger.record(*Gemm.of_product("grad_weight", m, k, n), precision, True, ctx.scope)
                    grad_weight = ctx.plans["grad_weight"].multiply(along_m, stashed)
                if ctx.needs_input_grad[8 + 2 * index]:
                    grad_bias = rows.sum(0)
            grad_params += [grad_weight, grad_bias]
        grad_x = None if grad_x is None else _reshaped(grad_x, ctx.x_shape)
        return None, None, None, None, None, None, grad_x, *grad_params


def _parts(weight: Tensor | CodedWeight | None) -> tuple[Tensor | None, Tensor | None]:
    """What is kept of a weight for backward."""
    return (weight.codes, weight.scale) if isinstance(weight, CodedWeight) else (weight, None)


def record_linear(ledger: Ledger, config: GemmConfig, rows: int, shape: torch.Size, training: bool) -> None:
    """Report a linear layer's output GEMM on ``rows`` rows by a weight of ``shape``."""
    n, k = shape
    ledger.record(*Gemm.of_product("output", rows, k, n), config.precision, training)


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


def _refuse_mixed(what: str, *operands: Tensor | None) -> None:
    """Refuse operands of several dtypes or devices as torch does, whatever engine multiplies."""
    kinds = {(x.dtype, x.device) for x in operands if x is not None}
    if len(kinds) > 1:
        got = " and ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise RuntimeError(f"{what}: got {got}, expected operands of one dtype on one device")


def linear_group(
    x: Tensor,
    params: Sequence[tuple[Tensor, Tensor | None]],
    config: GemmConfig,
    ledger: Ledger | None = None,
    layers: Sequence[int] | None = None,
    coded: Sequence[CodedWeight | None] | None = None,
    together: Together | None = None,
) -> tuple[Tensor, ...]:
    """Apply several linear layers to one input; all share one quantized input and one packed stash.

    Args:
        x: (..., K).
        params: (weight N x K, bias N or None) of each layer.
        config: precision, rounding and box direction.
        ledger: where the GEMMs are counted.
        layers: a number of each layer, that tells the rounding noise of its weight from the others'; None counts
            these from 0.
        coded: the weights that are held as codes; the parameter in such a one's place is only given a gradient.
        together: of the model: rounds weights together, and numbers passes. Without it data-parallel replicas round a
            weight by the same noise until torch is given another seed.

    Returns:
        One (..., N) tensor per layer.

    Raises:
        RuntimeError: operands of several dtypes or devices.
    """
    coded = [None] * len(params) if coded is None else coded
    if not config.precision.rounds and not any(coded):
        return _float_linear_group(x, params, config, ledger)
    flat = [None if held else weight for held, (weight, _) in zip(coded, params, strict=True)]
    x, *cast = _autocast(x, *flat, *(bias for _, bias in params))  # type: ignore[assignment]
    _refuse_mixed("linear", x, *cast)
    for index, (held, (weight, _)) in enumerate(zip(coded, params, strict=True)):
        cast[index] = weight if held else cast[index]
    operands = [tensor for pair in zip(cast[: len(params)], cast[len(params) :], strict=True) for tensor in pair]
    layers = range(len(params)) if layers is None else layers
    with _without_autocast(x):
        return _Linear.apply(  # type: ignore[no-any-return]
            config, ledger, torch.is_grad_enabled(), layers, coded, together, x, *operands
        )


def _float_linear_group(
    x: Tensor, params: Sequence[tuple[Tensor, Tensor | None]], config: GemmConfig, ledger: Ledger | None
) -> tuple[Tensor, ...]:
    """:func:`linear_group` where nothing is rounded: torch's own layers, whose GEMMs are counted."""
    outputs = tuple(torch.nn.functional.linear(x, weight, bias) for weight, bias in params)
    if ledger is None:
        return outputs
    m, k = x.shape[:-1].numel(), x.shape[-1]
    needs_x = torch.is_grad_enabled() and x.requires_grad
    needs_weight = [torch.is_grad_enabled() and weight.requires_grad for weight, _ in params]
    if any(needs_weight):
        _record_float_stash(ledger, config, "input", (m, k), -2, outputs[0].dtype)
    for y, needs in zip(outputs, needs_weight, strict=True):
        _record_float_product(ledger, config, y, (m, k, y.shape[-1], 1), needs_x, needs)
    return outputs


def _record_float_stash(
    ledger: Ledger, config: GemmConfig, role: StashRole, shape: tuple[int, ...], reduction: int, dtype: torch.dtype
) -> None:
    """Count what torch keeps of an operand, the tensor itself, in the ``dtype`` that it multiplies."""
    ledger.record_stash(role, shape, config.dim(reduction), config.precision, math.prod(shape) * dtype.itemsize)


def _record_float_product(
    ledger: Ledger, config: GemmConfig, y: Tensor, sizes: tuple[int, int, int, int], needs_a: bool, needs_b: bool
) -> None:
    """Count a product's output GEMM now and those of the backward pass when they run: when ``y`` gets its gradient.

    Args:
        sizes: M, K, N and batch of the output GEMM.
        needs_a, needs_b: which of its operands get a gradient.
    """
    scope, precision = ledger.scope, config.precision
    ledger.record(*Gemm.of_product("output", *sizes), precision, needs_a or needs_b)

    def record(_: Tensor) -> None:
        if needs_a:
            ledger.record(*Gemm.of_product("grad_input", *sizes), precision, True, scope)
        if needs_b:
            ledger.record(*Gemm.of_product("grad_weight", *sizes), precision, True, scope)

    if needs_a or needs_b:
        y.register_hook(record)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: GemmConfig,
    ledger: Ledger | None = None,
    layer: int = 0,
    together: Together | None = None,
) -> Tensor:
    """``x @ weight^T + bias`` with the three GEMMs of this module's legend; arguments as :func:`linear_group`."""
    return linear_group(x, [(weight, bias)], config, ledger, [layer], together=together)[0]


@dataclass(frozen=True)
class Product:
    """A batched product a @ b, or a @ b^T, whose forward pass has run; what its backward pass goes by.

    Attributes:
        config, ledger, scope: as the forward pass had them.
        seeds: of the forward pass.
        plans: what multiplies.
        transpose_b: multiplies by b^T.
        specs: of the stashes of a and b; None where none is kept.
        sizes: M, K, N and batch of the output GEMM.
    """

    config: GemmConfig
    ledger: Ledger | None
    scope: str
    seeds: _Seeds | None
    plans: dict[GemmKind, Plan]
    transpose_b: bool
    specs: Sequence[Any]
    sizes: tuple[int, int, int, int]

    @classmethod
    def run(
        cls,
        config: GemmConfig,
        ledger: Ledger | None,
        a: Tensor,
        b: Tensor,
        kept: tuple[bool, bool],
        transpose_b: bool = False,
        apart: bool = False,
        a_comes_again: bool = False,
    ) -> tuple[Tensor, Product, tuple[Tensor | None, Tensor | None]]:
        """The product, and the bytes of its stashes; shapes and ``apart`` as :func:`matmul`.

        Args:
            kept: whether a and b are stashed, as the gradients of the other one need.
            a_comes_again: :meth:`grads` will be given ``a``, which is not stashed.

        Raises:
            ValueError: a weight's square boxes.
        """
        if config.precision.squares:
            raise ValueError(f"matmul: got {config.precision}, expected no squares, which are a weight's boxes")
        n_dim = -2 if transpose_b else -1  # of b as it is stored
        seeds = _draw_seeds(config)
        quantizer, plans = _Quantizer(config, seeds), _plans(config, a, n_dim)
        output, keeps_a, keeps_b = plans["output"], *kept
        if a_comes_again:
            quantizer.skip_stash()
            if ledger is not None:
                ledger.record_stash("recomputed", tuple(a.shape), config.dim(-2), config.precision, 0)
        # output: MxK @ KxN => MxN
        side_b = output.sides[1]
        if apart and not transpose_b and not isinstance(side_b.fmt, Float32) and side_b.fmt.group != "tensor":
            operand_a, operand_b, output = quantizer.rows_apart(a, b, output)
            stash_a = quantizer.pack(a, "input", -2, ledger) if keeps_a else None
            stash_b = quantizer.pack(b, "weight", -1, ledger) if keeps_b else None
        else:
            operand_a, stash_a = quantizer.operand_and_stash(a, output, 0, -1, "input" if keeps_a else None, ledger)
            b_reduction = -1 if transpose_b else -2
            kept_as: StashRole | None = "weight" if keeps_b else None
            operand_b, stash_b = quantizer.operand_and_stash(b, output, 1, b_reduction, kept_as, ledger)
        y = output.multiply(operand_a, operand_b).to(a.dtype)
        specs = [None if stash is None else stash.spec for stash in (stash_a, stash_b)]
        sizes = (*a.shape[1:], y.shape[2], len(a))
        product = cls(config, ledger, ledger.scope if ledger else "", seeds, plans, transpose_b, specs, sizes)
        product.record("output", any(kept))
        return y, product, (None if stash_a is None else stash_a.data, None if stash_b is None else stash_b.data)

    def record(self, kind: GemmKind, training: bool = True) -> None:
        """Count one of its three GEMMs."""
        if self.ledger is not None:
            gemm = Gemm.of_product(kind, *self.sizes)
            self.ledger.record(*gemm, self.config.precision, training, self.scope)

    def pack_operands(self, a: Tensor, b: Tensor) -> list[QuantizedTensor]:
        """What :meth:`repeat` needs of a @ b^T: its operands, packed."""
        quantizer, dim = _Quantizer(self.config, self.seeds), self.config.dim(-1)
        found = []
        for x, role, fmt in zip((a, b), FOR_REPEATS, self.config.precision.operands("output"), strict=True):
            found.append(pack(x, fmt, dim, self.config.rounding, quantizer.generator))
            quantizer.record(found[-1], role, self.ledger)
        return found

    def repeat(self, packed: Sequence[QuantizedTensor]) -> Tensor:
        """a @ b^T again, bit for bit; that GEMM is counted again, as a forward pass that keeps nothing."""
        self.record("output", training=False)
        output = self.plans["output"]
        first, second = (_unpacked(operand, output, which, -1) for which, operand in enumerate(packed))
        return output.multiply(first, second).to(packed[0].dtype)

    def grads(
        self, data: Sequence[Tensor | None], grad: Tensor, a: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of a and b, each where the other's stash is there.

        Args:
            data: the stashes' bytes.
            grad: of the product.
            a: that operand again, which is rounded as its stash would have been.
        """
        quantizer = _Quantizer(self.config, self.seeds and self.seeds.backward())
        grad_input, grad_weight = self.plans["grad_input"], self.plans["grad_weight"]
        n_dim = -2 if self.transpose_b else -1  # of b as it is stored
        stash_a, stash_b = (_held(bytes_, spec) for bytes_, spec in zip(data, self.specs, strict=True))
        if a is None:
            first = quantizer.stashed(stash_a, "input", grad_weight, -2)
        else:
            first = _Quantizer(self.config, self.seeds).stashed_now(a, "input", grad_weight, -2)
        second = quantizer.stashed(stash_b, "weight", grad_input, n_dim)
        along_n, along_m = quantizer.grad_outputs(grad, (second is not None, first is not None), self.plans)
        grad_a = grad_b = None
        if along_n is not None and second is not None:
            # grad_input: MxN @ NxK => MxK
            self.record("grad_input")
            grad_a = grad_input.multiply(along_n, second)
        if along_m is not None and first is not None:
            # grad_weight: NxM @ MxK => NxK, the transpose of KxM @ MxN => KxN
            self.record("grad_weight")
            transposed = grad_weight.multiply(along_m, first)
            grad_b = transposed if self.transpose_b else transposed.mT
        return grad_a, grad_b


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
        needs_a, needs_b = (grad_enabled and need for need in ctx.needs_input_grad[5:])
        y, ctx.product, data = Product.run(config, ledger, a, b, (needs_b, needs_a), transpose_b, apart)
        ctx.save_for_backward(*data)
        return y

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, None, *ctx.product.grads(ctx.saved_tensors, grad)


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
        grad_input:   fq(dy, q3, dim=N) @ dequantize(stash b)^T    MxN @ NxK => MxK
        grad_weight:  dequantize(stash a)^T @ fq(dy, q3, dim=M)    KxM @ MxN => KxN

    Args:
        a: (batch, M, K).
        b: (batch, K, N), or (batch, N, K) with ``transpose_b``.
        config: precision, rounding and box direction.
        ledger: where the GEMMs are counted.
        transpose_b: multiply by b^T.
        apart: the rows of b are positions that must not see one another (attention's values): in the output GEMM none
            shares an exponent with another, see :meth:`_Quantizer.rows_apart`. With ``transpose_b`` they share none
            anyway.

    Returns:
        (batch, M, N).

    Raises:
        ValueError: operands that are not three-dimensional or do not fit, or a weight's square boxes.
        RuntimeError: operands of several dtypes or devices.
    """
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2 if transpose_b else 1]:
        expected = "(B, M, K) @ (B, N, K)^T" if transpose_b else "(B, M, K) @ (B, K, N)"
        raise ValueError(f"matmul: got {tuple(a.shape)} and {tuple(b.shape)}, expected {expected}")
    if not config.precision.rounds:
        return _float_matmul(a, b, config, ledger, transpose_b)
    operands = _autocast(a, b)
    _refuse_mixed("matmul", *operands)
    with _without_autocast(a):
        return _Matmul.apply(config, ledger, torch.is_grad_enabled(), transpose_b, apart, *operands)  # type: ignore[no-any-return]


def _float_matmul(a: Tensor, b: Tensor, config: GemmConfig, ledger: Ledger | None, transpose_b: bool) -> Tensor:
    """:func:`matmul` where nothing is rounded: torch's own, whose GEMMs are counted."""
    y = torch.bmm(a, b.mT if transpose_b else b)
    if ledger is None:
        return y
    batch, m, k = a.shape
    needs_a, needs_b = (torch.is_grad_enabled() and operand.requires_grad for operand in (a, b))
    if needs_b:
        _record_float_stash(ledger, config, "input", tuple(a.shape), -2, y.dtype)
    if needs_a:
        _record_float_stash(ledger, config, "weight", tuple(b.shape), -2 if transpose_b else -1, y.dtype)
    _record_float_product(ledger, config, y, (m, k, y.shape[2], batch), needs_a, needs_b)
    return y
