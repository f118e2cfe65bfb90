"""Levels of modules by name: which rule a module follows, when its level rises, and what is refused."""

import re
import warnings

import pytest
import torch
from plugin.test_attach import Task, flags, validate
from torch import nn

from fairseq_dsq.errors import DSQError
from fairseq_dsq.plugin.attach import attach


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})
        self.head = nn.Linear(8, 4)


def ruled(rules, task=None, **changes):
    model = Model()
    attach(model, flags(rules=rules, **changes), task or Task())
    return model


def levels(model):
    return [str(layer.context.config.precision) for layer in (model.body["fc1"], model.body["fc2"], model.head)]


def test_the_first_rule_that_matches_a_module_or_what_contains_it_wins():
    assert levels(ruled("")) == ["[2,2,2,16]"] * 3
    model = ruled("head=float32; *.fc2=[4,4,4,16]; body=[8,8,8,16]; *=int8/row")
    assert levels(model) == ["[8,8,8,16]", "[4,4,4,16]", "[32,32,32,32]"]
    model = ruled("body=int8/row; *.fc2=[4,4,4,16]; head=[bfp4/32,4,4,16]")
    assert levels(model) == ["[int8/row,int8/row,int8/row,int8/row]"] * 2 + ["[bfp4/32,4,4,16]"]


@pytest.mark.parametrize(
    ("rules", "skip", "shadowed"),
    [
        ("body=[8,8,8,16]; body.fc2=[4,4,4,16]", "", {"body.fc2": "body"}),
        ("body=float32; *.fc2=[4,4,4,16]", "", {"*.fc2": "body"}),
        ("*.fc1=[4,4,4,16]; *2=[8,8,8,16]; body=[9,9,9,16]; head=bfp4; *=float32", "", {"body": "*.fc1", "*": "*.fc1"}),
        ("head=[4,4,4,16]; *.fc1=[8,8,8,16]", "head *.fc2", {"head": "head"}),
        ("head=[4,4,4,16]; head=[8,8,8,16]", "", {"head": "head"}),
        ("*.fc2=[4,4,4,16]; body=[8,8,8,16]; *=int8/row", "", {}),
        ("head=[4,4,4,16]; *=[4,4,4,16]; body=[4,4,4,16]", "", {}),  # gets what it says
        ("", "body *.fc2", {}),
    ],
)  # fmt: skip
def test_a_rule_that_others_win_everywhere_is_named(rules, skip, shadowed):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ruled(rules, skip=skip)
    assert [str(each.message) for each in caught] == [
        f"rule pattern {pattern!r}: has no effect, its layers match a pattern before it, {winner!r}"
        for pattern, winner in shadowed.items()
    ]


def test_skip_is_the_rule_float32_before_all_others():
    model = ruled("*=[8,8,8,16]", skip="head")
    assert levels(model) == ["[8,8,8,16]", "[8,8,8,16]", "[32,32,32,32]"]


def test_a_rule_s_levels_rise_with_the_schedule():
    task = Task()
    model = ruled("*.fc1=[4,4,4,16] [8,8,8,16]; head=[9,9,9,16]", task, patience=1)
    assert levels(model) == ["[4,4,4,16]", "[2,2,2,16]", "[9,9,9,16]"]
    for _ in range(2):
        validate(task, model, 3.0)
    model.train()
    assert levels(model) == ["[8,8,8,16]", "[16,4,4,16]", "[9,9,9,16]"]
    again = ruled("*.fc1=[4,4,4,16] [8,8,8,16]; head=[9,9,9,16]", patience=1)
    again.load_state_dict(model.state_dict())
    assert levels(again) == levels(model)


def test_what_runs_is_counted_and_packed_at_the_rule_s_precision():
    model = ruled("*.fc2=[4,4,4,16]; head=float32")
    x = torch.randn(16, 8)
    model.head(model.body["fc2"](model.body["fc1"](x))).sum().backward()
    ledger = model.dsq.context.ledger
    assert {(key.gemm.k, str(key.precision)) for key in ledger.gemms if key.gemm.kind == "output"} == {
        (8, "[2,2,2,16]"), (16, "[4,4,4,16]"), (8, "[32,32,32,32]"),
    }  # fmt: skip
    assert ledger.stash_bytes == 8 * (2 * 2 + 1) + 16 * (2 * 4 + 1) + 4 * 16 * 8


def test_noise_of_weights_under_different_rules_differs():
    model = ruled("*.fc2=[4,4,4,16]", rounding="stochastic")
    numbers = [layer.number for layer in (model.body["fc1"], model.body["fc2"], model.head)]
    assert len(set(numbers)) == 3


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("*.fc3=[4,4,4,16]", "rule pattern '*.fc3' matches no layer"),
        ("head", "got 'head', expected such as '*.fc2=[4,4,4,16]'"),
        ("=float32", "got '=float32', expected such as"),
        ("head=", "got 'head=', expected such as"),
        ("head=[4,4,4]", "rule 'head=[4,4,4]': level 0: got '[4,4,4]', expected four integers"),
        ("head=bfp99", "rule 'head=bfp99': level 0: "),
        ("head=[2,2,2,2] [4,4,4,4] [8,8,8,8]", "got 3 levels, expected 1, or 2 as in --dsq-levels"),
        ("head=[8,8,8,16] [4,8,8,16]", "level 1 [4,8,8,16]: q0 falls from 8 to 4"),
    ],
)
def test_a_rule_that_cannot_hold_is_refused_in_one_line(rules, message):
    with pytest.raises(DSQError, match=re.escape("argument --dsq-rules: ")) as error:
        ruled(rules)
    assert message in str(error.value) and "\n" not in str(error.value)
