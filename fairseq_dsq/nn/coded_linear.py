"""Linear layers whose weight is held as codes."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from fairseq_dsq.formats import Integer
from fairseq_dsq.gemm import Operand, Plan
from fairseq_dsq.kernels import native
from fairseq_dsq.nn.coded import (
    CodedWeight,
    WeightScale,
    code_limits,
    integers,
    to_bytes,
    update_codes,
    weight_format,
)
from fairseq_dsq.nn.context import DSQContext, GemmConfig
from fairseq_dsq.nn.linear import DSQLinear

# Of a state dict: two buffers, K, which bytes of less than 8 bits do not tell, and the format's text.
CODES, SCALE, COLUMNS, FORMAT = "weight_codes", "weight_scale", "weight_columns", "weight_format"
# What an entry's name begins with that ends in a checksum of the codes. Whoever adds up the entries of several state
# dicts, as fairseq's scripts/average_checkpoints.py does, compares their names first: bytes of codes have no average.
CHECKSUM = "weight_checksum_"
_LONGEST_TEXT = 32  # one length for all, so that a state dict's shapes do not depend on it
# Values of a weight that are updated at a time: a few integers of 64 bits stand beside each.
_AT_A_TIME = 1 << 20


@cache
def _say_slow(fmt: str) -> None:
    warnings.warn(
        f"{fmt}: no kernel updates weights of these codes; they are updated in plain torch, which is slower",
        stacklevel=2,
    )


class CodedLinear(DSQLinear):
    """A :class:`DSQLinear` whose weight is held as codes: two buffers, and no float.

    Its Parameter ``weight`` is a placeholder of one NaN in the weight's shape: autograd, clipping and data parallelism
    have a gradient to work with, and whoever reads or writes it as a weight sees NaN or an error. Its attribute
    ``dsq_codes`` is this layer: an optimizer calls ``weight.dsq_codes.subtract_(step, seed)``. The state dict holds the
    codes, the scale and the format; a float weight in a loaded one is quantized, codes of another format are decoded
    and quantized.

    Attributes:
        weight_codes, weight_scale: see :class:`CodedWeight`.
        weight_format: their format.
        weight_rule: what the scale follows from.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    weight_format: Integer
    weight_rule: WeightScale

    @classmethod
    def of(cls, layer: DSQLinear, fmt: Integer, rule: WeightScale = "own") -> CodedLinear:
        """Make ``layer`` one, in place; errors as :func:`weight_scale`."""
        weight = layer.weight
        coded = CodedWeight.of(weight, fmt, rule)
        layer.__class__ = cls
        layer = cast(CodedLinear, layer)
        layer.weight_format, layer.weight_rule = fmt, rule
        layer.register_buffer(CODES, coded.codes)
        layer.register_buffer(SCALE, coded.scale)
        layer._put_placeholder(weight.dtype, weight.requires_grad)
        return layer

    def _nan(self, dtype: torch.dtype) -> Tensor:
        """One NaN in the weight's shape."""
        value = torch.full((), torch.nan, dtype=dtype, device=self.weight_codes.device)
        return value.expand(self.out_features, self.in_features)

    def _put_placeholder(self, dtype: torch.dtype, requires_grad: bool) -> None:
        """Give the layer a new placeholder, its first parameter as in ``nn.Linear``."""
        placeholder: Any = nn.Parameter(self._nan(dtype), requires_grad)
        placeholder.dsq_codes = self
        self._parameters = {"weight": placeholder, **{k: v for k, v in self._parameters.items() if k != "weight"}}

    @property
    def coded(self) -> CodedWeight:
        """The weight."""
        shape = torch.Size((self.out_features, self.in_features))
        return CodedWeight(self.weight_codes, self.weight_scale, shape, self.weight_format)

    @property
    def config(self) -> GemmConfig:
        """The level in force, but for the weight: its codes are multiplied as they are, never rounded again."""
        return super().config.with_weight(self.weight_format)

    @property
    def kernel_codes(self) -> native.Codes | None:
        """What the native kernels update in place; None where the definition is to."""
        codes, scale = self.weight_codes, self.weight_scale
        if self.weight_format.bits != 8 or not (codes.is_cpu and codes.is_contiguous() and scale.is_contiguous()):
            return None
        return native.Codes(codes, scale, code_limits(self.weight_format, self.weight_rule))

    def record_update(self, changed: Tensor | int) -> None:
        """Take note that an update changed so many codes: autograd refuses a backward pass of the ones before."""
        self._held = None
        torch.autograd.graph.increment_version(self.weight_codes)
        self.context.ledger.record_update(changed, self.out_features * self.in_features)

    @torch.no_grad()
    def subtract_(self, step: Tensor, seed: int, leave_rest: bool = False) -> None:
        """Subtract ``step``, N x K, from the weight, rounding stochastically to its codes.

        A row, or a tensor of one scale, is NaN from then on where the step holds Inf or NaN.

        Args:
            seed: of the noise, from :func:`~fairseq_dsq.quantized.noise_seed`: the same on all replicas, another one
                for each parameter and update.
            leave_rest: ``step`` holds afterwards what of it rounding left undone: the weight held less the exact one,
                the latter clamped to what the codes can hold.
        """
        coded, kernels, weight = self.coded, native.kernels, self.kernel_codes
        covered = step.is_cpu and step.is_contiguous() and step.dtype is torch.float32 and step.numel() > 0
        if kernels is not None and weight is not None and covered:
            self.record_update(kernels.subtract(weight, step, seed, leave_rest))
            return
        if kernels is not None and step.is_cpu and self.weight_format.bits != 8:
            _say_slow(self.weight_format.text)
        limits = code_limits(self.weight_format, self.weight_rule)
        rows = max(1, _AT_A_TIME // max(1, self.in_features))
        changed, bad = torch.zeros((), dtype=torch.int64, device=step.device), []
        for start in range(0, self.out_features, rows):
            part = slice(start, start + rows)
            held = coded.codes[part]
            scale = coded.scale if len(coded.scale) == 1 else coded.scale[part]
            delta = step[part].float() / -scale
            finite = delta.isfinite()
            bad.append(~finite.all(1, keepdim=True))
            before = integers(held, self.in_features, coded.fmt)
            delta.masked_fill_(~finite, 0.0)
            after = update_codes(before, delta, limits, seed, start * self.in_features)
            changed += (after != before).sum()
            if leave_rest:
                # Exact: codes are integers, and delta keeps its fraction. What clips would pile up, and is left out.
                within = delta.clamp_(limits[0] - before, limits[1] - before)
                step[part] = (after - before).sub_(within).mul_(scale)
            held.copy_(to_bytes(after, coded.fmt))
        found = torch.cat(bad)
        coded.scale.masked_fill_(found.any() if len(coded.scale) == 1 else found, torch.nan)
        self.record_update(changed)

    def _held_weight(self, config: GemmConfig, output: Plan) -> Operand:
        if self._held is None or self._held[0] != config:
            self._held = config, self.weight, self.coded.operand(output.sides[1], -1, self.weight.dtype)
        return self._held[2]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As torch's; the placeholder stays one, the very parameter that an optimizer has, and the scale float32."""
        weight, scale = self._parameters.pop("weight"), self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype is not torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        assert weight is not None
        dtype = fn(torch.full((), torch.nan, dtype=weight.dtype, device=weight.device)).dtype
        values, grad = self._nan(dtype), weight.grad
        if torch._has_compatible_shallow_copy_type(weight, values):
            weight.grad, weight.data = None, values
            self._parameters = {"weight": weight, **self._parameters}
        else:  # to the meta device and from it torch itself makes other parameters
            self._put_placeholder(dtype, weight.requires_grad)
        if grad is not None:
            self.weight.grad = fn(grad)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the placeholder, which a copy would fill with floats."""
        parameters = {name: value for name, value in self._parameters.items() if name != "weight"}
        weight = self.weight.dtype, self.weight.requires_grad
        return {**super().__getstate__(), "_parameters": parameters, "_placeholder": weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        placeholder = state.pop("_placeholder")
        super().__setstate__(state)
        self._put_placeholder(*placeholder)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}weight"]
        destination[prefix + COLUMNS] = torch.tensor(self.in_features)
        text = self.weight_format.text.encode().ljust(_LONGEST_TEXT)
        destination[prefix + FORMAT] = torch.tensor(list(text), dtype=torch.uint8)
        codes = self.weight_codes
        checksum = 0 if codes.is_meta else zlib.crc32(bytes(codes.detach().cpu().contiguous().numpy()))
        destination[f"{prefix}{CHECKSUM}{checksum:08x}"] = torch.empty(0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
        *_, error_msgs = args
        try:
            weight = own.get(f"{prefix}weight")
            if saved_format(own, prefix) not in (None, self.weight_format):
                weight = own[f"{prefix}weight"] = saved_weight(own, prefix).dequantize()
            columns = int(own.get(prefix + COLUMNS, self.in_features))
            if weight is None and columns != self.in_features:
                raise ValueError(f"got codes of {columns} columns, expected {self.in_features}")
            if weight is not None:
                if weight.shape != self.weight.shape:
                    raise ValueError(f"got {tuple(weight.shape)}, expected {tuple(self.weight.shape)}")
                del own[f"{prefix}weight"]
                coded = CodedWeight.of(weight, self.weight_format, self.weight_rule)
                own |= {prefix + CODES: coded.codes, prefix + SCALE: coded.scale}
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}")
            return
        own = {name: value for name, value in own.items() if not _describes_codes(name.removeprefix(prefix))}
        placeholder = self._parameters.pop("weight")
        super()._load_from_state_dict(own, prefix, *args)
        self._parameters = {"weight": placeholder, **self._parameters}


def hold_codes(model: nn.Module, context: DSQContext, fmt: Integer, rule: WeightScale = "own") -> list[str]:
    """Have the layers of a converted model hold their weights as codes.

    All :class:`DSQLinear` layers of ``context`` and of its rules do; those that a skip pattern or a rule left in
    float32 do not, nor do weights that are tied to another module's (an embedding).

    Returns:
        The layers' names.

    Raises:
        ValueError: a weight of zeros; names the layer. Or a rotation of grad_input's operands, of which codes are one.
    """
    rotation = context.config.rotation
    if rotation and rotation.covers("grad_input"):
        raise ValueError(f"got codes, read as they are, beside {rotation}, expected grad_weight alone")
    places: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            places[id(parameter)] = places.get(id(parameter), 0) + 1
    names = []
    for name, module in model.named_modules():
        ours = type(module) is DSQLinear and context in (module.context, module.context.parent)
        if ours and places[id(module.weight)] == 1:
            try:
                CodedLinear.of(module, fmt, rule)
            except ValueError as error:
                raise ValueError(f"{name}.weight: {error}") from None
            names.append(name)
    return names


def weight_bytes(model: nn.Module) -> int:
    """Bytes that a model's weights take."""
    return sum(map(parameter_bytes, model.parameters()))


def parameter_bytes(parameter: Tensor) -> int:
    """Bytes that a parameter takes; those of the codes and scales where it is their placeholder."""
    layer = getattr(parameter, "dsq_codes", None)
    return parameter.numel() * parameter.element_size() if layer is None else int(layer.coded.nbytes)


def saved_format(state: Mapping[str, Tensor], prefix: str) -> Integer | None:
    """The format of a layer's codes in a state dict; None where it holds none."""
    text = state.get(prefix + FORMAT)
    return None if text is None else weight_format(bytes(text.tolist()).decode().strip())


def _describes_codes(name: str) -> bool:
    return name in (COLUMNS, FORMAT) or name.startswith(CHECKSUM)


def saved_weight(state: Mapping[str, Tensor], prefix: str) -> CodedWeight:
    """A layer's weight in a state dict that holds its codes.

    Raises:
        ValueError: the dict lacks a part of it.
    """
    fmt = saved_format(state, prefix)
    if fmt is None or prefix + SCALE not in state or prefix + COLUMNS not in state:
        raise ValueError(f"{prefix}{CODES}: got codes alone, expected {SCALE}, {COLUMNS} and {FORMAT} beside them")
    codes, columns = state[prefix + CODES], int(state[prefix + COLUMNS])
    return CodedWeight(codes, state[prefix + SCALE], torch.Size((len(codes), columns)), fmt)


def decoded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with float32 weights in place of codes, in its order; errors as :func:`saved_weight`."""
    found = {}
    for name, value in state.items():
        prefix = name[: name.rfind(".") + 1]
        last = name.removeprefix(prefix)
        if last == CODES:
            found[f"{prefix}weight"] = saved_weight(state, prefix).dequantize()
        elif last != SCALE and not _describes_codes(last):
            found[name] = value
    return found


def formats_of_codes(state: Mapping[str, Tensor]) -> set[str]:
    """The formats, as text, of the codes that a state dict holds."""
    prefixes = (name.removesuffix(CODES) for name in state if holds_codes([name]))
    return {fmt.text for prefix in prefixes if (fmt := saved_format(state, prefix))}


def holds_codes(names: Iterable[str]) -> bool:
    """Whether a state dict of such names is that of a model with coded weights."""
    return any(name.rpartition(".")[2] == CODES for name in names)
