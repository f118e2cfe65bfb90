"""A flag means the same, or is refused in the same line, by whichever entrance it comes to the model."""

import argparse

import pytest
from omegaconf import OmegaConf
from plugin.encoders import masked_lm

from fairseq_dsq.errors import DSQError, line_of
from fairseq_dsq.plugin import config

MEANINGS = [
    ("dsq_attention_matmul", True, "on"),
    ("dsq_attention_matmul", False, "off"),
    ("dsq_patience", "3", 3),
    ("dsq_patience", 3, 3),
    ("dsq_min_delta", "1e-3", 1e-3),
    ("dsq_min_delta", 1, 1.0),
    ("dsq_levels", [[2, 2, 2, 16], [16, 4, 4, 16]], "[2,2,2,16] [16,4,4,16]"),
    ("dsq_levels", [4, 4, 4, 16], "[4,4,4,16]"),
    ("dsq_levels", ["[2,2,2,16]", "[16,4,4,16]"], "[2,2,2,16] [16,4,4,16]"),
    ("dsq_levels", None, "[4,4,4,16] [16,4,4,16]"),
    ("dsq_skip", ["decoder.*", "encoder.a b"], "'decoder.*' 'encoder.a b'"),
    ("token_types", "2", 2),
    ("layer_norm_eps", "1e-12", 1e-12),
]
REFUSED = [
    ("dsq_attention_matmul", "yes", "--dsq-attention-matmul: got 'yes', expected one of on, off"),
    ("dsq_attention_matmul", 1, "--dsq-attention-matmul: got 1, expected one of on, off"),
    ("dsq_rounding", True, "--dsq-rounding: got True, expected one of nearest, stochastic"),
    ("dsq_format", ["bfp"], r"--dsq-format: got \['bfp'\], expected one of bfp"),
    ("dsq_patience", True, "--dsq-patience: got True, expected an integer >= 1"),
    ("dsq_patience", 2.5, "--dsq-patience: got 2.5, expected an integer >= 1"),
    ("dsq_patience", 0, "--dsq-patience: got 0, expected an integer >= 1"),
    ("dsq_min_delta", [1], r"--dsq-min-delta: got \[1\], expected a finite number >= 0"),
    ("dsq_min_delta", False, "--dsq-min-delta: got False, expected a finite number >= 0"),
    ("dsq_levels", 4, "--dsq-levels: got 4, expected one or more levels"),
    ("dsq_levels", [[2, 2, 2.5, 16]], "--dsq-levels: level 0: got 2.5 in "),
    ("dsq_levels", [[2, 2, 2]], "--dsq-levels: level 0: got .*, expected four integers"),
    ("dsq_skip", 3, "--dsq-skip: got 3, expected space-separated patterns"),
    ("dsq_skip", "'a", '--dsq-skip: got "\'a": No closing quotation'),
    ("dsq_patince", 3, "dsq_patince: no such flag, expected dsq_patience"),
    ("dsq-patience", 3, "dsq-patience: no such flag, expected dsq_patience"),
    ("head_from_pooler", "no", "--head-from-pooler: got 'no', expected True or False"),
    ("token_types", 1, "--token-types: got 1, expected 0, for none, or an integer >= 2"),
    ("layer_norm_eps", 0, "--layer-norm-eps: got 0, expected a finite number > 0"),
]


def set_defaults(args):
    config.set_defaults(args, config.DSQEncoderConfig)


ENTRANCES = {
    "namespace": lambda values: argparse.Namespace(**values),
    "configuration": lambda values: OmegaConf.create(values),
}


def strict(values):
    config = OmegaConf.create(values)
    OmegaConf.set_struct(config, True)
    return config


ENTRANCES["strict configuration"] = strict


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(("name", "value", "expected"), MEANINGS)
def test_a_value_has_one_meaning(entrance, name, value, expected):
    args = ENTRANCES[entrance]({name: value})
    set_defaults(args)
    set_defaults(args)
    found = getattr(args, name)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(("name", "value", "expected"), REFUSED)
def test_a_bad_value_is_refused_in_one_line(entrance, name, value, expected):
    with pytest.raises(DSQError, match=expected) as stop:
        set_defaults(ENTRANCES[entrance]({name: value}))
    assert "\n" not in str(stop.value)


def test_values_set_by_hand_are_checked_where_the_model_is_built(monkeypatch):
    from plugin import encoders

    def by_hand(**changes):
        parse = encoders.parse
        with monkeypatch.context() as patch:
            patch.setattr(encoders, "parse", lambda *args: argparse.Namespace(**{**vars(parse(*args)), **changes}))
            return masked_lm()

    assert by_hand(dsq_attention_matmul=True).dsq.context.attention_matmul is True
    assert by_hand(dsq_attention_matmul=False).dsq.context.attention_matmul is False
    with pytest.raises(DSQError, match="--dsq-patience: got 0"):
        by_hand(dsq_patience=0)
    with pytest.raises(DSQError, match="dsq_levles: no such flag, expected dsq_levels"):
        by_hand(dsq_levles="[2,2,2,16]")


def test_the_line_is_found_behind_fairseq_s_own_error_and_in_a_worker_s_traceback():
    def wrapped():
        try:
            raise DSQError("the line")
        except ValueError:
            raise Exception("Cannot load model parameters")  # noqa: B904 - as fairseq's Trainer does

    with pytest.raises(Exception, match="Cannot load") as stop:
        wrapped()
    assert line_of(stop.value) == "the line"
    told = (
        "\n\n-- Process 1 terminated with the following error:\nTraceback ...\nfairseq_dsq.errors.DSQError: the line\n"
    )
    assert line_of(RuntimeError(told)) == "the line"
    assert line_of(RuntimeError("another")) is None
    assert line_of(ValueError("another")) is None
