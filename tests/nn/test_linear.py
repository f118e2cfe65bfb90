"""DSQLinear: an nn.Linear in all but its GEMMs, and the weight it keeps between decoding steps."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from fairseq.optim.adam import Adam as FairseqAdam
from nn.common import (
    BFP_MIXED,
    assert_product,
    config,
    context,
    difference,
    linear_reference,
    normal,
    tiny_transformer,
    uneven,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_dsq.ledger import Gemm
from fairseq_dsq.nn import BOX_DIMS, FLOAT32, DSQContext, DSQLinear, GemmConfig, LedgerKey, convert, linear, matmul
from fairseq_dsq.nn.linear import forward_group
from fairseq_dsq.precision import PrecisionConfig

K, N = 21, 18


def layer_with(how, seed=0, **options):
    torch.manual_seed(seed)
    return DSQLinear(K, N, how, **options)


def infer(layer, x):
    with torch.no_grad():
        return layer(x)


def uncached(layer, x):
    """What ``layer`` must give in inference: the autograd Function on the weight as it is now."""
    how = GemmConfig(layer.context.config.precision, "nearest", layer.context.config.box_dim)
    with torch.no_grad():
        return linear(x, layer.weight, layer.bias, how)


# A linear layer


def test_it_starts_as_nn_linear_starts():
    torch.manual_seed(3)
    plain = nn.Linear(K, N)
    torch.manual_seed(3)
    layer = DSQLinear(K, N, context(*BFP_MIXED.q))
    assert layer.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value)
    assert isinstance(layer, nn.Linear)
    assert DSQLinear(K, N, context(), bias=False).bias is None
    assert DSQLinear(K, N, context(), dtype=torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_from_float_holds_the_very_parameters(bias, training):
    plain = nn.Linear(K, N, bias=bias).train(training)
    plain.weight.requires_grad_(False)
    how = context(*BFP_MIXED.q)
    layer = DSQLinear.from_float(plain, how)
    assert layer.weight is plain.weight and layer.bias is plain.bias
    assert (layer.in_features, layer.out_features, layer.training) == (K, N, training)
    assert layer.context is how
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"][: 1 + bias]


@pytest.mark.parametrize("box_dim", BOX_DIMS)
@pytest.mark.parametrize("training", [True, False])
def test_one_step_follows_the_context(box_dim, training):
    how = context(*BFP_MIXED.q, box_dim=box_dim)
    layer = layer_with(how).train(training)
    x, grad_output = uneven(2, 7, K, seed=1).requires_grad_(), uneven(2, 7, N, seed=2)
    y = layer(x)
    y.backward(grad_output)
    expected = linear_reference(
        x.detach().flatten(0, 1), layer.weight.detach(), layer.bias.detach(),
        grad_output.flatten(0, 1), how.config,
    )  # fmt: skip
    assert_product(y.flatten(0, 1), expected["output"])
    assert_product(x.grad.flatten(0, 1), expected["grad_input"])
    assert_product(layer.weight.grad, expected["grad_weight"])
    assert_product(layer.bias.grad, expected["grad_bias"])


def test_the_precision_is_the_contexts_at_the_time():
    how = context(*BFP_MIXED.q)
    layer, x = layer_with(how), normal(5, K)
    for precision in (BFP_MIXED, PrecisionConfig((2, 2, 2, 16)), FLOAT32):
        how.set_precision(precision)
        expected = linear(x, layer.weight, layer.bias, GemmConfig(precision))
        assert torch.equal(layer(x), expected)


def test_float32_is_nn_linear_bit_for_bit():
    layer = layer_with(context())
    x = normal(2, 7, K)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(infer(layer.eval(), x), nn.functional.linear(x, layer.weight, layer.bias))


# Rounding by mode


def outputs(layer, x, grad):
    """Two outputs of a layer in succession."""
    with torch.set_grad_enabled(grad):
        return [layer(x) for _ in range(2)]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_stochastic_rounding_is_nearest_in_evaluation(grad):
    layer, x = layer_with(context(3, 3, 3, 3, rounding="stochastic")), normal(9, K)
    nearest = linear(x, layer.weight, layer.bias, config(3, 3, 3, 3))
    state = torch.get_rng_state()
    for y in outputs(layer.eval(), x, grad):
        assert torch.equal(y, nearest)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = outputs(layer.train(), x, grad)
    assert not torch.equal(first, second)
    assert not torch.equal(first, nearest)


# Evaluation without gradients, and the weight held where it is declared final


def frozen(layer):
    layer.eval().freeze()
    return layer


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "not frozen"])
@pytest.mark.parametrize("box_dim", BOX_DIMS)
@pytest.mark.parametrize(
    "precision",
    [BFP_MIXED, PrecisionConfig((5, 4, 4, 4), "fixed"), PrecisionConfig(("int8/row",) * 4), FLOAT32],
    ids=["bfp", "fixed", "int8", "float32"],
)
@pytest.mark.parametrize("shape", [(K,), (9, K), (2, 7, K), (0, K)], ids=str)
def test_inference_equals_the_uncached_result(precision, box_dim, shape, freeze):
    layer = layer_with(DSQContext(GemmConfig(precision, box_dim=box_dim))).eval()
    if freeze:
        layer.freeze()
    x = normal(*shape, seed=1)
    for _ in range(3):
        y = infer(layer, x)
        assert torch.equal(y, uncached(layer, x))
        assert not y.requires_grad


@pytest.mark.parametrize("level", [BFP_MIXED, PrecisionConfig(("int8/row",) * 4)], ids=["bfp", "int8"])
def test_operands_of_two_dtypes_or_devices_are_refused(level):
    layer = layer_with(DSQContext(GemmConfig(level)))
    for x in (normal(3, K).bfloat16(), normal(3, K).to("meta")):
        with pytest.raises(RuntimeError, match=f"linear: got .*{x.dtype} on {x.device}.*, expected operands of one"):
            layer(x)
    with pytest.raises(RuntimeError, match=r"matmul: got torch\.bfloat16 on cpu and torch\.float32 on cpu, expected"):
        matmul(normal(1, 3, 4), normal(1, 4, 2).bfloat16(), GemmConfig(level))


class OperationCount(TorchDispatchMode):
    """Counts the operations that torch runs."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(layer, x):
    with OperationCount() as counter:
        infer(layer, x)
    return counter.count


def test_a_frozen_weight_is_quantized_once():
    layer, x = frozen(layer_with(context(*BFP_MIXED.q))), normal(9, K)
    first, second, third = (operations(layer, x) for _ in range(3))
    assert second == third < first
    layer.eval()
    assert layer.frozen and operations(layer, x) == first
    layer.train().eval()
    assert not layer.frozen


def test_fairseqs_preparation_for_inference_freezes_every_layer():
    model = convert(tiny_transformer(), context(*BFP_MIXED.q)).eval()
    layers = [module for module in model.modules() if isinstance(module, DSQLinear)]
    assert not any(layer.frozen for layer in layers)
    model.prepare_for_inference_(SimpleNamespace(generation=SimpleNamespace()))
    assert layers and all(layer.frozen for layer in layers)


def negate_in_place(layer):
    with torch.no_grad():
        layer.weight.neg_()


def copy_in_place(layer):
    with torch.no_grad():
        layer.weight.copy_(normal(N, K, seed=7))


def load(layer):
    layer.load_state_dict({"weight": normal(N, K, seed=7), "bias": torch.ones(N)})


def load_by_assignment(layer):
    state = {"weight": normal(N, K, seed=7), "bias": torch.ones(N)}
    layer.load_state_dict(state, assign=True)


def replace_parameter(layer):
    layer.weight = nn.Parameter(normal(N, K, seed=7))


def optimize(layer):
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer(normal(5, K, seed=8)).sum().backward()
    optimizer.step()


def optimize_fused(layer):
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    layer(normal(5, K, seed=8)).sum().backward()
    optimizer.step()


def optimize_as_fairseq(layer):
    optimizer = FairseqAdam(layer.parameters(), lr=0.1)
    layer(normal(5, K, seed=8)).sum().backward()
    optimizer.step()


def write_through_data(layer):
    layer.weight.data.add_(1)


def replace_data(layer):
    layer.weight.data = normal(N, K, seed=7)


def set_storage(layer):
    with torch.no_grad():
        layer.weight.set_(normal(N, K, seed=7))


def write_through_numpy(layer):
    layer.weight.detach().numpy()[:] = 1.0


def zero_the_bias(layer):
    with torch.no_grad():
        layer.bias.zero_()


CHANGES = [
    negate_in_place, copy_in_place, load, load_by_assignment, replace_parameter, optimize, optimize_fused,
    optimize_as_fairseq, write_through_data, replace_data, set_storage, write_through_numpy, zero_the_bias,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_evaluation_follows_whatever_writes_to_a_weight(change):
    layer, x = layer_with(context(*BFP_MIXED.q)).eval(), normal(9, K)
    before = infer(layer, x)
    change(layer)
    assert not layer.training
    after = infer(layer, x)
    assert torch.equal(after, uncached(layer, x))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("change", [load, load_by_assignment, replace_parameter], ids=lambda change: change.__name__)
def test_a_frozen_layer_follows_another_weight(change):
    layer, x = frozen(layer_with(context(*BFP_MIXED.q))), normal(9, K)
    before = infer(layer, x)
    change(layer)
    after = infer(layer, x)
    assert torch.equal(after, uncached(layer, x))
    assert not torch.equal(after, before)


def test_inference_follows_changes_of_the_parent():
    model = nn.Sequential(frozen(layer_with(context(*BFP_MIXED.q))))
    x = normal(9, K)
    infer(model, x)
    model.train()
    model[0].weight.data.add_(1)
    model.eval()
    assert torch.equal(infer(model, x), uncached(model[0], x))


def test_inference_follows_a_changed_precision():
    how = context(*BFP_MIXED.q)
    layer, x = frozen(layer_with(how)), normal(9, K)
    results = []
    levels = [(2, 2, 2, 16), (16, 4, 4, 16), (2, 2, 2, 16)]
    for q in levels:
        how.set_precision(PrecisionConfig(q))
        results.append(infer(layer, x))
        assert torch.equal(results[-1], uncached(layer, x))
    assert torch.equal(results[0], results[2])
    assert difference(results[0], results[1]) > 0.05
    how.set_precision(PrecisionConfig((2, 2, 2, 16), "fixed"))
    assert not torch.equal(infer(layer, x), results[0])
    assert torch.equal(infer(layer, x), uncached(layer, x))


def test_inference_follows_a_changed_context():
    layer, x = frozen(layer_with(context(*BFP_MIXED.q))), normal(9, K)
    quantized = infer(layer, x)
    layer.context = layer.context.float32()
    assert torch.equal(infer(layer, x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not torch.equal(infer(layer, x), quantized)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_inference_follows_a_change_of_dtype(dtype):
    layer, x = frozen(layer_with(context(*BFP_MIXED.q))), normal(9, K)
    infer(layer, x)
    layer.to(dtype)
    y = infer(layer, x.to(dtype))
    assert y.dtype == dtype
    assert torch.equal(y, uncached(layer, x.to(dtype)))


def pickled(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_follows_its_own_weight(duplicate):
    layer, x = frozen(layer_with(context(*BFP_MIXED.q))), normal(9, K)
    infer(layer, x)
    # A copy starts a count of changes of its own, which must not be taken for the original's.
    for changes in range(1, 5):
        twin = duplicate(layer)
        assert layer.frozen and not twin.frozen
        for _ in range(changes):
            with torch.no_grad():
                twin.weight.add_(1)
        assert torch.equal(infer(twin, x), uncached(twin, x)), f"after {changes} changes"


def test_training_and_gradients_in_evaluation_do_not_use_the_kept_weight():
    layer, x = frozen(layer_with(context(*BFP_MIXED.q))), normal(9, K)
    infer(layer, x)
    layer.weight.data.neg_()
    for grad, training in ((True, False), (False, True)):
        layer.training = training  # train() itself would drop the kept weight
        with torch.set_grad_enabled(grad):
            assert torch.equal(layer(x), uncached(layer, x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_then_training(mode):
    layer, x = frozen(layer_with(context(*BFP_MIXED.q))), normal(9, K)
    with mode():
        inferred = layer(x).clone()
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, inferred)
    assert layer.weight.grad is not None
    assert torch.equal(infer(layer, x), y)
    layer.train()
    layer(x).sum().backward()


def test_parameters_made_in_inference_mode():
    """They count no changes."""
    with torch.inference_mode():
        layer, x = layer_with(context(*BFP_MIXED.q)).eval(), normal(9, K)
        for _ in range(2):
            assert torch.equal(layer(x), uncached(layer, x))
            layer.weight.neg_()
            layer.eval()


def test_autocast_in_evaluation():
    layer, x = frozen(layer_with(context(*BFP_MIXED.q))), normal(9, K)
    full = infer(layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, expected = infer(layer, x), uncached(layer, x)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, expected)
    assert torch.equal(infer(layer, x), full)


# The ledger


def test_a_layer_counts_its_gemms():
    how = context(*BFP_MIXED.q)
    layer, x = layer_with(how), normal(2, 7, K)
    layer(x).sum().backward()
    layer(x.clone().requires_grad_()).sum().backward()
    layer(x)  # a forward whose backward never runs
    with torch.no_grad():
        layer(x)
    layer.eval()
    with torch.no_grad():
        layer(x)
        layer(x)
    output, grad_input, grad_weight = (
        Gemm("output", 14, K, N),
        Gemm("grad_input", 14, N, K),
        Gemm("grad_weight", K, 14, N),
    )
    counts = how.ledger.drain().gemms
    assert counts == {
        LedgerKey(output, BFP_MIXED, True): 3,
        LedgerKey(grad_weight, BFP_MIXED, True): 2,
        LedgerKey(grad_input, BFP_MIXED, True): 1,
        LedgerKey(output, BFP_MIXED, False): 3,
    }
    assert how.ledger.gemms == {} and how.ledger.stashes == {} and how.ledger.stash_bytes == 0
    assert output.macs == grad_input.macs == grad_weight.macs == 14 * K * N


def test_a_group_of_layers_counts_as_its_layers_do():
    shared, apart = context(*BFP_MIXED.q), context(*BFP_MIXED.q)
    x = normal(9, K)
    for how in (shared, apart):
        layers = [DSQLinear(K, n, how) for n in (18, 5, 18)]
        for mode in (True, False):
            for layer in layers:
                layer.train(mode)
            with torch.set_grad_enabled(mode):
                outputs = forward_group(x, layers) if how is shared else [layer(x) for layer in layers]
            if mode:
                torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert shared.ledger.gemms == apart.ledger.gemms
    assert apart.ledger.stash_bytes == 3 * shared.ledger.stash_bytes > 0
    assert {key.gemm.n for key in shared.ledger.gemms if key.gemm.kind == "output"} == {18, 5}


def test_a_left_out_layer_counts_on_the_same_ledger_as_float32():
    how = context(*BFP_MIXED.q)
    layer = layer_with(how.float32())
    layer(normal(9, K))
    assert {key.precision for key in how.ledger.gemms} == {FLOAT32}
