"""Formats and rules on the command line: through the layers, the stash, the cost model, the record and the report."""

import json

import pytest


def costs(log):
    lines = [line for line in log.splitlines() if '"train_loss"' in line]
    return json.loads(lines[-1][lines[-1].index("{") :])


@pytest.mark.parametrize(
    ("levels", "flags", "method"),
    [
        # The slow ones train for minutes: scripts/readme.sh runs them.
        pytest.param("[int8/row,int4/row,int8/row,int16/row]", (), "int8", marks=pytest.mark.slow),
        pytest.param(
            "[int8/row|bfp4,bfp4/32,int8/128,bfp16|int8/tensor]",
            ("--dsq-rules", "*.fc2=float32"),
            "bfp4/32,int8/128",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "[int8/row|ternary,int8/row,ternary,float32]",
            ("--dsq-box-dim", "last", "--dsq-attention-matmul", "off"),
            "ternary,int8/row,ternary,float32",
            marks=pytest.mark.slow,
        ),
        (
            "[mxfp8e4m3|4,nvfp4,mxfp6e2m3,mxfp8e5m2]",
            ("--dsq-format", "mxfp4", "--dsq-scale", "fit", "--dsq-rounding", "stochastic", "--dsq-stash-scope", "all"),
            "4,nvfp4,mxfp6e2m3",
        ),
        ("[8,4,8,8]", ("--dsq-format", "int", "--dsq-box-size", "32", "--dsq-rounding", "stochastic"), "[8,4,8,8]"),
    ],
)
def test_any_format_trains_is_priced_and_reported(cli, tmp_path, levels, flags, method):
    log = cli.train(tmp_path / "run", "--dsq-levels", levels, "--max-epoch", 2, *flags)
    first, last = (json.loads(line[line.index("{") :]) for line in log.splitlines() if '"train_loss"' in line)
    assert float(last["train_loss"]) < float(first["train_loss"])
    assert 0 < float(last["train_dsq_arithmetic_relative"]) < 1
    assert float(last["train_dsq_stash_bytes"]) > 0
    out, _ = cli.run("fairseq-dsq", "report", tmp_path / "run")
    assert method in out
    generated, _ = cli.run(
        "fairseq-generate", cli.data, "--path", tmp_path / "run/checkpoint_best.pt", "--user-dir", "fairseq_dsq",
        "--beam", 2, "--max-len-b", 10,
    )  # fmt: skip
    assert "BLEU" in generated


def test_one_scale_per_tensor_is_said_to_mix(cli, tmp_path):
    log = cli.train(tmp_path / "run", "--dsq-levels", "[int8/tensor,int8/row,int8/row,int8/row]", "--max-update", 1)
    assert "int8/tensor: one scale per tensor lets a sentence's result depend on its batch" in log


def test_one_scale_per_tensor_of_weights_mixes_nothing(cli, tmp_path):
    log = cli.train(
        tmp_path / "run", "--dsq-levels", "[int8/row|ternary,int8/row,ternary,float32]", "--max-update", 1,
        "--dsq-attention-matmul", "off",
    )  # fmt: skip
    assert "one scale per tensor" not in log and "has no effect" not in log
