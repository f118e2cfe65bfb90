"""The methods of configs/methods: each row runs, and a layer at it is the published one, in plain float64 formulas."""

import argparse
import shlex

import pytest
import torch
from fairseq.dataclass.utils import gen_parser_from_dataclass

from fairseq_dsq import data_files
from fairseq_dsq.cli import main
from fairseq_dsq.formats import Float32, parse
from fairseq_dsq.nn import CodedLinear, DSQContext, DSQLinear, GemmConfig, linear
from fairseq_dsq.plugin.config import DSQConfig, add_args, defaults, set_defaults
from fairseq_dsq.plugin.effects import levels_of
from fairseq_dsq.plugin.optimizer import DSQAdamConfig
from fairseq_dsq.recipes.recipe import METHODS, Method, Translation

ROWS = {
    (table, name): row
    for table in data_files.names(METHODS)
    for name, row in Translation("", "", 1, corpus="toy", methods=table).rows().items()
}


def flags_of(row):
    """The flags of a row as fairseq-train has them."""
    parser = argparse.ArgumentParser()
    add_args(parser)
    gen_parser_from_dataclass(parser, DSQAdamConfig())
    parser.add_argument("--optimizer")
    levels = ["--dsq-levels", row.levels] if row.levels else []
    args = parser.parse_args(["--dsq-format", row.format, *levels, *shlex.split(row.flags)])
    set_defaults(args)
    return args


@pytest.mark.parametrize(("table", "name"), ROWS)
def test_every_row_has_levels_and_known_flags(table, name):
    row = ROWS[table, name]
    assert row.levels or row.format == "float32"  # a default may change, what a row trained does not
    flags = flags_of(row)
    assert levels_of(flags)
    assert flags.optimizer in (None, "dsq_adam")
    assert flags.optimizer or flags.dsq_weights == "float"


def config_of(name):
    flags = flags_of(ROWS["neighbours", name])
    (level,) = levels_of(flags)
    return GemmConfig(level, box_dim=flags.dsq_box_dim), flags


@pytest.mark.parametrize(
    ("name", "output", "grad_input", "grad_weight"),
    [
        ("w8a8g4", ("int8/row", "int8/row"), ("float32", "float32"), ("float32", "int4/row")),
        ("w8a8", ("int8/row", "int8/row"), ("float32", "float32"), ("float32", "float32")),
        ("w8a8g8", ("int8/row", "int8/row"), ("float32", "float32"), ("float32", "int8/row")),
        ("int8-in-dsq", ("int8/row", "int8/row"), ("int8/row", "int8/row"), ("int8/row", "int8/row")),
        ("bitnet", ("int8/row", "ternary"), ("float32", "ternary"), ("int8/row", "float32")),
    ],
)
def test_rows_have_the_operands_of_their_papers(name, output, grad_input, grad_weight):
    config, flags = config_of(name)
    found = [tuple(map(str, config.precision.operands(kind))) for kind in ("output", "grad_input", "grad_weight")]
    assert found == [output, grad_input, grad_weight]
    assert (flags.dsq_attention_matmul == "off") == (name != "int8-in-dsq")
    assert defaults(DSQConfig)["dsq_box_dim"] == "reduction"


def absmax(x, dim):
    """Symmetric integers of 8 bits, one scale for each fibre along ``dim``."""
    step = x.abs().amax(dim, keepdim=True) / 127
    return (x / step).round() * step


def absmean(x):
    """Ternary under the mean magnitude of all."""
    return (x / x.abs().mean()).round().clamp(-1, 1) * x.abs().mean()


def w8a8(x, weight, grad):
    return absmax(x, 1) @ absmax(weight, 1).mT, grad @ weight, grad.mT @ x


def w8a8g8(x, weight, grad):
    return absmax(x, 1) @ absmax(weight, 1).mT, grad @ weight, absmax(grad, 1).mT @ x


def int8_in_dsq(x, weight, grad):
    output = absmax(x, 1) @ absmax(weight, 1).mT
    return output, absmax(grad, 1) @ absmax(weight, 0), absmax(grad, 0).mT @ absmax(x, 0)


def bitnet(x, weight, grad):
    return absmax(x, 1) @ absmean(weight).mT, grad @ absmean(weight), grad.mT @ absmax(x, 1)


@pytest.mark.parametrize("method", [w8a8, w8a8g8, int8_in_dsq, bitnet])
def test_a_layer_is_the_published_one(method):
    config, _ = config_of(method.__name__.replace("_", "-"))
    generator = torch.Generator().manual_seed(3)
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in ((40, 24), (12, 24), (40, 12)))
    x *= torch.logspace(-2, 2, 40)[:, None]  # tokens of different sizes: a scale of the wrong direction shows
    grad *= torch.logspace(2, -2, 40)[:, None]
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    y = linear(*leaves, None, config)
    y.backward(grad)
    wanted = method(*(tensor.double() for tensor in (x, weight, grad)))
    for actual, expected in zip((y, leaves[0].grad, leaves[1].grad), wanted, strict=True):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < 1e-6, error


@pytest.mark.parametrize("name", [name for table, name in ROWS if name.startswith("direct")])
def test_a_direct_layer_multiplies_its_codes_and_rounded_activations_in_all_gemms(name):
    config, flags = config_of(name)
    layer = CodedLinear.of(
        DSQLinear(24, 12, DSQContext(config)), parse(flags.dsq_weight_format), flags.dsq_weight_scale
    )
    x, grad = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in ((40, 24), (40, 12)))
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    rounded, weight = absmax(x.detach().double(), 1), layer.coded.dequantize().double()
    for actual, expected in (
        (y.detach() - layer.bias, rounded @ weight.mT),
        (x.grad, grad.double() @ weight),
        (layer.weight.grad, grad.double().mT @ rounded),
    ):
        assert (actual.double() - expected).norm() / expected.norm() < 1e-6


def test_a_stash_of_bitnet_is_packed_and_one_of_w8a8_is_float():
    assert config_of("w8a8")[0].precision.stash("input") == Float32()
    assert config_of("bitnet")[0].precision.stash("input") == parse("int8/row")


def test_a_row_s_flags_go_to_fairseq_train(tmp_path, capsys):
    text = (data_files.root() / "recipes/wmt14.yaml").read_text().replace("methods: table1", "methods: neighbours")
    (tmp_path / "own.yaml").write_text(text)
    given = (str(tmp_path / "own.yaml"), "--methods", "float32 bitnet", "--runs", str(tmp_path), "--dry-run")
    assert main(["run", *given]) == 0
    trained = [line for line in capsys.readouterr().out.splitlines() if " run-train " in line]
    assert len(trained) == 2 and "--dsq-attention-matmul" not in trained[0]
    assert trained[1].endswith("--dsq-attention-matmul off --dsq-box-dim last")


def test_flags_that_do_not_close_a_quotation_are_refused():
    with pytest.raises(ValueError, match="flags: No closing quotation"):
        Method("bfp", flags="--dsq-skip 'x")
