"""Turn a float model into its DSQ twin, in place."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from fairseq_dsq.nn.attention import DSQMultiheadAttention
from fairseq_dsq.nn.context import DSQContext
from fairseq_dsq.nn.linear import DSQLinear
from fairseq_dsq.nn.saved import Activation, DSQDropout, DSQLayerNorm, is_known_activation


def _is_fairseq_attention(module: nn.Module) -> bool:
    """By name, since only the registrations import fairseq; a subclass may have a path of its own."""
    kind = type(module)
    return (kind.__module__, kind.__qualname__) == ("fairseq.modules.multihead_attention", "MultiheadAttention")


def _is_dropout(module: nn.Module) -> bool:
    kind = type(module)
    return kind is nn.Dropout or (kind.__module__, kind.__qualname__) == (
        "fairseq.modules.fairseq_dropout",
        "FairseqDropout",
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_other_attention(module: nn.Module) -> bool:
    return any(kind.__name__ == "MultiheadAttention" for kind in type(module).__mro__)


def _matching(skip: Sequence[str], names: Sequence[str]) -> set[str]:
    """The patterns that one of the names matches."""
    return {pattern for pattern in skip if any(fnmatch.fnmatchcase(name, pattern) for name in names)}


def matching_patterns(skip: Sequence[str], name: str) -> set[str]:
    """The patterns that match a module's full name or the name of a module that contains it."""
    parts = name.split(".")
    return _matching(skip, [".".join(parts[:length]) for length in range(len(parts), 0, -1)])


def _convertible(module: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Module, str, str]]:
    """(parent, attribute, full name) of what is to be replaced; does not look inside what is."""
    # Not named_children(), which skips the second place of a module that is used twice.
    for attribute, child in module._modules.items():
        if child is None:
            continue
        name = f"{prefix}{attribute}"
        if type(child) is nn.Linear or _is_fairseq_attention(child):
            yield module, attribute, name
        elif _is_other_attention(child):
            warnings.warn(f"{name}: {type(child).__name__} reads its weights directly and stays float", stacklevel=3)
        elif isinstance(child, nn.Linear) and not isinstance(child, DSQLinear):
            warnings.warn(f"{name}: {type(child).__name__} is more than an nn.Linear and stays float", stacklevel=3)
        else:
            yield from _convertible(child, f"{name}.")


def _keepers(module: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Module, str, str]]:
    """(parent, attribute, full name) of the layers, other than GEMMs, that can keep less for backward."""
    for attribute, child in module._modules.items():
        if child is None or isinstance(child, DSQDropout):
            continue
        name = f"{prefix}{attribute}"
        if type(child) is nn.LayerNorm or _is_dropout(child):
            if not _has_hooks(child):
                yield module, attribute, name
        else:
            yield from _keepers(child, f"{name}.")


def _keep_less(model: nn.Module, context: DSQContext, skip: Sequence[str]) -> None:
    """Have what runs between a converted model's GEMMs keep what the context's stash scope says."""
    if context.stash_scope == "all":
        for parent, attribute, name in list(_keepers(model)):
            if not matching_patterns(skip, name):
                child = parent.get_submodule(attribute)
                twin = DSQLayerNorm.from_float(child, context) if isinstance(child, nn.LayerNorm) else None
                setattr(parent, attribute, twin or DSQDropout(child, context))
    module: Any
    for module in model.modules():
        # fairseq's layers call their activation between fc1 and fc2, which packs the same values for its own gradient.
        function, fc1, fc2 = (getattr(module, name, None) for name in ("activation_fn", "fc1", "fc2"))
        if isinstance(fc1, DSQLinear) and isinstance(fc2, DSQLinear) and is_known_activation(function):
            module.activation_fn = Activation(function, fc2.context)


def convert(model: nn.Module, context: DSQContext, skip: Sequence[str] = (), optional: Iterable[str] = ()) -> nn.Module:
    """Replace every nn.Linear and fairseq attention of ``model`` by its quantized twin.

    Under the stash scope ``all``, every nn.LayerNorm and dropout too; activation functions between fairseq's fc1 and
    fc2 under either. Parameters stay the same objects: names, ties and values are kept, and an optimizer may exist
    already.

    Args:
        model: any torch module, changed in place; itself an nn.Linear or attention, its twin is returned.
        context: precision, rounding, box direction and ledger that the layers share.
        skip: shell-style patterns; a module whose name, or a containing module's name, matches stays float32 (its
            GEMMs are still counted, as float32).
        optional: the patterns that need not match a layer.

    Returns:
        The converted model.

    Raises:
        ValueError: a pattern that matches no layer, a layer with hooks (quant noise), or an attention
            option that has no quantized path; the message names it. The model is left as it was.
    """
    if type(model) is nn.Linear or _is_fairseq_attention(model):
        holder = nn.Sequential(model)
        convert(holder, context, skip)
        return holder[0]
    float_context = context.float32()
    unused = set(skip) - set(optional)
    twins: list[tuple[nn.Module, str, nn.Module]] = []
    for parent, attribute, name in _convertible(model):
        module = parent.get_submodule(attribute)
        if any(_has_hooks(part) for part in module.modules()):
            raise ValueError(f"{name}: has hooks, which conversion would lose (is quant noise or spectral norm on?)")
        matching = matching_patterns(skip, name)
        unused -= matching
        own = float_context if matching else context
        if isinstance(module, nn.Linear):
            twins.append((parent, attribute, DSQLinear.from_float(module, own)))
            continue
        try:
            attention = DSQMultiheadAttention.from_float(module, own)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for projection, layer in attention.named_children():
            if not isinstance(layer, DSQLinear):
                continue
            matching = _matching(skip, [f"{name}.{projection}"])
            unused -= matching
            if matching:
                layer.context = float_context
        twins.append((parent, attribute, attention))
    if context.stash_scope == "all":
        for _, _, name in _keepers(model):
            unused -= matching_patterns(skip, name)
    if unused:
        patterns = ", ".join(sorted(map(repr, unused)))
        raise ValueError(f"skip pattern {patterns} matches no layer, expected such as decoder.output_projection")
    for parent, attribute, twin in twins:
        setattr(parent, attribute, twin)
    _keep_less(model, context, skip)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # else its fused inference path reads the raw weights
    return model
