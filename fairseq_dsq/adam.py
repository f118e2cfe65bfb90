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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from fairseq_dsq import formats
from fairseq_dsq.formats import Float32, Format
from fairseq_dsq.quantized import ROUNDINGS, QuantizedTensor, Rounding, noise_seed, pack

# Parameters of fewer values, and all of one dimension, hold their moments in float32.
SMALL = 4096
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
        ValueError: a first format without negative values, or no rounding.
    """

    first: Format
    second: Format
    rounding: Rounding = "stochastic"

    def __post_init__(self) -> None:
        if not self.first.signed:
            raise ValueError(f"moment1: got {self.first}, expected a format with negative values, such as int8/row")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding: got {self.rounding!r}, expected one of {', '.join(ROUNDINGS)}")

    @property
    def of_ratio(self) -> bool:
        """Whether m / sqrt(v) is held in place of m."""
        return not self.second.signed and self.first != Float32()

    def formats(self, shape: torch.Size) -> tuple[Format, Format]:
        """The formats of the two moments of a parameter."""
        small = len(shape) < 2 or shape.numel() < SMALL
        return (Float32(), Float32()) if small else (self.first, self.second)

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
            m = m / _dequantize(held_v, second, v.shape).sqrt_().clamp_(min=2.0**-75)
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
        return (m.mul_(v.sqrt()) if self.of_ratio and first == self.first else m), v

    def _pack(self, x: Tensor, fmt: Format, seed: int) -> Tensor:
        return x if fmt == Float32() else pack(x.float().reshape(_matrix(x.shape)), fmt, -1, self.rounding, seed).data


def _matrix(shape: torch.Size) -> torch.Size:
    """The shape in which a parameter's moments are cut into rows: its first dimension by all others."""
    return torch.Size((shape[0], shape.numel() // shape[0])) if len(shape) > 1 and shape[0] else shape


def _dequantize(held: Tensor, fmt: Format, shape: torch.Size) -> Tensor:
    if fmt == Float32():
        return held
    return QuantizedTensor(held, _matrix(shape), torch.float32, fmt, -1).dequantize().view(shape)


def _check(name: str, held: Tensor, fmt: Format, shape: torch.Size) -> None:
    if fmt == Float32():
        fits, expected = held.shape == shape and held.is_floating_point(), f"{tuple(shape)} of floats"
    else:
        nbytes = fmt.nbytes(_matrix(shape))
        fits, expected = held.dtype is torch.uint8 and held.shape == (nbytes,), f"({nbytes},) of torch.uint8 in {fmt}"
    if not fits:
        raise ValueError(f"{name}: got {tuple(held.shape)} of {held.dtype}, expected {expected}")


@cache
def _moments(first: str, second: str, rounding: Rounding) -> Moments:
    return Moments(formats.parse(first), formats.parse(second), rounding)


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
        ValueError: a format, rounding or residual that is not defined; a residual without a first moment.
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
        _moments(moment1, moment2, rounding)
        if residual not in RESIDUALS:
            raise ValueError(f"residual: got {residual!r}, expected one of {', '.join(RESIDUALS)}")
        if residual == "moment1" and betas[0] == 0:
            raise ValueError("residual: got moment1 with a beta1 of 0, expected a first moment that keeps it")
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        held = {"moment1": moment1, "moment2": moment2, "rounding": rounding, "seed": seed, "residual": residual}
        super().__init__(params, adam | held)

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
        for index, group, p in self._parameters():
            if p.grad is not None:
                self._update(index, group, p, p.grad)
        return loss

    def _update(self, index: int, group: Mapping[str, Any], p: Tensor, grad: Tensor) -> None:
        if grad.is_sparse:
            raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
        # A weight that is held as codes has no values of its own, and takes its step in integers.
        codes = getattr(p, "dsq_codes", None)
        held_values = p.data if codes is None else codes.coded.dequantize()
        values, grad = (x.float() if x.dtype in _HALF else x for x in (held_values, grad))
        moments, state = _moments_of(group), self.state[p]
        step = state.get("step", 0) + 1
        if state:
            m, v = moments.decode(state["exp_avg"], state["exp_avg_sq"], p.shape)
        else:
            m, v = torch.zeros_like(values), torch.zeros_like(values)
        beta1, beta2 = group["betas"]
        # In the order of fairseq's Adam, for its bits.
        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        step_size = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        deviation, decay = v.sqrt().add_(group["eps"]), group["weight_decay"] * group["lr"]
        if codes is not None:
            taken = values.mul_(decay).addcdiv_(m, deviation, value=step_size)
            if group["residual"] == "moment1" and step_size != 0:
                codes.subtract_(taken, _seed(group, step, index, 2), leave_rest=True)
                m.addcmul_(taken, deviation, value=(1 / beta1 - 1) / step_size)
            else:
                codes.subtract_(taken, _seed(group, step, index, 2))
        else:
            if decay != 0:
                values.add_(values, alpha=-decay)
            values.addcdiv_(m, deviation, value=-step_size)
            if p.dtype in _HALF:
                p.data.copy_(values)
        held = moments.encode(m, v, _seeds(group, step, index))
        state.update(step=step, exp_avg=held[0], exp_avg_sq=held[1])

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


def _restored(
    entry: Mapping[str, Any], saved: Moments, group: Mapping[str, Any], p: Tensor, index: int
) -> dict[str, Any]:
    """A parameter's state from one that was saved."""
    step, own = int(entry["step"]), _moments_of(group)
    exp_avg, exp_avg_sq = (entry[name].detach().to(p.device, copy=True) for name in ("exp_avg", "exp_avg_sq"))
    exp_avg, exp_avg_sq = (held.float() if held.dtype in _HALF else held for held in (exp_avg, exp_avg_sq))
    # Also checks them.
    m, v = saved.decode(exp_avg, exp_avg_sq, p.shape)
    if saved.formats(p.shape) != own.formats(p.shape):
        m = m.masked_fill(v == 0, 0.0)  # as it is in Adam; not where v fell into a zero bin
        exp_avg, exp_avg_sq = own.encode(m.float(), v.float(), _seeds(group, step, index))
    return {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _seed(group: Mapping[str, Any], step: int, index: int, which: int) -> int:
    return noise_seed(group["seed"], step, index, which)


def _seeds(group: Mapping[str, Any], step: int, index: int) -> tuple[int, int]:
    """Of the two moments."""
    return _seed(group, step, index, 0), _seed(group, step, index, 1)
