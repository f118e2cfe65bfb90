"""What a step is said to hold, against the bytes that a real model, its optimizer and autograd hold."""

import argparse
import dataclasses

import pytest
import torch
from fairseq import optim
from nn.common import tensors_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fairseq_dsq.bench import train_step
from fairseq_dsq.ledger import Update
from fairseq_dsq.nn import attention
from fairseq_dsq.plugin import probe
from fairseq_dsq.plugin.footprint import Step, quantized
from fairseq_dsq.plugin.held import MOST_KNOWN, known_update, saved_bytes, update_of
from fairseq_dsq.precision import PrecisionConfig

TINY = probe.ModelSpec(
    "transformer_iwslt_de_en",
    "--encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 64 --encoder-ffn-embed-dim 96 --decoder-embed-dim 64 "
    "--decoder-ffn-embed-dim 96 --no-token-positional-embeddings --share-decoder-input-output-embed",
    vocabulary=97,
    length=9,
    tokens=27,
)
DIRECT = "--dsq-weights direct --dsq-weight-format int4/row --optimizer dsq_adam --dsq-moment1 int4/row"
LEVEL = PrecisionConfig((2, 2, 2, 16))


def with_flags(spec, flags):
    return dataclasses.replace(spec, flags=f"{spec.flags} {flags}")


@pytest.mark.parametrize(
    ("flags", "arch"),
    [
        ("", "float"),
        ("--optimizer sgd --momentum 0.9", "float"),
        ("--optimizer adafactor", "float"),
        ("--optimizer dsq_adam", "float"),
        ("--optimizer dsq_adam", "dsq"),
        (DIRECT, "dsq"),
    ],
)
def test_weights_gradients_and_states_are_the_bytes_reachable_after_an_update(flags, arch):
    spec, level = (TINY, None) if arch == "float" else (quantized(TINY, "gemm"), LEVEL)
    spec = with_flags(spec, flags)
    said = Step(spec, level).held(spec.batch)

    real = Step(spec, level, "cpu")
    optimizer = optim.build_optimizer(real.config.optimizer, list(real.model.parameters()))
    real.loss(spec.batch).backward()
    optimizer.step()
    reachable = tensors_of([real.model, dict(optimizer.optimizer.state)], {})
    placeholders = [p for p in real.model.parameters() if hasattr(p, "dsq_codes")]
    assert (len(placeholders) > 10) == (flags == DIRECT)
    buffers = {name: buffer for name, buffer in real.model.named_buffers() if not name.endswith(("_codes", "_scale"))}
    masks = 4 * spec.length**2  # the decoder's, of later positions
    own = 4 * len(placeholders) + sum(buffer.nbytes for buffer in buffers.values()) + masks
    assert said.weights + said.gradients + said.states == sum(reachable.values()) - own
    assert own < 1000

    update = update_of(real.model, optimizer)
    assert update == Step(spec, level).update
    assert (said.weights, said.gradients, said.states) == update[1:]
    if flags == "":
        assert update == update.in_float32 == Update(update.values, *(update.values * n for n in (4, 4, 8)))


def test_the_bytes_of_few_steps_are_kept_where_each_drops_other_layers():
    model = nn.Sequential(*(nn.Linear(size, 1, bias=False) for size in range(1, 8)))
    optimizer = argparse.Namespace(optimizer=torch.optim.SGD(model.parameters(), momentum=0.9))
    known = {}
    for mask in (*range(128), 127, 3, 127):
        for bit, parameter in enumerate(model.parameters()):
            parameter.grad = torch.ones_like(parameter) if mask >> bit & 1 else None
        optimizer.optimizer.step()
        update, states = known_update(model, optimizer, known)
        assert update == update_of(model, optimizer) and len(known) <= MOST_KNOWN
        assert update.values == sum(bit + 1 for bit in range(7) if mask >> bit & 1)
        # Of the states of layers that were dropped an update reads nothing.
        assert update.state_bytes == 4 * update.values
        assert states == 4 * sum(len(state["momentum_buffer"][0]) for state in optimizer.optimizer.state.values())


@pytest.mark.parametrize("scope", [None, "gemm", "all"])
def test_what_autograd_keeps_is_what_bench_memory_measures(monkeypatch, scope):
    monkeypatch.setattr(train_step, "ARCH", "transformer_tiny")
    flags = None if scope is None else f"--dsq-levels [2,2,2,16] --dsq-stash-scope {scope}"
    spec = with_flags(
        probe.ModelSpec("transformer_tiny", tokens=96), "--criterion label_smoothed_cross_entropy --label-smoothing 0.1"
    )
    # On a CPU attention looks whether there is padding to be put last; elsewhere it keeps the order without looking.
    monkeypatch.setattr(attention, "_order", lambda mask: None)
    step = Step(spec) if scope is None else Step(quantized(spec, scope), LEVEL)
    held = step.held(spec.batch)
    run = train_step.training_step(flags, spec.tokens)
    with sdpa_kernel(SDPBackend.MATH):  # a CPU's fused attention keeps less
        assert held.stash + held.saved == saved_bytes(run, run.model)
    assert (held.stash > 0) == (scope is not None)


def test_the_stash_is_what_the_ledger_counts_and_a_criterion_s_twin_changes_nothing():
    spec = quantized(TINY, "all")
    held = Step(spec, LEVEL).held(spec.batch)
    assert held == Step(with_flags(spec, "--criterion dsq_cross_entropy"), LEVEL).held(spec.batch)
    assert held.stash == probe.trace(spec, precision=LEVEL).stash_bytes
    gemm = Step(quantized(TINY, "gemm"), LEVEL).held(spec.batch)
    # Attention that computes its scores twice packs operands of T x C and S x C, and nothing of T x S.
    assert held.stash != gemm.stash and held.stash + held.saved < (gemm.stash + gemm.saved) / 2


@pytest.mark.parametrize(
    ("q", "scope"),
    [(None, None), ((2, 2, 2, 16), "gemm"), (("int8/128",) * 4, "all"), (("int3/row",) * 3 + ("float32",), "gemm")],
)
def test_the_largest_batch_fits_and_one_sentence_more_does_not(q, scope):
    spec = dataclasses.replace(TINY, length=7, tokens=7)
    step = Step(spec) if q is None else Step(quantized(spec, scope), PrecisionConfig(q))
    for more in (0, 1_234_567):
        limit = step.held(1).total + more
        found = step.largest_batch(limit)
        assert step.held(found).total <= limit < step.held(found + 1).total
    assert step.largest_batch(step.held(1).total - 1) == 0


def test_a_model_of_codes_is_charged_as_its_criterion_charges_it():
    spec = with_flags(quantized(TINY, "gemm"), f"{DIRECT} --dsq-levels [16,4,4,16] --dsq-skip *.fc1")
    level = PrecisionConfig((16, 4, 4, 16))
    model = probe.build(spec, "cpu")
    probe.step(model, spec)
    ran, said = model.dsq.context.ledger.drain(), probe.trace(spec, precision=level)

    def without_scope(counts):
        plain = {}
        for key, count in counts.items():
            plain[key._replace(scope="")] = plain.get(key._replace(scope=""), 0) + count
        return plain

    assert without_scope(said.gemms) == without_scope(ran.gemms)
    assert without_scope(said.stashes) == without_scope(ran.stashes)
    assert {str(key.precision) for key in said.gemms} == {"[16,4,4,16]", "[16|int4/row,4,int4/row,16]", "[32,32,32,32]"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--fp16", "--flags: got --fp16, expected none"),
        ("--checkpoint-activations", "--flags: got --checkpoint-activations, expected none"),
        ("--dsq-weights direct", "--flags: --optimizer: got adam, expected one that updates codes"),
        ("--criterion adaptive_loss", "--flags: --criterion: got adaptive_loss"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        Step(with_flags(quantized(TINY, "gemm"), flags), LEVEL).held(1)


def test_an_architecture_without_a_twin_is_refused():
    with pytest.raises(ValueError, match="got 'lightconv', expected one with a twin"):
        quantized(probe.ModelSpec("lightconv"), "gemm")
    assert torch.is_grad_enabled()
