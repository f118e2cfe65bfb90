"""convert(): what it replaces, what it keeps, and that no GEMM of a model is left out."""

from __future__ import annotations

import copy
import warnings
from collections import Counter

import pytest
import torch
from fairseq.modules import MultiheadAttention
from nn.common import (
    BATCH,
    BFP32,
    BFP_MIXED,
    EMBED_DIM,
    FFN_DIM,
    HEADS,
    PROJECTIONS,
    SRC_LEN,
    TGT_LEN,
    Attend,
    assert_product,
    context,
    dictionary,
    difference,
    gradients_of,
    linear_reference,
    loss_of,
    normal,
    one_coarse,
    tiny_batch,
    tiny_transformer,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fairseq_dsq.ledger import Gemm
from fairseq_dsq.nn import (
    FLOAT32,
    DSQContext,
    DSQConv1D,
    DSQLinear,
    GemmConfig,
    LedgerKey,
    convert,
    left_float,
    linear,
)
from fairseq_dsq.plugin.attention import DSQMultiheadAttention
from fairseq_dsq.precision import PrecisionConfig, Rule

ENCODER, DECODER = "encoder.layers.0", "decoder.layers.0"
ATTENTIONS = (f"{ENCODER}.self_attn", f"{DECODER}.self_attn", f"{DECODER}.encoder_attn")
FEED_FORWARD = tuple(f"{layer}.{name}" for layer in (ENCODER, DECODER) for name in ("fc1", "fc2"))
OUTPUT_PROJECTION = "decoder.output_projection"
LINEARS = (
    *(f"{attention}.{projection}" for attention in ATTENTIONS for projection in PROJECTIONS),
    *FEED_FORWARD,
    OUTPUT_PROJECTION,
)


def step(model, batch=None):
    """Loss and gradients of one training step."""
    model.zero_grad()
    loss = loss_of(model, tiny_batch() if batch is None else batch)
    loss.backward()
    return loss.detach(), gradients_of(model)


def assert_same_step(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=0.0)
    assert actual[1].keys() == expected[1].keys()
    # k_proj.bias has no effect: its gradient is rounding alone, and measured by the others'.
    floor = 0.1 * max(gradient.norm() for gradient in expected[1].values() if gradient is not None)
    for name, gradient in expected[1].items():
        if gradient is None:
            assert actual[1][name] is None, name
        else:
            error = (actual[1][name] - gradient).norm()
            assert error <= tolerance * max(gradient.norm(), floor), name


def names_of(model, *kinds):
    """Every name under which a module of exactly these types is reached."""
    modules = model.named_modules(remove_duplicate=False)
    return {name for name, module in modules if type(module) in kinds}


# What is kept


SHARING = [
    {},
    {"share_decoder_input_output_embed": True},
    {"share_all_embeddings": True},
    {"encoder_layers": 2, "decoder_layers": 2, "encoder_normalize_before": True},
    {"encoder_learned_pos": True, "decoder_learned_pos": True, "layernorm_embedding": True},
]


@pytest.mark.parametrize("options", SHARING, ids=lambda options: ",".join(options) or "plain")
def test_a_converted_transformer_keeps_its_parameters(options):
    model = tiny_transformer(**options)
    parameters = list(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    twin = convert(model, context(*BFP_MIXED.q))
    assert twin is model
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in parameters]
    for (name, after), (_, before) in zip(model.named_parameters(), parameters, strict=True):
        assert after is before, name
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert not names_of(model, nn.Linear, MultiheadAttention)
    assert model.training and all(module.training for module in model.modules())


@pytest.mark.parametrize("share", ["share_decoder_input_output_embed", "share_all_embeddings"])
def test_tied_embeddings_stay_tied(share):
    model = convert(tiny_transformer(**{share: True}), context(*BFP_MIXED.q))
    projection = model.decoder.output_projection
    assert type(projection) is DSQLinear
    assert projection.weight is model.decoder.embed_tokens.weight
    if share == "share_all_embeddings":
        assert projection.weight is model.encoder.embed_tokens.weight
    step(model)
    assert projection.weight.grad is model.decoder.embed_tokens.weight.grad


def test_names_of_the_converted_layers():
    model = convert(tiny_transformer(), context(*BFP_MIXED.q))
    assert names_of(model, DSQLinear) == set(LINEARS)
    assert names_of(model, DSQMultiheadAttention) == set(ATTENTIONS)


def test_modes_and_frozen_parameters_are_kept():
    model = tiny_transformer()
    model.encoder.eval()
    model.decoder.layers[0].fc1.weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    convert(model, context(*BFP_MIXED.q))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not model.decoder.layers[0].fc1.weight.requires_grad
    assert step(model)[1]["decoder.layers.0.fc1.weight"] is None


def test_an_optimizer_made_before_trains_the_twin():
    model = tiny_transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, context(8, 8, 8, 16))
    before, _ = step(model)
    for _ in range(3):
        optimizer.step()
        after, _ = step(model)
    assert after < before


def test_checkpoints_of_the_float_model_load_into_the_twin_and_back():
    model, twin = tiny_transformer(seed=1), convert(tiny_transformer(seed=2), context())
    assert not torch.equal(*(loss_of(each, tiny_batch()) for each in (model, twin)))
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(*(loss_of(each, tiny_batch()) for each in (model, twin)))
    other = tiny_transformer(seed=3)
    other.load_state_dict(twin.state_dict())
    torch.testing.assert_close(*(loss_of(each, tiny_batch()) for each in (model, other)))


@pytest.mark.parametrize("options", SHARING, ids=lambda options: ",".join(options) or "plain")
def test_float32_equals_the_float_model(options):
    model = tiny_transformer(**options)
    expected = step(model)
    twin = convert(copy.deepcopy(model), context())
    assert_same_step(step(twin), expected)
    with torch.no_grad():
        expected, actual = (loss_of(each.eval(), tiny_batch()) for each in (model, twin))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("format_name", ["bfp", "fixed"])
def test_32_bits_are_nearly_float32(format_name):
    model = tiny_transformer()
    expected = step(model)
    how = DSQContext(GemmConfig(PrecisionConfig((32, 32, 32, 32), format_name)))
    assert_same_step(step(convert(model, how)), expected, tolerance=1e-4)


def test_dropout_draws_as_the_float_model_does():
    options = {"dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2}
    model = tiny_transformer(**options)
    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            module._set_skip_embed_dim_check()
    results = []
    for each in (model, convert(copy.deepcopy(model), context())):
        torch.manual_seed(7)
        results.append(step(each))
    assert_same_step(results[1], results[0])


@pytest.mark.parametrize("how", [(), BFP_MIXED.q], ids=["float32", "bfp"])
def test_fairseqs_activation_checkpointing(how):
    expected = step(convert(tiny_transformer(), context(*how)))
    model = convert(tiny_transformer(checkpoint_activations=True), context(*how))
    assert hasattr(model.encoder.layers[0], "precheckpoint_forward")
    assert_same_step(step(model), expected)


def test_a_copy_of_a_converted_model_has_a_context_of_its_own():
    how = context(*BFP_MIXED.q)
    model = convert(tiny_transformer(), how)
    twin = copy.deepcopy(model)
    names = names_of(twin, DSQLinear, DSQMultiheadAttention)
    contexts = {id(twin.get_submodule(name).context) for name in names}
    assert len(contexts) == 1 and id(how) not in contexts
    expected = step(model)
    how.set_precision(FLOAT32)
    assert_same_step(step(twin), expected, tolerance=0.0)


# Left out by pattern


@pytest.mark.parametrize(
    ("skip", "floats"),
    [
        ([OUTPUT_PROJECTION], {OUTPUT_PROJECTION}),
        (["output_projection"], None),
        (["*output_projection"], {OUTPUT_PROJECTION}),
        (["decoder"], {name for name in LINEARS if name.startswith("decoder")}),
        (["encoder.layers.0"], {name for name in LINEARS if name.startswith("encoder")}),
        (["*.fc?"], set(FEED_FORWARD)),
        (["*.fc[2-9]"], {name for name in FEED_FORWARD if name.endswith("fc2")}),
        ([ATTENTIONS[0]], {f"{ATTENTIONS[0]}.{name}" for name in PROJECTIONS}),
        (["*self_attn"], {name for name in LINEARS if "self_attn" in name}),
        ([f"{ATTENTIONS[2]}.v_proj"], {f"{ATTENTIONS[2]}.v_proj"}),
        (["*.k_proj", "*.q_proj"], {name for name in LINEARS if name[-6:] in ("k_proj", "q_proj")}),
        (["decoder*fc1", OUTPUT_PROJECTION], {"decoder.layers.0.fc1", OUTPUT_PROJECTION}),
        (["*"], set(LINEARS)),
        (["fc1"], None),
        (["decoder.layers"], {name for name in LINEARS if name.startswith("decoder.layers.")}),
        (["ENCODER"], None),
    ],
)  # fmt: skip
def test_skip_patterns(skip, floats):
    how = context(*BFP_MIXED.q)
    model = tiny_transformer()
    if floats is None:
        with pytest.raises(ValueError, match=f"skip pattern '{skip[0]}' matches no layer"):
            convert(model, how, skip)
        return
    convert(model, how, skip)

    def is_float(name):
        return model.get_submodule(name).context.config.precision == FLOAT32

    assert set(filter(is_float, LINEARS)) == floats
    # Attention's own products stay float with the whole attention, not with a projection of it.
    for name in ATTENTIONS:
        assert is_float(name) == all(f"{name}.{projection}" in floats for projection in PROJECTIONS)
    step(model)
    counted = Counter()
    for key, count in how.ledger.gemms.items():
        counted[key.precision] += count
    assert counted[FLOAT32] == 3 * len(floats) + 6 * sum(map(is_float, ATTENTIONS))
    assert counted.total() == 3 * len(LINEARS) + 6 * len(ATTENTIONS)


def test_left_out_layers_stay_float_when_the_level_rises():
    how = context(*BFP_MIXED.q)
    model = convert(tiny_transformer(), how, [OUTPUT_PROJECTION])
    how.set_precision(PrecisionConfig((16, 4, 4, 16)))
    step(model)
    assert {key.precision for key in how.ledger.gemms} == {how.config.precision, FLOAT32}
    assert model.decoder.output_projection.context.config.precision == FLOAT32


@pytest.mark.parametrize("matching", [[], [OUTPUT_PROJECTION], ["*"]], ids=str)
def test_a_pattern_without_a_match_leaves_the_model_as_it_was(matching):
    model = tiny_transformer()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"skip pattern 'no\.such\.layer' matches no layer"):
        convert(model, context(*BFP_MIXED.q), [*matching, "no.such.layer"])
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is module for name, module in modules.items())


def test_every_pattern_without_a_match_is_named():
    with pytest.raises(ValueError, match=r"skip pattern 'a', 'b' matches no layer"):
        convert(tiny_transformer(), context(), ["b", "*.fc1", "a"])


# What cannot be converted


def assert_untouched(model):
    assert not names_of(model, DSQLinear, DSQMultiheadAttention)


HOOKS = {
    "forward": lambda module: module.register_forward_hook(lambda *_: None),
    "forward pre": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "backward": lambda module: module.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda module: module.register_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", ["encoder.layers.0.fc1", f"{ATTENTIONS[2]}.k_proj", ATTENTIONS[0]])
def test_a_layer_with_hooks_is_refused(name, kind):
    model = tiny_transformer()
    HOOKS[kind](model.get_submodule(name))
    layer = next((each for each in ATTENTIONS if name.startswith(each)), name)
    with pytest.raises(ValueError, match=layer.replace(".", r"\.") + ".*hooks"):
        convert(model, context(*BFP_MIXED.q))
    assert_untouched(model)


def test_what_keeps_less_loses_no_hooks_and_is_named():
    model = tiny_transformer()
    calls = []
    norm = model.encoder.layers[0].final_layer_norm
    norm.register_forward_hook(lambda *_: calls.append("norm"))
    with pytest.warns(UserWarning, match=r"^stash scope all: encoder\.layers\.0\.final_layer_norm: has hooks, keeps"):
        convert(model, DSQContext(GemmConfig(BFP_MIXED), stash_scope="all"))
    step(model)
    assert calls == ["norm"] and model.encoder.layers[0].final_layer_norm is norm


def test_quant_noise_is_refused():
    model = tiny_transformer(quant_noise_pq=0.1)
    with pytest.raises(ValueError, match="quant noise"):
        convert(model, context(*BFP_MIXED.q))
    assert_untouched(model)


def test_hooks_around_a_layer_stay():
    model = tiny_transformer()
    calls = []
    model.encoder.layers[0].register_forward_hook(lambda *_: calls.append("layer"))
    convert(model, context(*BFP_MIXED.q))
    step(model)
    assert calls == ["layer"]


def test_torchs_own_attention_stays_float_with_a_warning():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match="attention: MultiheadAttention .*stays float"):
        convert(model, context(*BFP_MIXED.q))
    assert type(model["attention"]) is nn.MultiheadAttention
    assert type(model["fc"]) is DSQLinear


def test_other_attentions_are_named_too():
    class MultiheadAttention(nn.Module):
        """As fairseq's other attentions: its projections may be read directly."""

        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(4, 4)

    class SparseAttention(MultiheadAttention):
        pass

    model = nn.Sequential(nn.Sequential(SparseAttention()), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=r"0\.0: SparseAttention .*stays float"):
        convert(model, context(*BFP_MIXED.q))
    assert type(model[0][0].q_proj) is nn.Linear
    assert type(model[1]) is DSQLinear


# Plain torch models


def test_a_bare_linear_comes_back_as_its_twin():
    layer = nn.Linear(21, 18)
    how = context(*BFP_MIXED.q)
    twin = convert(layer, how)
    assert type(twin) is DSQLinear
    assert twin.weight is layer.weight and twin.bias is layer.bias and twin.context is how
    x = normal(5, 21)
    assert torch.equal(twin(x), linear(x, layer.weight, layer.bias, how.config))


def test_a_bare_attention_comes_back_as_its_twin():
    attention = MultiheadAttention(24, 2, self_attention=True)
    twin = convert(attention, context(*BFP_MIXED.q))
    assert type(twin) is DSQMultiheadAttention
    assert twin.q_proj.weight is attention.q_proj.weight


def test_a_sequential_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(21, 18), nn.ReLU(), nn.Sequential(nn.Linear(18, 5, bias=False)))
    layers = model[0], model[2][0]
    how = context(4, 4, 4, 16)
    assert convert(model, how) is model
    assert type(model[0]) is type(model[2][0]) is DSQLinear
    x = normal(7, 21)
    hidden = torch.relu(linear(x, layers[0].weight, layers[0].bias, how.config))
    assert torch.equal(model(x), linear(hidden, layers[1].weight, None, how.config))


def test_a_model_without_a_layer_to_quantize_is_warned_of():
    with pytest.warns(UserWarning, match="found no layer to quantize"):
        convert(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), context())


def test_converting_twice_changes_nothing():
    how = context(*BFP_MIXED.q)
    rules = [Rule("*.fc2", (BFP_MIXED,))]
    model = convert(tiny_transformer(), how, ["*.fc1"], rules=rules)
    modules = dict(model.named_modules())
    convert(model, how)
    assert all(modules[name] is module for name, module in model.named_modules())


@pytest.mark.parametrize("shares", ["a ledger", "nothing"])
def test_a_model_converted_in_another_context_is_refused(shares):
    """It would stay there: the second context would put nothing in force and count nothing."""
    how = context(*BFP_MIXED.q)
    torn = nn.Sequential(nn.Linear(4, 4), convert(nn.Linear(4, 4), how))
    other = DSQContext(how.config, ledger=how.ledger) if shares == "a ledger" else context()
    for model, name in ((torn, "1"), (torn[1], "model")):
        with pytest.raises(ValueError, match=f"^{name}: converted already, in another context, expected a float model"):
            convert(model, other)
    assert type(torn[0]) is nn.Linear


def test_a_lone_skip_pattern_is_refused():
    with pytest.raises(TypeError, match=r"skip: got 'head', expected a list of patterns: \['head'\]"):
        convert(nn.ModuleDict({"head": nn.Linear(4, 4)}), context(), skip="head")


def test_a_layer_used_in_several_places_is_converted_in_all():
    torch.manual_seed(0)
    layer = nn.Linear(21, 21)
    for model in (
        nn.Sequential(layer, nn.Tanh(), layer),
        nn.Sequential(layer, nn.Sequential(layer), layer),
    ):
        how = context(*BFP_MIXED.q)
        convert(model, how)
        assert not names_of(model, nn.Linear)
        model(normal(5, 21).requires_grad_()).sum().backward()
        assert sum(how.ledger.gemms.values()) == 3 * len(names_of(model, DSQLinear))


def test_a_block_used_twice_is_converted_once():
    block = nn.Sequential(nn.Linear(21, 21))
    model = nn.Sequential(block, block)
    how = context(*BFP_MIXED.q)
    convert(model, how)
    assert model[0] is model[1] and type(block[0]) is DSQLinear
    model(normal(5, 21))
    assert how.ledger.gemms[LedgerKey(Gemm("output", 5, 21, 21), BFP_MIXED, True)] == 2


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_the_feed_forward_of_torchs_encoder_layer_is_quantized(mode):
    """Its inference has a fused path that reads raw weights."""
    how = context(*BFP_MIXED.q)
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(24, 2, 40, dropout=0.0, batch_first=True)
    expected = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its attention stays float
        convert(model, how)
    x = normal(3, 5, 24)
    with torch.set_grad_enabled(mode == "training"):
        model.train(mode == "training")
        actual = model(x)
    assert {key.gemm for key in how.ledger.gemms if key.gemm.kind == "output"} == {
        Gemm("output", 15, 24, 40),
        Gemm("output", 15, 40, 24),
    }
    assert difference(actual, expected(x)) > 0.01


def test_torchs_encoder_takes_a_padding_mask_in_evaluation():
    """Nested tensors, which it makes of one, only its fused path can read."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its attention stays float
        convert(model, context(*BFP_MIXED.q))
    x, padding = normal(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=padding), expected)


# Every GEMM of a Transformer


def fresh(x, known):
    """A tensor of its own, one for each ``x``, whose gradient will be kept."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or not x.requires_grad:
        return x
    if id(x) not in known:
        known[id(x)] = x.view_as(x)
        known[id(x)].retain_grad()
    return known[id(x)]


class Recorded:
    """What goes into a module and comes out of it, both ways, during a step of its model."""

    def __init__(self, module):
        self.module = module
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        module.register_forward_hook(self.after)

    def before(self, module, args, kwargs):
        known = {}
        self.args = tuple(fresh(x, known) for x in args)
        self.kwargs = {name: fresh(x, known) for name, x in kwargs.items()}
        self.inputs = list(known.values())
        return self.args, self.kwargs

    def after(self, module, args, output):
        self.output = output[0] if isinstance(output, tuple) else output
        self.output.retain_grad()

    def results(self):
        return results_of(self.module, self.output, self.inputs)

    def replay(self, attention):
        """The results of ``attention`` on what this one was given."""
        leaves = {id(x): x.detach().requires_grad_() for x in self.inputs}
        attention.zero_grad()
        output, _ = attention(*(leaves[id(self.kwargs[x])] for x in ("query", "key", "value")))
        output.backward(self.output.grad)
        return results_of(attention, output, leaves.values())


def results_of(module, output, inputs):
    """The output and every gradient, by name."""
    return {
        "output": output.detach(),
        **{f"input {index}": x.grad for index, x in enumerate(inputs)},
        **{name: parameter.grad.clone() for name, parameter in module.named_parameters()},
    }


def recorded_step(precision):
    """Record and results of every attention and of every other layer of a Transformer."""
    model = convert(tiny_transformer(), DSQContext(GemmConfig(precision)))
    names = (*ATTENTIONS, *FEED_FORWARD, OUTPUT_PROJECTION)
    records = {name: Recorded(model.get_submodule(name)) for name in names}
    step(model)
    return {name: (record, record.results()) for name, record in records.items()}


def largest_difference(actual, expected):
    """Of any result, relative to its norm; what is rounding alone left out."""
    assert actual.keys() == expected.keys()
    results = [(actual[name], result) for name, result in expected.items()]
    return max(difference(one, other) for one, other in results if other.norm() > 1e-6)


COARSE = [one_coarse(index) for index in range(4)]
GEMM_RESULTS = {"output": "output", "grad_input": "input 0", "grad_weight": "weight"}
# Whether q0 to q3 change the output, grad_input and grad_weight of a layer.
CHANGED = [
    [True, False, False],
    [False, False, True],
    [False, True, False],
    [False, True, True],
]
coarse_levels = pytest.mark.parametrize("precision", COARSE, ids=str)
SAME, OTHER = 1e-4, 0.02


@coarse_levels
def test_two_bits_change_every_linear_gemm(precision):
    records = recorded_step(precision)
    for name in (*FEED_FORWARD, OUTPUT_PROJECTION):
        record, results = records[name]
        layer = record.module
        operands = (
            record.args[0].detach().flatten(0, -2),
            layer.weight.detach(),
            None if layer.bias is None else layer.bias.detach(),
            record.output.grad.flatten(0, -2),
        )
        at_level = linear_reference(*operands, GemmConfig(precision))
        at_32_bits = linear_reference(*operands, GemmConfig(BFP32))
        changed = []
        for kind, result_name in GEMM_RESULTS.items():
            result = results[result_name].flatten(0, -2)
            assert_product(result, at_level[kind])
            changed.append(difference(result, at_32_bits[kind].value) > OTHER)
        assert changed == CHANGED[COARSE.index(precision)], name


@coarse_levels
def test_two_bits_change_every_gemm_of_every_attention(precision):
    records = recorded_step(precision)
    gemms = (*PROJECTIONS, "scores", "values")
    at_level = dict.fromkeys(gemms, GemmConfig(precision))
    for name in ATTENTIONS:
        record, results = records[name]
        masks = record.kwargs["key_padding_mask"], record.kwargs.get("attn_mask")
        expected = record.replay(Attend(record.module, at_level, *masks))
        assert largest_difference(results, expected) < SAME, name
        for gemm in gemms:
            # Left at 32 bits, this one would give other results.
            without = at_level | {gemm: GemmConfig(BFP32)}
            left_out = record.replay(Attend(record.module, without, *masks))
            assert largest_difference(results, left_out) > OTHER, f"{name}: {gemm}"


@coarse_levels
def test_every_parameters_gradient_and_the_loss_feel_a_level(precision):
    fine = step(convert(tiny_transformer(), DSQContext(GemmConfig(BFP32))))
    coarse = step(convert(tiny_transformer(), DSQContext(GemmConfig(precision))))
    assert torch.equal(coarse[0], fine[0]) == (precision.q[0] == 32)
    for name in (f"{layer}.weight" for layer in LINEARS):
        # Nothing comes before the output projection in backward but its own GEMMs.
        unchanged = name == f"{OUTPUT_PROJECTION}.weight" and precision == COARSE[2]
        assert (difference(coarse[1][name], fine[1][name]) < 1e-6) == unchanged, name


def gemms_of(m, k, n, batch, training):
    """A GEMM and, in training, the two of its backward."""
    yield Gemm("output", m, k, n, batch)
    if training:
        yield Gemm("grad_input", m, n, k, batch)
        yield Gemm("grad_weight", k, m, n, batch)


def gemms_of_tiny_transformer(training):
    source, target, words = SRC_LEN * BATCH, TGT_LEN * BATCH, len(dictionary())
    shapes = [(target, EMBED_DIM, words, 1)]
    for rows in (source, target):
        shapes += [(rows, EMBED_DIM, FFN_DIM, 1), (rows, FFN_DIM, EMBED_DIM, 1)]
    head_dim, batch = EMBED_DIM // HEADS, BATCH * HEADS
    for queries, keys in ((SRC_LEN, SRC_LEN), (TGT_LEN, TGT_LEN), (TGT_LEN, SRC_LEN)):
        shapes += 2 * [(queries * BATCH, EMBED_DIM, EMBED_DIM, 1)]
        shapes += 2 * [(keys * BATCH, EMBED_DIM, EMBED_DIM, 1)]
        shapes += [(queries, head_dim, keys, batch), (queries, keys, head_dim, batch)]
    gemms = Counter()
    for shape in shapes:
        gemms.update(LedgerKey(gemm, BFP_MIXED, training) for gemm in gemms_of(*shape, training))
    return gemms


@pytest.mark.parametrize("training", [True, False])
def test_the_ledger_of_a_transformer(training):
    how = context(*BFP_MIXED.q)
    model = convert(tiny_transformer(), how).train(training)
    with torch.set_grad_enabled(training):
        loss = loss_of(model, tiny_batch())
    if training:
        assert {key.gemm.kind for key in how.ledger.gemms} == {"output"}  # the others have not run yet
        loss.backward()
    assert how.ledger.gemms == gemms_of_tiny_transformer(training)


@pytest.mark.parametrize("training", [True, False])
def test_macs_are_half_of_torchs_flops(training):
    model = tiny_transformer().train(training)
    twin = convert(copy.deepcopy(model), context(*BFP_MIXED.q)).train(training)
    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            module._set_skip_embed_dim_check()  # separate operations, which are counted one by one
    with torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
        loss = loss_of(model, tiny_batch())
        if training:
            loss.backward()
    with torch.set_grad_enabled(training):
        loss = loss_of(twin, tiny_batch())
    if training:
        loss.backward()
    gemms = twin.decoder.output_projection.context.ledger.gemms
    macs = sum(key.gemm.macs * count for key, count in gemms.items())
    assert 2 * macs == counter.get_total_flops() > 0


# Models of Hugging Face


TOKENS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SMALL = {
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"n_layer": 2, "n_embd": 32, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0}
        | {"embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "BertForMaskedLM": ("BertConfig", SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "LlamaForCausalLM": ("LlamaConfig", SIZES),
}


@pytest.fixture(params=SMALL)
def hugging_face_model(request):
    transformers = pytest.importorskip("hugging_face", reason="needs transformers and safetensors").transformers
    config, options = SMALL[request.param]
    torch.manual_seed(0)
    model = getattr(transformers, request.param)(getattr(transformers, config)(vocab_size=50, **options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.train()


def hugging_face_step(model):
    model.zero_grad()
    logits = model(input_ids=TOKENS).logits
    logits.square().mean().backward()
    return logits.detach(), gradients_of(model)


@pytest.mark.filterwarnings("ignore:.*stays float")
def test_a_hugging_face_model_at_float32_equals_itself(hugging_face_model):
    expected = hugging_face_step(hugging_face_model)
    parameters = dict(hugging_face_model.named_parameters())
    twin = convert(hugging_face_model, context())
    assert twin is hugging_face_model
    assert all(parameters[name] is parameter for name, parameter in twin.named_parameters())
    logits, gradients = hugging_face_step(twin)
    assert torch.allclose(logits, expected[0], rtol=1e-5, atol=1e-6)
    for name, gradient in expected[1].items():
        assert difference(gradients[name], gradient) < 1e-4 or gradient.norm() < 1e-5, name
    for frozen in (False, True):
        for module in twin.eval().modules():
            if frozen and isinstance(module, DSQLinear):
                module.freeze()
        with torch.no_grad():
            assert torch.allclose(twin(input_ids=TOKENS).logits, expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*stays float")
def test_the_ledger_sees_every_product_by_a_weight_of_a_hugging_face_model(hugging_face_model):
    with FlopCounterMode(display=False) as counter:
        hugging_face_step(hugging_face_model)
    flops = counter.get_flop_counts()["Global"]
    by_weights = sum(flops.get(operation, 0) for operation in (torch.ops.aten.mm, torch.ops.aten.addmm))
    how = context(*BFP_MIXED.q)
    hugging_face_step(convert(hugging_face_model, how))
    assert sum(2 * key.gemm.macs * count for key, count in how.ledger.gemms.items()) == by_weights > 0
    assert {key.precision for key in how.ledger.gemms} == {BFP_MIXED}


def test_what_a_hugging_face_model_still_multiplies_in_float_is_named(hugging_face_model):
    how = context(*BFP_MIXED.q)
    with pytest.warns(UserWarning, match="stays float, neither quantized nor counted") as said:
        convert(hugging_face_model, how)
    found = left_float(hugging_face_model)
    assert len(said) == 1 and all(name in str(said[0].message) for name in found)
    assert len(found) == 2 and all(what.endswith("multiplies activations by activations") for what in found.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(hugging_face_model, how, skip=list(found))


@pytest.mark.parametrize("precision", [BFP_MIXED, FLOAT32], ids=["bfp", "float32"])
def test_a_conv1d_is_a_linear_layer_of_a_transposed_weight(precision):
    hugging_face = pytest.importorskip("hugging_face", reason="needs transformers and safetensors")
    conv1d = hugging_face.transformers.pytorch_utils.Conv1D(18, 21)
    plain = nn.Linear(21, 18)
    with torch.no_grad():
        plain.weight.copy_(conv1d.weight.t()), plain.bias.copy_(conv1d.bias)
    twin, other = (convert(module, DSQContext(GemmConfig(precision))) for module in (conv1d, plain))
    assert type(twin) is DSQConv1D and twin.weight is conv1d.weight and (twin.nx, twin.nf) == (21, 18)
    x, grad = normal(2, 7, 21), normal(2, 7, 18, seed=1)
    for module in (twin, other):
        module(x).backward(grad)
    assert torch.equal(twin(x), other(x))
    assert torch.allclose(twin.weight.grad, other.weight.grad.t(), atol=1e-6)
    assert torch.equal(twin.bias.grad, other.bias.grad)
    with torch.no_grad():
        for freeze in (False, True):
            if freeze:
                twin.eval().freeze(), other.eval().freeze()
            assert torch.equal(twin(x), other(x))


# What stays float is named


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(3, 4))
        self.token = nn.Parameter(torch.zeros(1, 1, 4))


class Tied(nn.Module):
    """As fairseq's decoders that project onto their embedding."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 4)
        self.share_input_output_embed = True


class MoreThanLinear(nn.Linear):
    pass


FLOATS = [
    (lambda: MoreThanLinear(4, 4), "is more than an nn.Linear"),
    (lambda: nn.Conv1d(4, 4, 1), "multiplies by weight"),
    (lambda: nn.Conv2d(4, 4, 2), "multiplies by weight"),
    (lambda: nn.Bilinear(4, 4, 4), "multiplies by weight"),
    (lambda: nn.LSTM(4, 4), "multiplies by weight_ih_l0, weight_hh_l0"),
    (lambda: nn.GRU(4, 4), "multiplies by weight_ih_l0, weight_hh_l0"),
    (lambda: nn.RNNCell(4, 4), "multiplies by weight_ih, weight_hh"),
    (lambda: nn.MultiheadAttention(4, 2), "reads its weights directly"),
    (lambda: nn.LazyConv1d(4, 1), "multiplies by weight, bias"),
    (lambda: nn.LazyLinear(4), "is more than an nn.Linear"),
    (lambda: Raw(), "may multiply by matrix"),
    (lambda: Tied(), "multiplies by its embedding"),
]


@pytest.mark.parametrize(("make", "what"), FLOATS)
def test_whatever_multiplies_and_stays_float_is_named(make, what):
    module = make()
    model = nn.ModuleDict({"inner": nn.ModuleList([nn.Linear(4, 4), module])})
    with pytest.warns(UserWarning) as said:
        convert(model, context(*BFP_MIXED.q))
    assert [str(each.message) for each in said] == [
        f"inner.1: {type(module).__name__} {what}: stays float, neither quantized nor counted"
    ]
    assert left_float(model) == {"inner.1": f"{type(module).__name__} {what}"}
    assert left_float(module) == {"model": f"{type(module).__name__} {what}"}


def test_what_does_not_multiply_is_not_named():
    parts = [nn.Embedding(4, 4), nn.EmbeddingBag(4, 4), nn.LayerNorm((4, 4)), nn.RMSNorm((4, 4)), nn.BatchNorm1d(4)]
    for model in (nn.ModuleList([nn.Linear(4, 4), *parts, nn.PReLU(), nn.Dropout()]), tiny_transformer()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            convert(model, context(*BFP_MIXED.q))
        assert not left_float(model)
