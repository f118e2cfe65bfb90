"""Turn a float model into its DSQ twin, in place."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from fairseq_dsq.nn.context import DSQContext
from fairseq_dsq.nn.linear import DSQConv1D, DSQLinear
from fairseq_dsq.nn.saved import Activation, DSQDropout, DSQLayerNorm, DSQRMSNorm, is_known_activation
from fairseq_dsq.precision import Rule

# Makes the twin of a float module in a context, holding its very parameters; raises ValueError for what it cannot be.
Make = Callable[[Any, DSQContext], nn.Module]
_TWINS: dict[type, Make] = {nn.Linear: DSQLinear.from_float}
_DROPOUTS: set[type] = {nn.Dropout}
_NORMS: dict[type, Make] = {nn.LayerNorm: DSQLayerNorm.from_float, nn.RMSNorm: DSQRMSNorm.from_float}


def register_twin(kind: type[nn.Module], make: Make) -> None:
    """Have :func:`convert` replace modules of ``kind`` by what ``make`` makes of them.

    A subclass may have a path of its own, and is left alone. Layers of the twin are quantized by themselves where a
    skip pattern names them: its children that are :class:`DSQLinear`.
    """
    _TWINS[kind] = make


def register_dropout(kind: type[nn.Module]) -> None:
    """Have the stash scope ``all`` draw masks of modules of ``kind`` again; :class:`DSQDropout` says what it reads."""
    _DROPOUTS.add(kind)


def _maker(module: nn.Module) -> Make | None:
    kind = type(module)
    # By name, since transformers need not be installed.
    hugging_face = ("transformers.pytorch_utils", "transformers.modeling_utils")
    if kind.__module__ in hugging_face and kind.__qualname__ == "Conv1D":
        return DSQConv1D.from_float
    return _TWINS.get(kind)


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
        if _maker(child):
            yield module, attribute, name
        elif not (_is_other_attention(child) or isinstance(child, nn.Linear)):
            yield from _convertible(child, f"{name}.")


# Their weights of several dimensions are looked up, or multiply value by value.
_NO_PRODUCTS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.PReLU)


def _is_matrix(parameter: Tensor | None) -> bool:
    if parameter is None or nn.parameter.is_lazy(parameter):
        return parameter is not None
    return sum(size != 1 for size in parameter.shape) >= 2


def _why_float(module: nn.Module) -> str | None:
    """What a module multiplies that is not quantized; None for one that is, or where nothing says that it multiplies.

    A module's parameters tell, and some names: what its code does with its submodules' weights cannot be seen.
    """
    if getattr(module, "products_are_quantized", False):
        return None
    if _is_other_attention(module):
        return "reads its weights directly"
    if isinstance(module, nn.Linear):
        return "is more than an nn.Linear"
    matrices = [name for name, parameter in module._parameters.items() if _is_matrix(parameter)]
    if matrices and not isinstance(module, _NO_PRODUCTS):
        known = type(module).__module__.startswith("torch.nn.")
        return f"{'multiplies' if known else 'may multiply'} by {', '.join(matrices)}"
    # fairseq's decoders without an output projection of their own.
    if getattr(module, "share_input_output_embed", False) and not hasattr(module, "output_projection"):
        return "multiplies by its embedding"
    kinds = {type(part) for part in list(module.modules())[1:]}
    innermost = "Attention" in type(module).__name__ and not any("Attention" in kind.__name__ for kind in kinds)
    if innermost and any(issubclass(kind, DSQLinear) for kind in kinds):
        return "multiplies activations by activations"
    return None


def left_float(model: nn.Module) -> dict[str, str]:
    """The modules of a converted model that multiply in float: nothing of theirs is quantized, packed or counted.

    Returns:
        Full name -> class and what it multiplies. Layers that a skip pattern left out are not among them: their GEMMs
        are counted, as float32.
    """
    found: dict[str, str] = {}

    def visit(module: nn.Module, name: str) -> None:
        why = _why_float(module)
        if why is not None:
            found[name or "model"] = f"{type(module).__name__} {why}"
        if why is None or not (_is_other_attention(module) or isinstance(module, nn.Linear)):
            for attribute, child in module.named_children():
                visit(child, f"{name}.{attribute}" if name else attribute)

    visit(model, "")
    return found


def warn_of_float(model: nn.Module, skip: Sequence[str] = ()) -> None:
    """One warning that names what :func:`left_float` finds, but for what a skip pattern matches."""
    found = {name: what for name, what in left_float(model).items() if not matching_patterns(skip, name)}
    if found:
        names = "; ".join(f"{name}: {what}" for name, what in found.items())
        warnings.warn(f"{names}: stays float, neither quantized nor counted", stacklevel=3)


def _keepers(module: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Module, str, str]]:
    """(parent, attribute, full name) of the layers, other than GEMMs, that can keep less for backward."""
    for attribute, child in module._modules.items():
        if child is None or isinstance(child, DSQDropout):
            continue
        name = f"{prefix}{attribute}"
        if type(child) in _NORMS or type(child) in _DROPOUTS:
            yield module, attribute, name
        else:
            yield from _keepers(child, f"{name}.")


def _keep_less(model: nn.Module, context: DSQContext, choose: Callable[[str], DSQContext | None]) -> None:
    """Have what runs between a converted model's GEMMs keep what the stash scope says, unless ``choose`` gives none."""
    if context.stash_scope == "all":
        hooked = []
        for parent, attribute, name in list(_keepers(model)):
            own, child = choose(name), parent.get_submodule(attribute)
            if own is not None and _has_hooks(child):
                hooked.append(name)
            elif own is not None:
                setattr(parent, attribute, _NORMS.get(type(child), DSQDropout)(child, own))
        if hooked:
            warnings.warn(f"stash scope all: {', '.join(hooked)}: has hooks, keeps what torch keeps", stacklevel=3)
    module: Any
    for module in model.modules():
        # fairseq's layers call their activation between fc1 and fc2, which packs the same values for its own gradient.
        function, fc1, fc2 = (getattr(module, name, None) for name in ("activation_fn", "fc1", "fc2"))
        if isinstance(fc1, DSQLinear) and isinstance(fc2, DSQLinear) and is_known_activation(function):
            module.activation_fn = Activation(function, fc2.context)


def _refuse(model: nn.Module, context: DSQContext, skip: Sequence[str]) -> None:
    """Refuse what :func:`convert` would pass over without a word.

    Raises:
        TypeError: one pattern, whose letters would be the patterns.
        ValueError: a module that was converted in another context, and would stay there.
    """
    if isinstance(skip, str):
        raise TypeError(f"skip: got {skip!r}, expected a list of patterns: [{skip!r}]")
    for name, module in model.named_modules():
        own = getattr(module, "context", None)
        if not isinstance(own, DSQContext) or own is context or own.parent is context:
            continue
        if own.packs or own.ledger is not context.ledger:
            raise ValueError(
                f"{name or 'model'}: converted already, in another context, expected a float model: set_precision "
                "changes the level, and rules give modules levels of their own"
            )


def convert(
    model: nn.Module,
    context: DSQContext,
    skip: Sequence[str] = (),
    optional: Iterable[str] = (),
    warn: bool = True,
    rules: Sequence[Rule] = (),
) -> nn.Module:
    """Replace every nn.Linear, Hugging Face Conv1D and layer of :func:`register_twin` by its quantized twin.

    Under the stash scope ``all``, every LayerNorm, RMSNorm and dropout too, unless it has hooks, which is warned of;
    activation functions between fairseq's fc1 and fc2 under either. Parameters stay the same objects: names, ties and
    values are kept, and an optimizer may exist already. One warning names whatever else multiplies, see
    :func:`left_float`; a pattern of ``skip`` silences it. Rules that never win are warned of.

    Args:
        model: any torch module, changed in place; itself a layer that has a twin, that is returned.
        context: precision, rounding, box direction and ledger that the layers share.
        skip: shell-style patterns; a module whose name, or a containing module's name, matches stays float32 (its
            GEMMs are still counted, as float32).
        optional: the patterns that need not match a layer.
        warn: say what stays float; who converts more calls :func:`warn_of_float` after that.
        rules: levels of their own for the modules that match; ``skip`` goes before them, and the first match wins.

    Returns:
        The converted model.

    Raises:
        ValueError: a pattern that matches no layer, a layer with hooks (quant noise), an attention option that has no
            quantized path, or a module that was converted in another context; the message names it. The model is left
            as it was.
        TypeError: ``skip`` is a str.
    """
    _refuse(model, context, skip)
    if _maker(model):
        holder = nn.Sequential(model)
        convert(holder, context, skip, optional, warn, rules)
        context.together.hang_on(holder[0])
        return holder[0]
    float_context = context.float32()
    choices = [(pattern, float_context) for pattern in skip]
    for rule in rules:
        own = context.ruled(rule.levels) if any(level.rounds for level in rule.levels) else float_context
        choices.append((rule.pattern, own))
    left_out = [pattern for pattern, own in choices if own is float_context]
    used: set[int] = set()
    first: dict[int, str] = {}  # where a choice matches: the pattern that wins

    def choose(name: str) -> DSQContext:
        """The context of a module: the first pattern's that matches it or what contains it."""
        matching = matching_patterns([pattern for pattern, _ in choices], name)
        found = [number for number, (pattern, _) in enumerate(choices) if pattern in matching]
        if not found:
            return context
        winner, own = choices[found[0]]
        used.update(number for number in found if choices[number][1] is own)
        first.update((number, winner) for number in found if number not in first)
        return own

    twins: dict[str, tuple[nn.Module, str, nn.Module]] = {}
    for parent, attribute, name in _convertible(model):
        module = parent.get_submodule(attribute)
        if any(_has_hooks(part) for part in module.modules()):
            raise ValueError(f"{name}: has hooks, which conversion would lose (is quant noise or spectral norm on?)")
        make = _maker(module)
        assert make is not None
        try:
            twin = make(module, choose(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for part, layer in twin.named_children():
            if isinstance(layer, DSQLinear):
                layer.context = choose(f"{name}.{part}")
        twins[name] = parent, attribute, twin
    if context.stash_scope == "all":
        for _, _, name in _keepers(model):
            choose(name)
    replaced = tuple(f"{name}." for name in twins)
    left = [name for name in left_float(model) if not f"{name}.".startswith(replaced)]
    excused = set(optional).union(*(matching_patterns(left_out, name) for name in left))
    idle = {n: pattern for n, (pattern, _) in enumerate(choices) if n not in used and pattern not in excused}
    if unknown := {pattern for number, pattern in idle.items() if number not in first}:
        kind = "skip" if unknown <= set(skip) else "rule"
        patterns = ", ".join(sorted(map(repr, unknown)))
        raise ValueError(f"{kind} pattern {patterns} matches no layer, expected such as decoder.output_projection")
    # Not refused: checkpoints of trainings under such rules are to load.
    for number, pattern in idle.items():
        warnings.warn(
            f"rule pattern {pattern!r}: has no effect, its layers match a pattern before it, {first[number]!r}",
            stacklevel=2,
        )
    for parent, attribute, twin in twins.values():
        setattr(parent, attribute, twin)
    _keep_less(model, context, lambda name: None if (own := choose(name)) is float_context else own)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # else its fused inference path reads the raw weights
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which only that path takes
    context.together.hang_on(model)
    if warn:
        if not any(isinstance(module, DSQLinear) for module in model.modules()):
            warnings.warn("found no layer to quantize, expected an nn.Linear or the like", stacklevel=2)
        warn_of_float(model, left_out)
    return model
