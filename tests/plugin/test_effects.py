"""Flags without effect, and schedules that cannot rise."""

import argparse
import math
import random

import pytest
from omegaconf import OmegaConf

from fairseq_dsq.plugin.config import DSQConfig, defaults, set_defaults
from fairseq_dsq.plugin.effects import TrainingFlags, idle_flags, levels_of, schedule_warnings, unpriced_formats
from fairseq_dsq.schedules.cyclic import Cyclic
from fairseq_dsq.schedules.plateau import Plateau, PlateauState
from fairseq_dsq.schedules.updates import Updates


def idle(**changes):
    args = argparse.Namespace(**{f"dsq_{name}": value for name, value in changes.items()})
    set_defaults(args)
    return [line.split(":")[0] for line in idle_flags(args, levels_of(args))]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, []),
        ({"levels": "[16,4,4,16]"}, []),
        ({"patience": 3, "min_delta": 0.1, "rounding": "stochastic", "sign_bit": "extra", "box_dim": "last"}, []),
        ({"format": "fixed", "fixed_scale": "static", "sign_bit": "extra"}, []),
        ({"levels": "[16,4,4,16]", "patience": 3}, ["--dsq-patience 3"]),
        ({"levels": "[16,4,4,16]", "min_delta": 0.1}, ["--dsq-min-delta 0.1"]),
        ({"levels": "[4,4,4,16] [4,4,4,16] [16,4,4,16]"}, ["--dsq-levels [4,4,4,16] [4,4,4,16] [16,4,4,16]"]),
        ({"levels": "[4,4,4,16] [4,4,4,16]", "rules": "*.fc1=[2,2,2,16] [4,4,4,16]; *.fc2=[8,8,8,16]"}, []),
        ({"fixed_scale": "static"}, ["--dsq-fixed-scale static"]),
        ({"format": "fixed", "fixed_scale": "row", "value_boxes": "feature", "scale": "fit"}, []),
        ({"scale": "fit", "value_boxes": "feature"}, []),
        ({"attention_matmul": "off", "value_boxes": "feature"}, ["--dsq-value-boxes feature"]),
        ({"format": "fixed", "value_boxes": "feature"}, ["--dsq-value-boxes feature"]),
        ({"levels": "[nvfp4,nvfp4,nvfp4,nvfp4]", "value_boxes": "feature"}, ["--dsq-value-boxes feature"]),
        ({"levels": "[float32,bfp4,bfp4,bfp16]", "value_boxes": "feature"}, ["--dsq-value-boxes feature"]),
        ({"levels": "[nvfp4|bfp4,nvfp4,nvfp4,nvfp4]", "value_boxes": "feature"}, []),
        ({"format": "fixed", "box_dim": "last"}, ["--dsq-box-dim last"]),
        ({"format": "float32"}, []),
        (
            {"format": "float32", "rounding": "stochastic", "sign_bit": "extra", "box_dim": "last", "patience": 2},
            ["--dsq-patience 2", "--dsq-rounding stochastic", "--dsq-sign-bit extra", "--dsq-box-dim last"],
        ),
        (
            {"format": "float32", "attention_matmul": "off", "fixed_scale": "static", "stash_scope": "all"},
            ["--dsq-attention-matmul off", "--dsq-fixed-scale static", "--dsq-stash-scope all"],
        ),
        ({"format": "float32", "skip": "*.fc1", "gemm": "float32"}, ["--dsq-skip *.fc1", "--dsq-gemm float32"]),
        ({"rotate": "grad_weight/16"}, []),
        ({"levels": "[4,32,4,32]", "rotate": "backward/16"}, []),
        ({"levels": "[bfp4,float32,bfp4,float32]", "rotate": "grad_weight/16"}, ["--dsq-rotate grad_weight/16"]),
        ({"levels": "[bfp4,mxfp4,bfp4,bfp16]", "rules": "*.fc2=[4,4,4,16]", "box_size": 32}, []),
        ({"levels": "[bfp4|4,mxfp4,bfp4,bfp16]", "box_size": 32}, []),
    ],
)
def test_a_flag_without_effect_is_named(flags, expected):
    assert idle(**flags) == expected


def test_flags_that_read_bits_are_idle_where_no_q_is_bits():
    args = argparse.Namespace(dsq_format="fixed", dsq_levels="[bfp4,mxfp4,bfp4,bfp16]", dsq_box_size=32)
    set_defaults(args)
    assert list(idle_flags(args, levels_of(args))) == [
        "--dsq-format fixed: has no effect: no q is bits of --dsq-format",
        "--dsq-box-size 32: has no effect: no q is bits of --dsq-format",
    ]


def test_formats_that_the_cost_profile_does_not_price_are_named():
    args = argparse.Namespace(dsq_format="mxfp4", dsq_levels="[4,bfp4,4,bfp16]", dsq_rules="x=nvfp4")
    set_defaults(args)
    assert list(unpriced_formats(args, levels_of(args))) == []  # the criterion charges nothing
    args.dsq_cost_profile = "paper"
    (line,) = unpriced_formats(args, levels_of(args))
    assert line.startswith("profile paper has no price for mxfp4, nvfp4: charged as fixed point of the same bits")


def test_every_flag_without_effect_in_float32_is_named():
    others = {"patience": 9, "min_delta": 1.0, "rounding": "stochastic", "sign_bit": "extra", "box_dim": "last"}
    others |= {"attention_matmul": "off", "fixed_scale": "static", "stash_scope": "all", "skip": "x", "gemm": "float32"}
    others |= {"value_boxes": "feature", "scale": "fit", "schedule": "cyclic", "raise_at": "5", "cycle": 2}
    others |= {"callback": "a:b", "raise_on_divergence": True, "box_size": "32", "rotate": "backward/32"}
    others |= {"weight_format": "ternary", "weight_scale": "mse"}
    assert len(idle(format="float32", **others)) == len(defaults(DSQConfig)) - len(
        ("dsq_format", "dsq_levels", "dsq_rules", "dsq_weights")
    )
    assert list(idle(format="float32", weights="direct", weight_format="ternary", weight_scale="mse")) == []


def test_a_flag_has_an_effect_where_a_rule_s_modules_are_quantized():
    assert list(idle(format="float32", rules="head=bfp4", rounding="stochastic", gemm="float32")) == []


PATIENT = Plateau(2, patience=5)
FRESH = PlateauState()


def warnings(schedule=PATIENT, state=FRESH, **flags):
    """Of a training from its start, 10 batches an epoch."""
    return list(schedule_warnings(TrainingFlags(**flags), schedule, state, epoch=1, batches=10, done=0))


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        ({"max_epoch": 6}, 6),
        ({"max_epoch": 5}, 5),
        ({"max_update": 59}, 5),
        ({"max_update": 60}, 6),
        ({"max_epoch": 12, "validate_interval": 2}, 6),
        ({"max_epoch": 11, "validate_interval": 2}, 5),
        ({"max_epoch": 1, "validate_interval_updates": 2}, 5),  # the last of them is the epoch's too
        ({"max_epoch": 1, "validate_interval_updates": 3}, 4),
        ({"max_epoch": 8, "validate_after_updates": 25}, 6),
        ({"max_epoch": 4, "update_freq": (5,)}, 4),
        ({"max_update": 7, "update_freq": (10, 5)}, 4),  # epochs of 1, 2, 2, 2 updates
        ({"max_update": 7, "update_freq": (5,), "skip_remainder_batch": True}, 7),  # of 1
        ({"max_epoch": 99, "disable_validation": True}, 0),
        ({}, 20),
    ],
)
def test_the_validations_of_a_training_are_counted(flags, count):
    assert TrainingFlags(**flags).validations(epoch=1, batches=10, done=0, enough=20) == count


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        ({"validate_interval": 10**9}, 20),
        ({"validate_after_updates": 10**15}, 20),
        ({"max_epoch": 10**10, "validate_interval": 10**9}, 10),
        ({"max_update": 10**12, "validate_interval_updates": 10**11}, 20),
        ({"max_update": 10**12, "validate_interval": 10**13, "validate_interval_updates": 10**11}, 10),
        ({"max_update": 10**12, "validate_after_updates": 10**12 - 70}, 8),
    ],
)
def test_a_long_training_s_validations_are_counted_at_once(flags, count):
    assert TrainingFlags(**flags).validations(epoch=1, batches=10, done=0, enough=20) == count


def walked(flags, epoch, batches, done, enough):
    """The validations of a training that is walked through, update by update."""
    update = count = 0
    for number in range(1, flags.max_epoch + 1):
        freq = flags.update_freq[min(number, len(flags.update_freq)) - 1]
        ends = range(0, batches, freq)
        if flags.skip_remainder_batch:
            ends = range(0, (batches - 1) // freq * freq, freq)
        for begin in ends:
            if update == (flags.max_update or math.inf):
                return min(count, enough)
            update += 1
            if (number, begin) >= (epoch, done) and update >= flags.validate_after_updates:
                count += flags.validates(update, number if begin == ends[-1] else None)
    return min(count, enough)


def test_validations_are_those_of_a_training_that_is_walked_through():
    draw = random.Random(1)
    for _ in range(500):
        flags = TrainingFlags(
            validate_interval=draw.randint(1, 3),
            validate_interval_updates=draw.choice([0, *range(1, 9)]),
            validate_after_updates=draw.choice([0, draw.randint(1, 40)]),
            max_epoch=draw.randint(1, 9),
            max_update=draw.choice([0, draw.randint(1, 60)]),
            update_freq=tuple(draw.choices(range(1, 5), k=draw.randint(1, 3))),
            skip_remainder_batch=draw.random() < 0.3,
        )
        epoch, batches = draw.randint(1, 4), draw.randint(5 if flags.skip_remainder_batch else 1, 12)
        freq = flags.update_freq[min(epoch, len(flags.update_freq)) - 1]
        place = epoch, batches, draw.choice([0, draw.randrange(0, batches, freq)]), draw.randint(1, 12)
        assert flags.validations(*place) == walked(flags, *place), (flags, place)


def test_a_resumed_training_counts_from_where_it_is():
    flags = TrainingFlags(max_epoch=4, validate_interval_updates=5)
    assert flags.validations(epoch=3, batches=10, done=5, enough=20) == 3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"max_epoch": 6}, []),
        ({"max_epoch": 5}, ["--max-epoch 5, --validate-interval 1: 5 validations will count, fewer than the 6"]),
        ({"disable_validation": True}, ["--disable-validation: no validation is scored"]),
        ({"patience": 5}, ["--patience 5: training stops after that many validations without a new best"]),
        ({"patience": 6}, []),
        ({"patience": -1}, []),
    ],
)
def test_a_schedule_that_cannot_rise_is_said(flags, expected):
    lines = warnings(**flags)
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))


@pytest.mark.parametrize(
    ("schedule", "flags", "expected"),
    [
        (Updates(2, "30"), {"max_epoch": 3}, ["--dsq-raise-at 30: --max-epoch 3 (30 updates) ends training before 30"]),
        (Updates(2, "29"), {"max_epoch": 3}, []),
        (Updates(2, "29"), {"max_epoch": 3, "update_freq": (1, 2)}, ["--dsq-raise-at 29: --max-epoch 3 (20 updates)"]),
        (Updates(3, "3,7"), {"max_update": 7}, ["--dsq-raise-at 3,7: --max-update 7 ends training before 7"]),
        (Updates(3, "3,7"), {"max_update": 8, "max_epoch": 9}, []),
        (Updates(2, "epoch:3"), {"max_update": 20}, ["--dsq-raise-at epoch:3: --max-update 20 ends training before 3"]),
        (Updates(2, "epoch:3"), {"max_update": 21}, []),
        (Updates(2, "epoch:3"), {"max_epoch": 2}, ["--dsq-raise-at epoch:3: --max-epoch 2 ends training before 3"]),
        (Updates(2, "epoch:3"), {"max_epoch": 3}, []),
        (Updates(2, "99"), {"max_update": 5, "max_epoch": 1}, ["--dsq-raise-at 99: --max-epoch", "--dsq-raise-at 99"]),
        (Updates(2, "99"), {}, []),
        (Cyclic(2, 1000), {"max_update": 2}, ["--dsq-cycle 1000: --max-update 2 ends training before 1000"]),
        (Cyclic(3, 5), {"max_epoch": 1}, ["--dsq-cycle 5: --max-epoch 1 (10 updates) ends training before 10"]),
        (Cyclic(3, 5), {"max_update": 11}, []),
        (Cyclic(1, 5), {"max_update": 1}, []),
    ],
)
def test_a_level_that_lies_behind_the_end_of_training_is_said(schedule, flags, expected):
    lines = warnings(schedule, schedule.start(), **flags)
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))


def test_without_the_number_of_batches_points_are_held_against_limits_of_their_kind():
    flags = TrainingFlags(max_epoch=2, max_update=20)
    for points, late in (
        ("epoch:3", ["--dsq-raise-at epoch:3: --max-epoch 2 ends training before 3"]),
        ("epoch:2", []),
        ("20", ["--dsq-raise-at 20: --max-update 20 ends training before 20"]),
        ("19", []),
    ):
        assert list(schedule_warnings(flags, Updates(2, points), None, epoch=1, batches=None, done=0)) == late


def test_what_has_been_reached_is_taken_into_account():
    assert warnings(state=PlateauState(1, 3.0, 0), disable_validation=True, patience=1) == []
    assert warnings(Plateau(1), disable_validation=True, patience=1) == []
    near = PlateauState(0, 3.0, 4)
    assert warnings(state=near, max_epoch=1, patience=2) == []
    assert len(warnings(state=near, max_epoch=1, patience=1)) == 1
    assert len(warnings(Plateau(3, patience=2), patience=4)) == 1  # two rises take four
    assert warnings(Plateau(3, patience=2), PlateauState(0, math.inf, 0), patience=5) == []


def test_the_flags_are_read_from_argparse_s_namespace_and_from_hydra_s_tree():
    args = argparse.Namespace(validate_interval=3, max_epoch=7, update_freq=[2, 1], dsq_patience=5)
    assert TrainingFlags.of(args) == TrainingFlags(validate_interval=3, max_epoch=7, update_freq=(2, 1))
    tree = OmegaConf.create(
        {
            "model": {"arch": "transformer_dsq"},
            "dataset": {"validate_interval": 3},
            "optimization": {"max_epoch": 7, "update_freq": [2, 1]},
        }
    )
    assert TrainingFlags.of(tree.model) == TrainingFlags.of(args)
    assert TrainingFlags.of(argparse.Namespace(arch="transformer_dsq")) is None
