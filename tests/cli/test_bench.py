"""fairseq-dsq bench: its rows and what they hold; the ratios themselves are measured elsewhere."""

import contextlib
import copy
import functools
import io
import json
import resource
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fairseq_dsq.bench import ALL, linear, memory, optimizer, python, quantize, rivals, train_step
from fairseq_dsq.bench.peers import microxcaling_style, naive
from fairseq_dsq.bench.timing import Found, interleave
from fairseq_dsq.cli import bench as bench_command
from fairseq_dsq.cli import main
from fairseq_dsq.plugin import footprint, probe
from fairseq_dsq.plugin.held import saved_bytes
from fairseq_dsq.report.tables import fixed
from tests.report import samples


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def configurations(monkeypatch):
    """fairseq's are made once of the same flags: each takes a second."""
    monkeypatch.setattr(probe, "training_config", lambda flags: copy.deepcopy(_configuration(tuple(flags))))


_configuration = functools.cache(probe.training_config)


def rows_of(capsys, *argv):
    assert main(["bench", *map(str, argv), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["machine"]["threads"] == 1 and result["machine"]["processor"]
    return {row["name"]: row for row in result["rows"]}


def test_quantize_and_linear_have_the_rows_that_are_tracked(capsys, monkeypatch):
    rows = rows_of(capsys, "quantize", "--rounds", 2)
    wanted = {f"quantize bfp{bits} {way}" for bits in (4, 8) for way in ("last", "first")}
    wanted |= {f"{verb} bfp{bits}" for verb in ("pack", "unpack") for bits in (2, 4, 8, 16)}
    assert wanted | {"quantize bfp4 last, naive torch", "quantize bfp4 last, microxcaling-style"} <= set(rows)
    monkeypatch.setattr(linear, "SHAPE", (64, 32, 48))
    layers = rows_of(capsys, "linear", "--rounds", 1, "--rivals", "autocast,peers")
    ours = {"[2,2,2,16]", "[16,4,4,16]", "[8,8,8,8]"}
    assert ours | {"[8,8,8,8], naive torch", "autocast bf16"} <= set(layers)
    assert layers["autocast bf16"]["over_autocast_min"] == layers["autocast bf16"]["over_autocast_median"] == 1
    for name in ours:
        seconds = (layers[each]["seconds_min"] for each in (name, "autocast bf16"))
        assert layers[name]["over_autocast_min"] == pytest.approx(next(seconds) / next(seconds))
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


SMALL = ("--rounds", 1, "--rivals", "autocast")


def test_compiled_and_mkldnn_s_rivals_are_the_float_layer_under_a_setting_that_is_put_back(capsys, monkeypatch):
    monkeypatch.setattr(linear, "SHAPE", (64, 32, 48))
    settings, calls = [], []

    def compile_(function):
        def call(*args):
            calls.append(torch.is_autocast_enabled("cpu"))
            return function(*args)

        return call

    def linear_(x, *args):
        settings.append(setting.fp32_precision)
        return plain(x, *args)

    setting, plain = torch.backends.mkldnn.matmul, nn.functional.linear
    before = setting.fp32_precision
    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(rivals, "_no_bf16_products", lambda place: None)
    monkeypatch.setattr(nn.functional, "linear", linear_)
    rows = rows_of(capsys, "linear", "--rounds", 1, "--rivals", "compile,mkldnn")
    assert {"torch.compile", "torch.compile, autocast bf16", "mkldnn.matmul.fp32_precision = bf16"} <= set(rows)
    assert sorted(calls) == [False, False, False, True, True]  # the check whether it compiles, and two rounds of each
    assert settings.count("bf16") == 2 and setting.fp32_precision == before


def test_a_rival_that_this_machine_has_not_is_left_out_in_a_line(capsys, monkeypatch):
    monkeypatch.setattr(linear, "SHAPE", (64, 32, 48))

    def no_compiler(function):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert main(["bench", "linear", "--rounds", "1"]) == 0
    *_, compiled, products = capsys.readouterr().out.splitlines()
    assert compiled == "torch.compile: left out, as it fails here (RuntimeError: no C++ compiler)"
    assert products == "mkldnn.matmul.fp32_precision = bf16: left out, as this CPU has no bfloat16 multipliers"


def test_memory_has_its_rivals_and_the_largest_batch_both_measured_and_modelled(capsys, monkeypatch):
    monkeypatch.setattr(train_step, "ARCH", "transformer_tiny")
    monkeypatch.setattr(memory, "TOKENS", 64)
    monkeypatch.setattr(
        memory, "peak", lambda variant, tokens, device: (100 if variant.flags else 200) * tokens + 10**8
    )
    modelled = {None: 10, "[2,2,2,16]": 20}  # tests/cli/test_cost.py has the model's own figures
    monkeypatch.setattr(
        footprint,
        "Step",
        lambda spec, level=None: SimpleNamespace(largest_batch=lambda limit: modelled[level and str(level)]),
    )
    monkeypatch.setattr(memory, "OURS", memory.OURS[:1])
    rows = rows_of(capsys, "memory", "--fit", "200MB")
    assert rows["peak resident all [2,2,2,16]"]["bytes"] == 100 * memory.LARGE_BATCH + 10**8
    assert rows["saved bytes --checkpoint-activations"]["ratio_min"] < 1  # of the others this model's weights are most
    assert rows["saved bytes autocast bf16"]["ratio_min"] > 0
    for name, per_token in (("fit float32", 200), ("fit all [2,2,2,16]", 100), ("fit autocast bf16", 200)):
        row = rows[name]
        assert 0.97 * 10**8 / per_token < row["measured_tokens"] <= 10**8 / per_token < row["too_many_tokens"]
        assert row["peak_bytes"] <= row["fit_bytes"] == 2 * 10**8
    assert (
        rows["fit float32"]["modelled_tokens"] == 32 * 10 and rows["fit all [2,2,2,16]"]["modelled_tokens"] == 32 * 20
    )
    assert rows["fit --checkpoint-activations"]["modelled_tokens"] is None


@pytest.mark.parametrize("largest", [0, 1, 7, 40, 96, 1000, 12345])
def test_the_largest_batch_is_found_in_few_steps(largest):
    tried = []

    def peak(batch):
        tried.append(batch)
        return 1000 + 10 * batch + batch // 7 % 3  # not quite a line

    fits, own, above = memory.largest_batch(peak, 1012 + 10 * largest)
    assert 0.97 * largest - 1 <= fits <= largest + 1 and len(tried) <= memory.MOST_STEPS
    assert own is None if fits == 0 else own <= 1012 + 10 * largest
    assert above is None or peak(above) > 1012 + 10 * largest


def test_a_peak_is_of_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(train_step, "ARCH", "transformer_tiny")
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    held = torch.ones(here // 4)  # more than all that this process held before
    own, more = (memory.peak(memory.FLOAT32, tokens, "cpu") for tokens in (64, 2048))
    assert 0 < own < more < held.nbytes + here


@pytest.fixture
def small_benches(monkeypatch):
    """Benches of small sizes, in this process; gives the words that each ran with."""
    ran = []

    def run_here(words):
        ran.append(words)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(["bench", *words, "--json"]) == 0
        return out.getvalue()

    monkeypatch.setattr(bench_command, "run_alone", run_here)
    monkeypatch.setattr(train_step, "ARCH", "transformer_tiny")
    for module, small in (
        (train_step, {"TOKENS": 64, "LEVELS": ("[2,2,2,16]",)}),
        (optimizer, {"TOKENS": 64}),
        (linear, {"SHAPE": (64, 32, 48)}),
        (quantize, {"ROWS": 64, "COLUMNS": 64}),
        (python, {"run": lambda settings: Found([{"name": "a step", "ratio_min": 1.5, "launches": 450}])}),
        (
            memory,
            {"TOKENS": 64, "OURS": memory.OURS[:1], "peak": lambda variant, tokens, device: 10**6 * len(variant[0])},
        ),
    ):
        for name, value in small.items():
            monkeypatch.setattr(module, name, value)
    return ran


def test_all_benches_in_a_folder_that_goes_on_where_it_stopped_and_a_page_of_them(small_benches, capsys, tmp_path):
    argv = ["bench", "all", "--rounds", "1", "--rivals", "autocast,checkpointing", "--out", str(tmp_path / "found")]
    assert main(argv) == 0
    assert [words[0] for words in small_benches] == list(ALL)
    found = {name: json.loads((tmp_path / "found" / f"{name}.json").read_text()) for name in ALL}
    for name, document in found.items():
        machine = document["machine"]
        assert document["command"].startswith(f"fairseq-dsq bench {name} --threads 1 --rounds 1")
        assert machine["processor"] and machine["kernels"] and machine["torch"] == torch.__version__
        assert machine["threads"] == 1 and document["version"] and document["rows"]
    assert [row["name"] for row in found["linear"]["rows"]][-1] == "autocast bf16"

    # What is there and was made so is kept; what is damaged or of other settings is made again.
    (tmp_path / "found/quantize.json").write_text("{")
    older = {**found["linear"], "version": "an older one"}
    (tmp_path / "found/linear.json").write_text(json.dumps(older))
    small_benches.clear()
    assert main(argv) == 0
    assert [words[0] for words in small_benches] == ["quantize", "linear"]
    assert f"train-step: kept {tmp_path / 'found/train-step.json'}" in capsys.readouterr().out

    (tmp_path / "run").mkdir()
    (tmp_path / "run/dsq.jsonl").write_text(samples.record(samples.DSQ, [4.0]))
    report = ["report", str(tmp_path / "run"), "--bench", str(tmp_path / "found")]
    assert main([*report, "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page/index.html").read_text()
    rows = {name: json.loads((tmp_path / "found" / f"{name}.json").read_text())["rows"] for name in ALL}
    for shown in (page, capsys.readouterr().out, (tmp_path / "page/table.md").read_text()):
        for name in ("linear", "train-step", "quantize", "optimizer", "python"):
            assert all(fixed(row["ratio_min"], 3) in shown for row in rows[name])
        assert all(fixed(row["bytes"] / 1e6, 2) in shown for row in rows["memory"])
        assert found["linear"]["machine"]["processor"] in shown and "fairseq-dsq bench optimizer --threads 1" in shown
    assert f"--bench {tmp_path / 'found'}" in page and "http" not in page.partition("Speed and memory")[2]
    assert main([*report, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bench"][0]["rows"] == rows["linear"]


def test_a_bench_that_fails_is_named_and_the_others_run(small_benches, capsys, monkeypatch, tmp_path):
    def fail(words):
        if words[0] != "linear":
            raise ValueError("no memory left")
        return run_here(words)

    run_here = bench_command.run_alone
    monkeypatch.setattr(bench_command, "run_alone", fail)
    assert main(["bench", "all", "--rounds", "1", "--rivals", "none", "--out", str(tmp_path)]) == 1
    assert "bench: memory failed: no memory left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["linear.json"]


def test_a_process_of_its_own_runs_a_bench_or_says_why_not(monkeypatch):
    document = json.loads(bench_command.run_alone(["quantize", "--rounds", "1"]))
    assert document["bench"] == "quantize" and document["rows"]
    failed = subprocess.CompletedProcess([], 2, "", "a warning\nfairseq-dsq bench: error: no memory left\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"^fairseq-dsq bench: error: no memory left$"):
        bench_command.run_alone(["quantize"])


@pytest.mark.parametrize("text", [None, "{", "[]", '{"bench": "linear"}'])
def test_a_folder_without_benches_is_refused_in_one_line(capsys, tmp_path, text):
    folder = tmp_path / "found"
    folder.mkdir()
    if text is not None:
        (folder / "linear.json").write_text(text)
    assert main(["report", str(tmp_path), "--bench", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--bench: {folder}" in line and ", expected " in line


@pytest.mark.parametrize(("flag", "value"), [("--rounds", 0), ("--threads", -1)])
def test_bad_input_gets_one_line(capsys, flag, value):
    assert main(["bench", "quantize", flag, str(value)]) == 2
    assert f"{flag}: got {value}, expected an integer >= 1" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_benches_of_half_precision(capsys, monkeypatch, dtype):
    monkeypatch.setattr(linear, "SHAPE", (64, 32, 48))
    rows = rows_of(capsys, "linear", "--rounds", 1, "--dtype", dtype, "--rivals", "autocast,peers")
    assert all(row["over"] == dtype for row in rows.values())


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_a_bench_runs_on_a_device(capsys, monkeypatch, device):
    monkeypatch.setattr(train_step, "ARCH", "transformer_tiny")
    monkeypatch.setattr(train_step, "TOKENS", 64)
    rows = rows_of(capsys, "train-step", "--rounds", 1, "--device", device, "--rivals", "autocast")
    assert {"[2,2,2,16]", "[16,4,4,16] scope all", "autocast bf16"} <= set(rows)
    assert all(row["over_autocast_min"] > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimizer", "--device", "cuda"], "--device: got cuda, which torch does not find here"),
        (
            ["quantize", "--rivals", "autocast"],
            "--rivals: got quantize, expected one of linear, train-step, memory beside",
        ),
        (
            ["linear", "--rivals", "tpu"],
            "--rivals: got 'tpu', expected none or some of autocast, compile, mkldnn, peers",
        ),
        (["linear", "--fit", "4GB"], "--fit: got linear, expected one of memory beside it"),
        (["memory", "--fit", "much"], "--fit: got 'much', expected a size such as 16GB"),
        (["memory", "--fit", "900TB"], "--fit: got 900000000000000 bytes, expected at most "),
        (["all"], "--out: got none with all, expected a folder with all"),
        (["linear", "--out", "there"], "--out: got there with linear, expected a folder with all"),
        (
            ["all", "--out", "there", "--rivals", "compile,tpu"],
            "--rivals: got 'tpu', expected none or some of autocast",
        ),
        (["all", "--out", "there", "--json"], "--json: got it with all"),
        (["linear", "--dtype", "int8"], "--dtype: got 'int8', expected one of float32, bfloat16, float16"),
        (["linear", "--device", "tpu"], "--device: got 'tpu', expected cpu or cuda"),
        (
            ["python", "--dtype", "float16"],
            "--dtype: got python, expected one of quantize, linear, train-step beside it",
        ),
    ],
)
def test_where_no_bench_runs_is_said_in_one_line(capsys, monkeypatch, words, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *words]) != 0
    assert said in capsys.readouterr().err
