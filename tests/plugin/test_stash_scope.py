"""``--dsq-stash-scope`` on a whole training step, criterion included."""

import pytest
import torch
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY
from fairseq.data import Dictionary
from nn.common import difference, held_bytes, saved_tensors

from fairseq_dsq.plugin import probe

# The layers' own widths, a vocabulary as large beside them as in a real one with 2 + 2 of 12 layers.
FLAGS = "--encoder-layers 2 --decoder-layers 2"
SIZES = {"vocabulary": 3000, "length": 32, "tokens": 256}


def build(scope=None, level="[2,2,2,16]", flags=""):
    """The float model, or a DSQ model with one level."""
    arch = "transformer_iwslt_de_en"
    if scope is not None:
        arch, flags = "transformer_dsq_iwslt_de_en", f"{flags} --dsq-levels {level} --dsq-stash-scope {scope}"
    spec = probe.ModelSpec(arch, f"{FLAGS} {flags}", **SIZES)
    return spec, probe.build(spec, "cpu")


def criterion(name):
    options = {"label_smoothing": 0.1} if "smoothed" in name else {}

    class Task:
        target_dictionary = Dictionary()

    return CRITERION_REGISTRY[name].build_criterion(
        CRITERION_DATACLASS_REGISTRY[name](sentence_avg=False, **options), Task()
    )


def loss_and_held(spec, model, name):
    with saved_tensors() as saved:
        loss, _, _ = criterion(name)(model, probe.sample(model, spec))
    return loss, held_bytes(saved, model.parameters())


@pytest.mark.parametrize("name", ["label_smoothed_cross_entropy", "cross_entropy"])
def test_a_step_saves_a_sixth_of_the_float_models_bytes(name):
    held = {}
    for scope, prefix in ((None, ""), ("gemm", "dsq_"), ("all", ""), ("all", "dsq_")):
        _, held[scope] = loss_and_held(*build(scope), prefix + name)
    floats, gemm, everything = (sum(bytes_of.values()) for bytes_of in held.values())
    assert 6 * everything <= floats
    assert 2 * everything < gemm < floats / 1.8
    assert held["all"][torch.float32] < 0.01 * floats


def test_both_scopes_compute_the_same_loss_and_charge_the_same_stash():
    results = {}
    for scope in ("gemm", "all"):
        torch.manual_seed(0)
        spec, model = build(scope, "[16,4,4,16]", "--dropout 0")
        loss, _ = loss_and_held(spec, model, "dsq_label_smoothed_cross_entropy")
        stash = model.dsq.context.ledger.stash_bytes
        loss.backward()
        results[scope] = loss, stash, dict(model.named_parameters())
    (loss, stash, parameters), (same, same_stash, others) = results.values()
    assert torch.equal(loss, same) and stash == same_stash
    for name, parameter in parameters.items():
        if "k_proj.bias" not in name:  # zero but for rounding
            assert difference(others[name].grad, parameter.grad) < 0.05, name


@pytest.mark.parametrize("scope", ["gemm", "all"])
def test_log_probabilities_are_fairseqs(scope):
    _, model = build(scope)
    float_model = build()[1]
    logits = torch.randn(2, 5, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = (logits, {})
    for log_probs in (True, False):
        expected = float_model.get_normalized_probs(output, log_probs)
        with saved_tensors() as saved:
            actual = model.get_normalized_probs(output, log_probs)
        assert torch.equal(actual, expected)
        assert (torch.uint8 in held_bytes(saved)) == (scope == "all" and log_probs)
        with torch.no_grad():
            assert type(model.get_normalized_probs(output, log_probs)) is torch.Tensor


def test_adaptive_softmax_stays_fairseqs():
    spec, model = build("all", flags="--adaptive-softmax-cutoff 1000,2000")
    output = model(**probe.sample(model, spec)["net_input"])
    log_probs = model.get_normalized_probs(output, True)
    assert log_probs.shape[-1] == SIZES["vocabulary"]
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(8, 32), atol=1e-4)
