"""What the dsq_ criterion charges, against the GEMMs that the probe says a step executes."""

import argparse
import dataclasses
import logging

import pytest
import torch
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY
from fairseq.data import Dictionary

from fairseq_dsq.cost import load_profile, total_cost
from fairseq_dsq.errors import DSQError
from fairseq_dsq.ledger import Gemm
from fairseq_dsq.plugin import probe
from fairseq_dsq.plugin.config import set_defaults
from fairseq_dsq.plugin.hooks import hang_on_training
from fairseq_dsq.precision import PrecisionConfig

SPEC = probe.ModelSpec(
    "transformer_dsq_iwslt_de_en",
    "--encoder-layers 2 --decoder-layers 1 --encoder-embed-dim 32 --encoder-ffn-embed-dim 48 --dropout 0 "
    "--dsq-levels [16,4,4,16]",
    vocabulary=97,
    length=9,
    tokens=27,
)
LEVEL = PrecisionConfig((16, 4, 4, 16))
COSTS = ("arithmetic", "arithmetic_baseline", "dram_bytes", "dram_baseline_bytes")


def criterion(profile):
    name = "dsq_cross_entropy"
    config = CRITERION_DATACLASS_REGISTRY[name](sentence_avg=False, dsq_cost_profile=profile)

    class Task:
        target_dictionary = Dictionary()

    return CRITERION_REGISTRY[name].build_criterion(config, Task())


def step(model, judge, backward=True):
    loss, _, logged = judge(model, probe.sample(model, SPEC))
    if backward:
        loss.backward()
    return logged


def step_of(spec, judge):
    model = probe.build(spec, "cpu")
    loss, _, logged = judge(model, probe.sample(model, spec))
    loss.backward()
    return logged


def charged(logged):
    return {name: logged[f"dsq_{name}"] for name in COSTS}


def predicted(profile, work):
    return dataclasses.asdict(total_cost(load_profile(profile), work.gemms.items(), work.stashes.items()))


@pytest.mark.parametrize("profile", ["paper", "operands"])
def test_a_training_step_is_charged_the_gemms_that_ran(profile):
    work = probe.trace(SPEC).at_precision(LEVEL)
    model, judge = probe.build(SPEC, "cpu"), criterion(profile)
    logged = step(model, judge)
    assert charged(logged) == pytest.approx(predicted(profile, work))
    assert logged["dsq_stash_bytes"] > 0
    # A second step starts anew.
    assert charged(step(model, judge)) == pytest.approx(predicted(profile, work))


def test_a_loss_that_is_never_differentiated_is_charged_its_forward_alone():
    model, judge = probe.build(SPEC, "cpu"), criterion("operands")
    logged = step(model, judge, backward=False)
    whole = step(model, judge)
    assert 3 * logged["dsq_arithmetic_baseline"] == whole["dsq_arithmetic_baseline"]


def test_validation_is_charged_its_forward_and_nothing_that_ran_before():
    work = probe.trace(SPEC, training=False).at_precision(LEVEL)
    model, judge = probe.build(SPEC, "cpu").eval(), criterion("operands")
    with torch.no_grad():
        model(**probe.sample(model, SPEC)["net_input"])  # generation for BLEU, say
        loss, _, logged = judge(model, probe.sample(model, SPEC))
    assert not loss.requires_grad
    assert charged(logged) == pytest.approx(predicted("operands", work))
    assert logged["dsq_stash_bytes"] == 0


def test_accumulated_batches_are_each_charged_their_own():
    model, judge = probe.build(SPEC, "cpu"), criterion("operands")
    alone = charged(step(model, judge))
    logs = [step(model, judge) for _ in range(3)]
    assert [charged(log) for log in logs] == [alone] * 3


@pytest.mark.parametrize("profile", ["paper", "operands"])
def test_recomputed_activations_are_charged_as_a_forward_pass_beside_the_training_s_own(profile):
    checkpointed = dataclasses.replace(SPEC, flags=f"{SPEC.flags} --checkpoint-activations")
    plain, again = (probe.build(spec, "cpu") for spec in (SPEC, checkpointed))
    again.load_state_dict(plain.state_dict())
    judge = criterion(profile)
    once, twice = step(plain, judge), step(again, judge)
    gemms = probe.trace(SPEC).at_precision(LEVEL).gemms.items()
    layers = [(key, count) for key, count in gemms if key.gemm.kind == "output" and ".layers." in key.scope]
    rule = load_profile(profile)
    repeated = [rule.gemm(key.gemm, LEVEL, training=False) * count for key, count in layers]
    extra = {name: charged(twice)[name] - charged(once)[name] for name in COSTS}
    assert extra == {
        "arithmetic": pytest.approx(sum(cost.arithmetic for cost in repeated)),
        "dram_bytes": pytest.approx(sum(cost.dram_bytes for cost in repeated)),
        "arithmetic_baseline": 0,
        "dram_baseline_bytes": 0,
    }
    assert charged(twice) == pytest.approx(predicted(profile, probe.trace(checkpointed).at_precision(LEVEL)))
    assert twice["dsq_stash_bytes"] == once["dsq_stash_bytes"]
    for name, parameter in plain.named_parameters():
        assert torch.allclose(parameter.grad, again.get_parameter(name).grad, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("profile", ["paper", "operands"])
def test_scores_that_attention_computes_twice_are_charged_twice(profile):
    flags = f"{SPEC.flags} --decoder-embed-dim 32 --dropout 0.1"
    kept = dataclasses.replace(SPEC, flags=flags, length=48, tokens=48)  # long, so that the scores are too much to keep
    everything = dataclasses.replace(kept, flags=f"{flags} --dsq-stash-scope all")
    judge, rule = criterion(profile), load_profile(profile)
    once, twice = (charged(step_of(spec, judge)) for spec in (kept, everything))
    ran = probe.trace(everything, precision=LEVEL).gemms.items()
    again = {key.gemm: sum(count for other, count in ran if other.repeated) for key, _ in ran if key.repeated}
    # Of a head's 8 features along K; the last attention's weights are asked for, which needs all of them.
    assert again == {Gemm("output", 48, 8, 48, 4): 3}
    repeated = [rule.gemm(gemm, LEVEL, training=False) * count for gemm, count in again.items()]
    assert twice["arithmetic"] - once["arithmetic"] == pytest.approx(sum(cost.arithmetic for cost in repeated))
    for name in ("arithmetic_baseline", "dram_baseline_bytes"):
        assert twice[name] == once[name]


@pytest.mark.parametrize("charges", [True, False])
def test_a_criterion_that_charges_nothing_is_said_and_leaves_no_ledger_behind(charges, caplog):
    class Task:
        def begin_epoch(self, epoch, model):
            pass

        begin_valid_epoch = begin_epoch

        def optimizer_step(self, optimizer, model, update_num):
            optimizer.optimizer.step()

    model, task = probe.build(SPEC, "cpu"), Task()
    args = argparse.Namespace(validate_interval=1, no_save=True, dsq_levels="[16,4,4,16]")
    if charges:
        args.dsq_cost_profile = "paper"
        model.dsq.cost_profile = load_profile("paper")
    set_defaults(args)
    hang_on_training(task, args)
    with caplog.at_level(logging.INFO):
        task.begin_epoch(1, model)
    said = "--criterion: logs neither the level nor costs, which the criterions dsq_<criterion> alone do"
    assert (said in caplog.messages) == (not charges)
    model(**probe.sample(model, SPEC)["net_input"])[0].sum().backward()
    sgd = argparse.Namespace(optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    task.optimizer_step(sgd, model=model, update_num=1)
    assert bool(model.dsq.context.ledger.gemms) == charges


def test_an_unknown_profile_stops_with_one_line_that_names_the_flag():
    with pytest.raises(DSQError) as error:
        criterion("nix")
    assert str(error.value) == (
        "argument --dsq-cost-profile: got 'nix', expected operands, paper or the path of a .yaml file"
    )
