"""Adam whose moments are held in low-bit formats, one parameter at a time: decode, float32 update, encode.

What a parameter of at least SMALL values and two dimensions holds, as a matrix of its first dimension by all others::

    exp_avg_sq = pack(v, moment2)
    exp_avg    = pack(m, moment1)              moment2 has a sign and a zero
               = pack(m / sqrt(v'), moment1)   moment2 is logarithmic; v' is what its bytes say

m / sqrt(v) is of one size along a row however far the gradient spreads there, which a step of a largest magnitude / 127
is not for m itself. Where v' is 0, so is m.

The noise of stochastic rounding is a function of the seed, the step, the parameter's place and the moment alone:
replicas that see equal gradients stay equal, and a resumed training repeats the one that went on.

With the residual "moment1" what rounding left undone of a step of codes, the rest r, comes back through m::

    m += (1 / beta1 - 1) * r / (what m is multiplied by in the step)

which later steps subtract in parts beta1^k (1 - beta1) / beta1 * r, k = 1, 2, ..., of sum r while the step's factor
stays. Source: "ECO: Quantized Training without Full-Precision Master Weights", arXiv 2601.22101.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fairseq_dsq import formats
from fairseq_dsq.formats import Float32, Format, Square
from fairseq_dsq.kernels import native
from fairseq_dsq.kernels.native import AdamMoments, AdamStep
from fairseq_dsq.quantized import ROUNDINGS, QuantizedTensor, Rounding, noise_seed, pack
from fairseq_dsq.text import check_choice

# Parameters of fewer values, and all of one dimension, hold their moments in float32.
SMALL = 4096
_FLOAT32 = Float32()
_HALF = (torch.float16, torch.bfloat16)
# What a parameter group holds beside Adam's own, of which the first two say how its states' bytes are read.
HELD = ("moment1", "moment2", "rounding", "seed", "residual")
Residual = Literal["none", "moment1"]
RESIDUALS: tuple[Residual, ...] = ("none", "moment1")


@dataclass(frozen=True)
class Moments:
    """How Adam's two moments are held.

    Attributes:
        first, second: the formats; float32 holds a tensor of the parameter's shape.
        rounding: where they are encoded.

    Raises:
        ValueError: a first format without negative values, squares, or no rounding.
    """

    first: Format
    second: Format
    rounding: Rounding = "stochastic"

    def __post_init__(self) -> None:
        if not self.first.signed:
            raise ValueError(f"moment1: got {self.first}, expected a format with negative values, such as int8/row")
        for name, fmt in (("moment1", self.first), ("moment2", self.second)):
            if isinstance(fmt.group, Square):
                raise ValueError(f"{name}: got {fmt}, expected no squares, which are a weight's boxes")
        check_choice("moment_rounding", self.rounding, ROUNDINGS)

    @property
    def of_ratio(self) -> bool:
        """Whether m / sqrt(v) is held in place of m."""
        return not self.second.signed and self.first != _FLOAT32

    @cached_property
    def by_row(self) -> bool:
        """Whether the native update decodes and encodes them."""
        return (self.first.row_kernel, self.second.row_kernel) == ("int8", "log8")

    def formats(self, shape: torch.Size) -> tuple[Format, Format]:
        """The formats of the two moments of a parameter."""
        return (_FLOAT32, _FLOAT32) if _is_small(shape) else (self.first, self.second)

    def nbytes(self, shape: torch.Size) -> int:
        """Bytes of a parameter's moments."""
        return sum(fmt.nbytes(_matrix(shape)) for fmt in self.formats(shape))

    def encode(self, m: Tensor, v: Tensor, seeds: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
        """The tensors that hold float32 moments of one shape: uint8 bytes, or a moment itself in float32.

        A group with NaN or Inf, or in a logarithmic format with a negative value, is NaN throughout.
        """
        first, second = self.formats(m.shape)
        held_v = self._pack(v, second, seeds[1])
        if self.of_ratio and first == self.first:
            # No root of a float32 lies below 2^-75 but 0, where m is 0 or next to it.
            m = m / _root(_dequantize(held_v, second, v.shape)).clamp_(min=2.0**-75)
        return self._pack(m, first, seeds[0]), held_v

    def decode(self, exp_avg: Tensor, exp_avg_sq: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`encode`: float32 moments of ``shape``; those held in float32 are not copied.

        Raises:
            ValueError: tensors that do not hold moments of this shape.
        """
        first, second = self.formats(shape)
        for name, held, fmt in (("exp_avg", exp_avg, first), ("exp_avg_sq", exp_avg_sq, second)):
            _check(name, held, fmt, shape)
        m, v = _dequantize(exp_avg, first, shape), _dequantize(exp_avg_sq, second, shape)
        return (m.mul_(_root(v)) if self.of_ratio and first == self.first else m), v

    def _pack(self, x: Tensor, fmt: Format, seed: int) -> Tensor:
        return x if fmt == _FLOAT32 else pack(x.float().reshape(_matrix(x.shape)), fmt, -1, self.rounding, seed).data


def _is_small(shape: torch.Size) -> bool:
    return len(shape) < 2 or shape.numel() < SMALL


def _matrix(shape: torch.Size) -> torch.Size:
    """The shape in which a parameter's moments are cut into rows: its first dimension by all others."""
    return torch.Size((shape[0], shape.numel() // shape[0])) if len(shape) > 1 and shape[0] else shape


def _root(x: Tensor) -> Tensor:
    """The square root, correctly rounded: torch's own of a float32 is not, and differs between CPUs."""
    return x.double().sqrt_().to(x.dtype)


def _dequantize(held: Tensor, fmt: Format, shape: torch.Size) -> Tensor:
    if fmt == _FLOAT32:
        return held
    return QuantizedTensor(held, _matrix(shape), torch.float32, fmt, -1).dequantize().view(shape)


def _check(name: str, held: Tensor, fmt: Format, shape: torch.Size) -> None:
    if fmt == _FLOAT32:
        fits, expected = held.shape == shape and held.is_floating_point(), f"{tuple(shape)} of floats"
    else:
        nbytes = fmt.nbytes(_matrix(shape))
        fits, expected = held.dtype is torch.uint8 and held.shape == (nbytes,), f"({nbytes},) of torch.uint8 in {fmt}"
    if not fits:
        raise ValueError(f"{name}: got {tuple(held.shape)} of {held.dtype}, expected {expected}")


@cache
def _moments(first: str, second: str, rounding: Rounding) -> Moments:
    return Moments(_parsed("moment1", first), _parsed("moment2", second), rounding)


def _parsed(name: str, text: str) -> Format:
    try:
        return formats.parse(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _moments_of(group: Mapping[str, Any]) -> Moments:
    """Of a parameter group; one of another Adam holds float32."""
    first, second = group.get("moment1", "float32"), group.get("moment2", "float32")
    return _moments(first, second, group.get("rounding", "nearest"))


class LowBitAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay, as fairseq's, with moments held as :class:`Moments` says.

    A parameter's attribute ``dsq_codes``, if it has one, takes its step: ``dsq_codes.subtract_(step, seed)``, under
    ``residual`` with ``leave_rest=True``.
    With both formats float32 it gives fairseq's bits. A gradient with NaN makes NaN of the moments' groups that it
    falls into, where fairseq's Adam makes NaN of single moments.

    Args:
        params, lr, betas, eps, weight_decay: as for fairseq's.
        moment1, moment2: formats by name.
        rounding: ``stochastic`` or ``nearest``.
        seed: of stochastic rounding; an integer >= 0.
        residual: ``moment1`` gives what rounding leaves undone of a step of codes to the first moment.

    Raises:
        ValueError: a format, rounding or residual that is not defined; a residual without a first moment; a rate out of
            range.
    """

    # What fairseq asks of an optimizer.
    supports_memory_efficient_fp16 = True
    supports_flat_params = False
    # fairseq would put the checkpoint's tensors in the place of those that load_state_dict made.
    disable_mem_eff_fp16_loading_hack = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        moment1: str = "int8/row",
        moment2: str = "log8/row",
        rounding: Rounding = "stochastic",
        seed: int = 0,
        residual: Residual = "none",
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        held = {"moment1": moment1, "moment2": moment2, "rounding": rounding, "seed": seed, "residual": residual}
        super().__init__(params, adam | held)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; errors as of the class, of the group's own options."""
        group = self.defaults | param_group
        _moments_of(group)
        check_choice("residual", group["residual"], RESIDUALS)
        for name, value, end in (
            *((name, group[name], math.inf) for name in ("lr", "eps", "weight_decay")),
            *(("betas", beta, 1) for beta in group["betas"]),
        ):
            if not 0 <= value < end:
                raise ValueError(f"{name}: got {group[name]}, expected 0 or more" + ", below 1" * (end == 1))
        if group["residual"] == "moment1" and group["betas"][0] == 0:
            raise ValueError("residual: got moment1 with a beta1 of 0, expected a first moment that keeps it")
        super().add_param_group(param_group)

    def _parameters(self) -> Iterator[tuple[int, dict[str, Any], Tensor]]:
        pairs = ((group, p) for group in self.param_groups for p in group["params"])
        return ((index, *pair) for index, pair in enumerate(pairs))

    @property
    def state_nbytes(self) -> int:
        """Bytes of all moments."""
        tensors = (value for state in self.state.values() for value in state.values() if torch.is_tensor(value))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        together: dict[AdamStep, list[Tensor]] = {}
        for index, group, p in self._parameters():
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
            number = self.state[p].get("step", 0) + 1
            rates = group["lr"], *group["betas"], group["eps"], group["weight_decay"]
            step = _step(*rates, group["residual"], number)
            if (
                _is_small(p.shape)
                and p.is_cpu
                and p.dtype is p.grad.dtype is torch.float32
                and not hasattr(p, "dsq_codes")
            ):
                together.setdefault(step, []).append(p)
            else:
                self._update(index, group, number, step, p)
        for step, parameters in together.items():
            self._update_small(step, parameters)
        return loss

    def _update(self, index: int, group: Mapping[str, Any], number: int, step: AdamStep, p: Tensor) -> None:
        assert p.grad is not None
        state, codes = self.state[p], getattr(p, "dsq_codes", None)
        seeds = _seeds(group, number, index)
        m, v = _run(_Update(p, p.grad, codes, state, _moments_of(group), step, seeds))
        if codes is None:
            torch.autograd.graph.increment_version(p)  # as torch's own operations do
        state.update(step=number, exp_avg=m, exp_avg_sq=v)

    def _update_small(self, step: AdamStep, parameters: list[Tensor]) -> None:
        """The definition's update with moments in float32; in a call for all tensors, which takes them in turn."""
        grads, m, v = [], [], []
        for p in parameters:
            state, grad = self.state[p], p.grad
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            for name in ("exp_avg", "exp_avg_sq"):
                _check(name, state[name], _FLOAT32, p.shape)
            assert grad is not None
            state["step"] += 1
            grads.append(grad)
            m.append(state["exp_avg"])
            v.append(state["exp_avg_sq"])
        torch._foreach_mul_(m, step.beta1)
        torch._foreach_add_(m, grads, alpha=step.rest1)
        torch._foreach_mul_(v, step.beta2)
        torch._foreach_addcmul_(v, grads, grads, value=step.rest2)
        deviations = torch._foreach_sqrt(v)
        torch._foreach_add_(deviations, step.eps)
        if step.decay != 0:
            torch._foreach_add_(parameters, parameters, alpha=-step.decay)
        torch._foreach_addcdiv_(parameters, m, deviations, value=-step.size)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up states, bytes as they are; those in other formats, or of another Adam, are encoded in this one's.

        Raises:
            ValueError: states of other parameters.
        """
        saved = state_dict["param_groups"]
        own = [{key: group[key] for key in HELD} for group in self.param_groups]
        # torch casts states to the parameter's dtype: it is given the groups alone.
        kept = [dict(group, **held) for group, held in zip(saved, own, strict=False)]
        super().load_state_dict({"state": {}, "param_groups": kept if len(kept) == len(saved) else saved})
        places = ((group, place) for group in saved for place in group["params"])
        for (index, group, p), (saved_group, place) in zip(self._parameters(), places, strict=True):
            if entry := state_dict["state"].get(place):
                try:
                    self.state[p] = _restored(entry, _moments_of(saved_group), group, p, index)
                except ValueError as error:
                    raise ValueError(f"state of parameter {index}: {error}") from None


@lru_cache(maxsize=64)
def _step(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, residual: Residual, number: int
) -> AdamStep:
    """What the update of this number multiplies by."""
    size = lr * math.sqrt(1 - beta2**number) / (1 - beta1**number)
    kept = (1 / beta1 - 1) / size if residual == "moment1" and size != 0 else 0.0
    return AdamStep(beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay * lr, size, kept)


class _Update(NamedTuple):
    """Of one parameter.

    Attributes:
        codes: what holds its weight; None for a float.
        state: empty before the first.
        seeds: of the moments' noise and of the codes'.
    """

    p: Tensor
    grad: Tensor
    codes: Any
    state: Mapping[str, Any]
    moments: Moments
    step: AdamStep
    seeds: tuple[int, int, int]


def _run(update: _Update) -> tuple[Tensor, Tensor]:
    """Update the parameter; gives what holds its moments."""
    p, grad, codes, _, moments, _, _ = update
    kernels = native.kernels
    covered = moments.by_row and not _is_small(p.shape) and p.is_cpu and grad.is_cpu
    covered = covered and p.dtype is grad.dtype is torch.float32
    covered = covered and (p.is_contiguous() if codes is None else codes.kernel_codes is not None)
    if covered and kernels is not None and (fused := _fused(kernels)) is not None:
        return _run_kernel(kernels, fused, update)
    return _run_definition(update)


def _run_definition(update: _Update) -> tuple[Tensor, Tensor]:
    p, grad, codes, state, moments, step, seeds = update
    held_values = p.data if codes is None else codes.coded.dequantize()
    values, grad = (x.float() if x.dtype in _HALF else x for x in (held_values, grad))
    if state:
        m, v = moments.decode(state["exp_avg"], state["exp_avg_sq"], p.shape)
    else:
        m, v = torch.zeros_like(values), torch.zeros_like(values)
    # In the order of fairseq's Adam, for its bits.
    m.mul_(step.beta1).add_(grad, alpha=step.rest1)
    v.mul_(step.beta2).addcmul_(grad, grad, value=step.rest2)
    root = v.sqrt() if moments.formats(p.shape) == (_FLOAT32, _FLOAT32) else _root(v)
    deviation = root.add_(step.eps)
    if codes is not None:
        taken = values.mul_(step.decay).addcdiv_(m, deviation, value=step.size)
        if step.residual != 0:
            codes.subtract_(taken, seeds[2], leave_rest=True)
            m.addcmul_(taken, deviation, value=step.residual)
        else:
            codes.subtract_(taken, seeds[2])
    else:
        if step.decay != 0:
            values.add_(values, alpha=-step.decay)
        values.addcdiv_(m, deviation, value=-step.size)
        if p.dtype in _HALF:
            p.data.copy_(values)
    return moments.encode(m, v, seeds[:2])


def _run_kernel(kernels: native.Kernels, fused: bool, update: _Update) -> tuple[Tensor, Tensor]:
    p, grad, codes, state, moments, step, seeds = update
    m, v = (state.get(name) for name in ("exp_avg", "exp_avg_sq"))
    if m is None or v is None:
        m, v = (torch.empty(fmt.nbytes(_matrix(p.shape)), dtype=torch.uint8) for fmt in moments.formats(p.shape))
    else:
        _check("exp_avg", m, moments.first, p.shape)
        _check("exp_avg_sq", v, moments.second, p.shape)
        m, v = m.contiguous(), v.contiguous()
    held = AdamMoments(m, v, moments.second, moments.rounding == "stochastic", seeds[:2], not state)
    if codes is None:
        kernels.adam(step, fused, p, grad.contiguous(), held)
    else:
        changed = kernels.adam_of_codes(step, fused, codes.kernel_codes, seeds[2], grad.contiguous(), held)
        codes.record_update(changed)
    return m, v


@cache
def _fused(kernels: native.Kernels) -> bool | None:
    """Whether torch rounds a product and its sum once on this CPU, or each; the kernels are told to do the same.

    Found by two updates of one matrix, which the kernels make in both ways. None where neither gives the definition's
    bits.
    """
    moments, generator = Moments(formats.parse("int8/row"), formats.parse("log8/row")), torch.Generator()

    def sample(run: Callable[[_Update], tuple[Tensor, Tensor]]) -> list[Tensor]:
        generator.manual_seed(0)
        p, state = torch.randn(67, 65, generator=generator), dict[str, Tensor]()
        for number in (1, 2):
            step = _step(0.1, 0.9, 0.98, 1e-8, 0.1, "none", number)
            m, v = run(_Update(p, torch.randn(67, 65, generator=generator), None, state, moments, step, (1, 2, 3)))
            state = {"exp_avg": m, "exp_avg_sq": v}
        return [p, m, v]

    expected = sample(_run_definition)
    for fused in (True, False):
        if all(map(torch.equal, sample(partial(_run_kernel, kernels, fused)), expected)):
            return fused
    warnings.warn(
        f"dsq_adam: the {kernels.isa} kernels do not give the definition's bits on this CPU; it updates in plain "
        "torch, which is slower",
        stacklevel=2,
    )
    return None


def _restored(
    entry: Mapping[str, Any], saved: Moments, group: Mapping[str, Any], p: Tensor, index: int
) -> dict[str, Any]:
    """A parameter's state from one that was saved."""
    if not {"step", "exp_avg", "exp_avg_sq"} <= entry.keys():
        raise ValueError(f"got {', '.join(map(str, entry))}, expected step, exp_avg and exp_avg_sq, as of an Adam")
    step, own = int(entry["step"]), _moments_of(group)
    exp_avg, exp_avg_sq = (entry[name].detach().to(p.device, copy=True) for name in ("exp_avg", "exp_avg_sq"))
    exp_avg, exp_avg_sq = (held.float() if held.dtype in _HALF else held for held in (exp_avg, exp_avg_sq))
    # Also checks them.
    m, v = saved.decode(exp_avg, exp_avg_sq, p.shape)
    if saved.formats(p.shape) != own.formats(p.shape):
        m = m.masked_fill(v == 0, 0.0)  # as it is in Adam; not where v fell into a zero bin
        exp_avg, exp_avg_sq = own.encode(m.float(), v.float(), _seeds(group, step, index)[:2])
    return {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _seed(group: Mapping[str, Any], step: int, index: int, which: int) -> int:
    return noise_seed(group["seed"], step, index, which)


def _seeds(group: Mapping[str, Any], step: int, index: int) -> tuple[int, int, int]:
    """Of the two moments and of the codes."""
    return _seed(group, step, index, 0), _seed(group, step, index, 1), _seed(group, step, index, 2)
