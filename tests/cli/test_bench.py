"""fairseq-dsq bench: its rows and what they hold; the ratios themselves are measured elsewhere."""

import json
import time

import pytest
import torch
from torch import nn

from fairseq_dsq.bench import linear, optimizer, train_step
from fairseq_dsq.bench.peers import microxcaling_style, naive
from fairseq_dsq.bench.timing import interleave
from fairseq_dsq.cli import main
from fairseq_dsq.plugin.held import saved_bytes


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(capsys, *argv):
    assert main(["bench", *map(str, argv), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["machine"]["threads"] == 1 and result["machine"]["processor"]
    return {row["name"]: row for row in result["rows"]}


def test_quantize_and_linear_have_the_rows_that_are_tracked(capsys):
    rows = rows_of(capsys, "quantize", "--rounds", 2)
    wanted = {f"quantize bfp{bits} {way}" for bits in (4, 8) for way in ("last", "first")}
    wanted |= {f"{verb} bfp{bits}" for verb in ("pack", "unpack") for bits in (2, 4, 8, 16)}
    assert wanted | {"quantize bfp4 last, naive torch", "quantize bfp4 last, microxcaling-style"} <= set(rows)
    layers = rows_of(capsys, "linear", "--rounds", 1)
    assert {"[2,2,2,16]", "[16,4,4,16]", "[8,8,8,8]", "[8,8,8,8], naive torch"} <= set(layers)
    for row in (*rows.values(), *layers.values()):
        assert row["ratio_min"] == pytest.approx(row["seconds_min"] / row["over_seconds_min"])
        assert row["ratio_median"] > 0


def test_optimizers_have_their_time_and_the_bytes_of_their_states(capsys, monkeypatch):
    monkeypatch.setattr(train_step, "ARCH", "transformer_tiny")
    monkeypatch.setattr(optimizer, "TOKENS", 64)
    rows = rows_of(capsys, "optimizer", "--rounds", 1)
    assert {
        "step int8/row log8/row, weights int8/row",
        "step int8/row log8/row",
        "step float32 float32",
        "update int8/row log8/row",
    } <= set(rows)
    low, high = (rows[f"step {pair}"] for pair in ("int8/row log8/row", "float32 float32"))
    assert 0.25 <= low["state_bytes"] / high["state_bytes"] < 0.30
    assert low["state_bytes"] == rows["update int8/row log8/row"]["state_bytes"]


def test_ratios_are_of_the_fastest_rounds_and_of_the_median_round():
    pauses = {"twice": iter([0, 0.02, 0.04, 0.06]), "": iter([0, 0.02, 0.01, 0.02])}

    def pause(name):
        return lambda: time.sleep(next(pauses[name]))

    (row,) = interleave({"twice": pause("twice")}, pause(""), "nothing", 3)
    assert row["over"] == "nothing"
    assert row["ratio_min"] == pytest.approx(2, rel=0.3)
    assert row["ratio_median"] == pytest.approx(3, rel=0.3)


def test_peers_round_as_the_format_does_where_nothing_is_at_the_edge():
    from fairseq_dsq.formats import BlockFloat
    from fairseq_dsq.quantized import fake_quantize

    x = torch.linspace(-1.99, 1.93, 160).reshape(10, 16)
    for peer in (naive, microxcaling_style):
        assert torch.equal(peer(x, 8), fake_quantize(x, BlockFloat(8)))


def test_saved_bytes_counts_each_storage_once_and_no_parameters():
    layer = nn.Linear(8, 4, bias=False)
    x = torch.randn(16, 8, requires_grad=True)  # then the weight is kept too

    def run():
        y = layer(x)
        return (y.relu() + layer(x)).sum()

    # x, which both products keep, and the output of relu.
    assert saved_bytes(run, layer) == x.nbytes + 16 * 4 * 4


@pytest.mark.parametrize(("flag", "value"), [("--rounds", 0), ("--threads", -1)])
def test_bad_input_gets_one_line(capsys, flag, value):
    assert main(["bench", "quantize", flag, str(value)]) == 2
    assert f"{flag}: got {value}, expected an integer >= 1" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_benches_of_half_precision(capsys, monkeypatch, dtype):
    monkeypatch.setattr(linear, "SHAPE", (64, 32, 48))
    rows = rows_of(capsys, "linear", "--rounds", 1, "--dtype", dtype)
    assert all(row["over"] == dtype for row in rows.values())


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_a_bench_runs_on_a_device(capsys, monkeypatch, device):
    monkeypatch.setattr(train_step, "ARCH", "transformer_tiny")
    monkeypatch.setattr(train_step, "TOKENS", 64)
    rows = rows_of(capsys, "train-step", "--rounds", 1, "--device", device)
    assert {"[2,2,2,16]", "[16,4,4,16] scope all"} <= set(rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["linear", "--dtype", "int8"], "--dtype: got 'int8', expected one of float32, bfloat16, float16"),
        (["linear", "--device", "tpu"], "--device: got 'tpu', expected cpu or cuda"),
        (
            ["python", "--dtype", "float16"],
            "--device, --dtype: got python, expected one of quantize, linear, train-step",
        ),
    ],
)
def test_where_no_bench_runs_is_said_in_one_line(capsys, words, said):
    assert main(["bench", *words]) != 0
    assert said in capsys.readouterr().err
