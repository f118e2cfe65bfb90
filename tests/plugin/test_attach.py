"""Flags, the schedule's buffers, and where the schedule hangs."""

import argparse
import copy
import logging
import re
from pathlib import Path

import pytest
import torch
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY
from fairseq.logging import metrics
from fairseq.models import ARCH_MODEL_INV_REGISTRY
from fairseq.modules import MultiheadAttention
from torch import nn

from fairseq_dsq.errors import DSQError
from fairseq_dsq.models import TWINS
from fairseq_dsq.nn import DSQLinear, Rotation
from fairseq_dsq.plugin import probe
from fairseq_dsq.plugin.attach import attach
from fairseq_dsq.plugin.config import DSQOptimizerConfig, defaults, flag_table, option, set_defaults
from fairseq_dsq.schedules.plateau import PlateauState

README = Path(__file__).resolve().parents[2] / "fairseq_dsq/plugin/README.md"


class Task:
    """What a fairseq task offers to validation."""

    def __init__(self):
        self.seen = []

    def begin_epoch(self, epoch, model):
        pass

    def begin_valid_epoch(self, epoch, model):
        self.seen.append(("begin", epoch))


class TaskWithItsOwn(Task):
    def post_validate(self, model, stats, agg):
        self.seen.append(("post", stats["loss"]))


def flags(**changes):
    """The paper's levels, and those that are given."""
    if changes.get("format") != "float32":
        changes = {"levels": "[2,2,2,16] [16,4,4,16]", "patience": 5, **changes}
    args = argparse.Namespace(**{f"dsq_{name}": value for name, value in changes.items()})
    set_defaults(args)
    return args


def attached(task, **changes):
    model = nn.Sequential(nn.Linear(8, 8))
    attach(model, flags(**changes), task)
    return model


def validate(task, model, *losses):
    task.begin_valid_epoch(1, model)
    for loss in losses:
        task.post_validate(model, {"loss": loss}, None)


def test_the_level_rises_after_patience_and_all_layers_follow():
    task = Task()
    model = attached(task, patience=2)
    for loss in (5.0, 5.0, 4.0, 4.5):
        validate(task, model, loss)
        assert model.dsq.state.level == 0
    assert model[0].context.config.precision.q == (2, 2, 2, 16)
    validate(task, model, 4.0)
    assert (model.dsq.state.level, model.dsq.level_in_force) == (1, 0)
    model.train()
    assert (model.dsq.state.level, model.dsq.level_in_force) == (1, 1)
    assert model[0].context.config.precision.q == (16, 4, 4, 16)


def test_a_raised_level_waits_until_training_goes_on():
    """Later valid subsets and the checkpoint are at the level that the first subset was scored at."""
    task = Task()
    model = attached(task, patience=1)
    validate(task, model, 3.0)
    model.eval()
    task.begin_valid_epoch(2, model)
    task.post_validate(model, {"loss": 3.0}, None)
    model.eval()
    assert model[0].context.config.precision.q == (2, 2, 2, 16)
    task.post_validate(model, {"loss": 1.0}, None)
    loaded = attached(Task(), patience=1)
    loaded.load_state_dict(model.state_dict())
    loaded.eval()
    for twin in (loaded, model):
        assert twin[0].context.config.precision.q == (2, 2, 2, 16)
        assert twin.dsq.state == PlateauState(level=1, best_loss=3.0, bad_validations=0)
        twin.train()
        twin.eval()
        assert twin[0].context.config.precision.q == (16, 4, 4, 16)


@pytest.mark.parametrize(("step", "level"), [(3e-4, 0), (1e-4, 1)])
def test_losses_that_fairseq_logs_alike_are_told_apart(step, level):
    """The schedule judges what lies behind the three digits of the log."""
    task = Task()
    model = attached(task, patience=2, min_delta=2e-4)
    for index in range(4):
        with metrics.aggregate(new_root=True) as found:
            metrics.log_scalar("loss", 5.0004 - index * step, weight=7, round=3)
        task.begin_valid_epoch(1, model)
        task.post_validate(model, found.get_smoothed_values(), found)
    assert model.dsq.state.level == level


def test_only_the_first_valid_subset_counts():
    task = Task()
    model = attached(task)
    validate(task, model, 3.0, 1.0, 9.0)
    assert model.dsq.state.best_loss == 3.0
    validate(task, model, 2.5, 1.0)
    assert model.dsq.state.best_loss == 2.5


def test_a_task_s_own_hooks_are_kept():
    task = TaskWithItsOwn()
    model = attached(task)
    validate(task, model, 3.0, 1.0)
    assert task.seen == [("begin", 1), ("post", 3.0), ("post", 1.0)]


def test_a_task_is_hooked_once():
    task = TaskWithItsOwn()
    attached(task)
    model = attached(task, patience=1)
    validate(task, model, 3.0)
    validate(task, model, 3.0)
    assert task.seen.count(("post", 3.0)) == 2
    assert model.dsq.state.level == 1


def test_the_state_survives_half_precision_and_a_copy():
    task = Task()
    model = attached(task)
    validate(task, model, 1 / 3)
    model.half()
    assert model.dsq.state.best_loss == 1 / 3
    twin = copy.deepcopy(model)
    for _ in range(5):
        validate(task, twin, 1.0)
    twin.train()
    assert twin[0].context.config.precision.q == (16, 4, 4, 16)
    assert model[0].context.config.precision.q == (2, 2, 2, 16)


def test_loading_a_state_dict_puts_its_level_in_force():
    task = Task()
    trained = attached(task, patience=1)
    validate(task, trained, 2.0)
    validate(task, trained, 2.0)
    trained.train()
    fresh = attached(Task(), patience=1)
    fresh.load_state_dict(trained.state_dict())
    assert fresh.dsq.state == trained.dsq.state
    assert fresh[0].context.config.precision.q == (16, 4, 4, 16)


def test_one_level_is_static():
    task = Task()
    model = attached(task, levels="[16,4,4,16]", patience=1)
    for _ in range(4):
        validate(task, model, 1.0)
    assert model.dsq.state.level == 0


def test_few_gradient_bits_are_warned_of_once(caplog):
    with caplog.at_level(logging.WARNING):
        attached(Task(), levels="[2,2,2,4] [2,2,2,8] [16,4,4,16]")
    warnings = [record for record in caplog.records if "q3" in record.message]
    assert len(warnings) == 1
    caplog.clear()
    attached(Task(), format="float32")
    attached(Task())
    attached(Task(), levels="[4,4,4,mxfp8e5m2]")  # a float reaches further down
    assert not [record for record in caplog.records if "q3" in record.message]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sign_bit": "extra"}, "bfp3 bfp3 bfp3 bfp17"),
        ({"format": "fixed"}, "fixed2 fixed2 fixed2 fixed16"),
        ({"format": "fixed", "fixed_scale": "static"}, "fixed2.1 fixed2.1 fixed2.1 fixed16.8"),
        ({"scale": "fit"}, "bfp2-fit bfp2-fit bfp2-fit bfp16-fit"),
        ({"format": "fixed", "scale": "fit"}, "fixed2-fit fixed2-fit fixed2-fit fixed16-fit"),
        ({"fixed_scale": "static", "scale": "fit"}, "bfp2-fit bfp2-fit bfp2-fit bfp16-fit"),
        ({"format": "float32"}, "float32 float32 float32 float32"),
    ],
)
def test_flags_choose_the_formats(changes, expected):
    level = attached(Task(), **changes)[0].context.config.precision
    assert level.by_value == f"[{expected.replace(' ', ',')}]"


def test_a_static_scale_fits_nothing():
    with pytest.raises(DSQError, match="--dsq-scale: got fit beside --dsq-fixed-scale static, expected floor"):
        attached(Task(), format="fixed", fixed_scale="static", scale="fit")


def test_flags_reach_the_layers():
    model = attached(Task(), rounding="stochastic", box_dim="last", attention_matmul="off")
    context = model[0].context
    assert (context.config.rounding, context.config.box_dim, context.attention_matmul) == ("stochastic", "last", False)
    assert context.config.rotation is None
    model, args = nn.Sequential(nn.Linear(8, 8)), flags(rotate="grad_weight/32")
    args.seed = 5
    attach(model, args, Task())
    assert model[0].context.config.rotation == Rotation("grad_weight", 32, seed=5)


@pytest.mark.parametrize("changes", [{"levels": "[4|S,4,S,16]"}, {"rules": "x.*=[4,4,4,16] [4|S,4,S,16]"}])
def test_squares_are_a_weight_s(changes):
    changes = {name: value.replace("S", "bfp4/16x16") for name, value in changes.items()}
    model = nn.ModuleDict({"x": nn.ModuleDict({"attention": MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)})})
    other = copy.deepcopy(model)
    with pytest.raises(DSQError, match=r"--dsq-levels: got \[4\|bfp4/16x16,.* for x.attention, .*-matmul off: squares"):
        attach(model, flags(**changes), Task())
    attach(other, flags(**changes, attention_matmul="off"), Task())
    assert other["x"]["linear"](torch.ones(2, 8)).shape == (2, 8)


def test_codes_are_not_rotated():
    with pytest.raises(DSQError, match=r"--dsq-weights: got codes, .* the rotation backward/16, expected grad_weight"):
        attached(Task(), weights="direct", rotate="backward/16")
    attached(Task(), weights="direct", rotate="grad_weight/16")


def test_skipped_layers_stay_float32():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    attach(model, flags(skip="1"), Task())
    assert isinstance(model[1], DSQLinear)
    assert str(model[1].context.config.precision.operands("output")[0]) == "float32"
    model.dsq.validated(1.0)
    x = torch.randn(3, 8)
    assert torch.equal(model[1](x), nn.functional.linear(x, model[1].weight, model[1].bias))


def test_a_checkpoint_that_does_not_fit_is_named_in_one_line():
    flags = "--encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --encoder-attention-heads 2"
    flags += " --decoder-attention-heads 2"
    small, large = (probe.build(probe.ModelSpec("transformer_dsq", flags, vocabulary=size), "cpu") for size in (20, 30))
    with pytest.raises(DSQError, match=r"embed_tokens\.weight is 20 x 16, expected 30 x 16") as stop:
        large.load_state_dict(small.state_dict())
    assert "\n" not in str(stop.value)


def test_every_criterion_with_a_dataclass_has_a_dsq_twin():
    names = {name for name in CRITERION_DATACLASS_REGISTRY if not name.startswith("dsq_")}
    assert {"label_smoothed_cross_entropy", "cross_entropy", "sentence_prediction", "masked_lm"} <= names
    for name in names:
        assert issubclass(CRITERION_REGISTRY[f"dsq_{name}"], CRITERION_REGISTRY[name])
        assert issubclass(CRITERION_DATACLASS_REGISTRY[f"dsq_{name}"], CRITERION_DATACLASS_REGISTRY[name])


def test_the_readme_s_architectures_are_those_that_are_registered():
    text = README.read_text(encoding="utf-8").split("## Architectures")[1].split("\n\n")[2]
    listed = {model: set(re.findall(r"`(\w+)`", names)) for model, names in re.findall(r"- `(\w+)`:([^-]+)", text)}
    assert listed == {model: set(ARCH_MODEL_INV_REGISTRY[f"{model}_dsq"]) for model in TWINS}


def test_the_readme_s_flag_table_is_the_code_s():
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| `--dsq-")]
    flags = flag_table().splitlines()
    assert rows[: len(flags)] == flags
    others = [line.split("|")[1:3] for line in rows[len(flags) :]]
    moments = defaults(DSQOptimizerConfig)
    assert {name.strip(" `"): default.strip(" `") for name, default in others} == {
        option(name): default for name, default in moments.items() if name.startswith("dsq_")
    }
