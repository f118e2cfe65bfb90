"""fairseq-dsq cost and roofline, as a user calls them."""

import json

import pytest

from fairseq_dsq.cli import main

MATPLOTLIB = "matplotlib"


def run(capsys, *argv):
    assert main([*map(str, argv)]) == 0
    return capsys.readouterr().out


def as_json(capsys, *argv):
    return json.loads(run(capsys, *argv, "--json"))


def refused(capsys, *argv):
    assert main([*map(str, argv)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_the_paper_table(capsys):
    text = run(capsys, "cost", "--paper-table")
    assert "8 rows equal, 4 misfits (profile paper)" in text
    assert "misfit: Table 1 prints 0.45" in text
    rows = as_json(capsys, "cost", "--paper-table")["rows"]
    assert [row["equal"] for row in rows].count(True) == 8
    assert all(row["equal"] != bool(row["misfit"]) for row in rows)


def test_one_setting(capsys):
    result = as_json(capsys, "cost", "--format", "bfp", "--precision", "16,4,4,16", "--profile", "paper")
    assert result["arithmetic_relative"] == pytest.approx(0.10479166666666667, rel=1e-12)
    assert result["dram_relative"] == pytest.approx((40 / 4 + 4.2745) / 32, rel=1e-12)
    text = run(capsys, "cost", "--precision", "2,2,2,2")
    assert "arithmetic 20.95x, DRAM 2.55x" in text


def test_formats_that_the_profile_does_not_price_are_named(capsys):
    setting = ("cost", "--precision", "bfp4|mxfp4,nvfp4,4,bfp16")
    said = "profile paper has no price for mxfp4, nvfp4: charged as fixed point of the same bits, scales not counted"
    assert run(capsys, *setting).splitlines()[-1] == said
    assert run(capsys, "cost", "--trajectory", "2,2,2,16:1 mxfp4,nvfp4,4,16:2").splitlines()[-1] == said
    assert as_json(capsys, *setting)["unpriced"] == ["mxfp4", "nvfp4"]
    for argv in ((*setting, "--profile", "operands"), ("cost", "--precision", "fixed8,float32,4,16")):
        assert "no price" not in run(capsys, *argv) and as_json(capsys, *argv)["unpriced"] == []


def test_the_layer_matters_to_profile_operands_alone(capsys):
    for profile, equal in (("paper", True), ("operands", False)):
        wide, narrow = (
            as_json(capsys, "cost", "--profile", profile, "--layer", layer)["dram_relative"]
            for layer in ("4096x512x2048", "64x64x64")
        )
        assert (wide == pytest.approx(narrow, rel=1e-9)) == equal


def test_a_trajectory_is_the_mean_over_its_epochs(capsys):
    low, high = (as_json(capsys, "cost", "--precision", q) for q in ("2,2,2,16", "16,4,4,16"))
    result = as_json(capsys, "cost", "--trajectory", "2,2,2,16:12 16,4,4,16:3")
    assert result["epochs"] == 15
    for key in ("arithmetic_relative", "dram_relative"):
        assert result[key] == pytest.approx((12 * low[key] + 3 * high[key]) / 15)
    text = run(capsys, "cost", "--trajectory", "2,2,2,16:12 16,4,4,16:3")
    assert "all                15        0.0464  0.3336" in text


def test_a_model_s_layers_and_gemms_add_up_to_it(capsys):
    result = as_json(capsys, "cost", "--arch", "transformer_iwslt_de_en", "--tokens", 64, "--profile", "operands")
    for table in ("layers", "gemms"):
        assert sum(row["macs"] for row in result[table]) == result["macs"]
        assert sum(row["arithmetic"] for row in result[table]) == pytest.approx(result["arithmetic"])
    for key in ("dram_bytes", "stash_bytes"):
        assert sum(row[key] for row in result["layers"]) == result[key]
    # The per-GEMM table leaves out the writing of stashes, and the update.
    rest = result["stash_bytes"] + result["update_dram_bytes"]
    assert sum(row["dram_bytes"] for row in result["gemms"]) == result["dram_bytes"] - rest
    assert result["layers"][-1]["layer"] == "(update)"
    text = run(capsys, "cost", "--arch", "transformer_iwslt_de_en", "--tokens", 64, "--profile", "operands")
    assert "decoder.output_projection" in text and f"{result['macs']:,} MACs" in text


SMALL = (
    "--arch", "transformer_dsq_iwslt_de_en", "--tokens", 64, "--vocabulary", 100, "--flags",
    "--encoder-layers 1 --decoder-layers 1 --share-decoder-input-output-embed ",
)  # fmt: skip


def small(flags=""):
    return (*SMALL[:-1], SMALL[-1] + flags)


def test_an_update_is_charged_where_the_profile_prices_it_and_shared_by_its_batches(capsys):
    adam = as_json(capsys, "cost", *small(), "--profile", "operands")
    values = adam["update_dram_bytes"] / 28
    assert values == int(values) > 1_000_000 and adam["workload"]["optimizer"] == "adam"
    shared = as_json(capsys, "cost", *small("--update-freq 4"), "--profile", "operands")
    assert shared["update_dram_bytes"] == adam["update_dram_bytes"] / 4
    low = as_json(capsys, "cost", *small("--optimizer dsq_adam --dsq-weights direct"), "--profile", "operands")
    # A byte each of codes and moments, and their scales, of embeddings the moments alone.
    assert 10 < low["update_dram_bytes"] / values < 10.3
    again = as_json(capsys, "cost", *small("--checkpoint-activations"), "--profile", "operands")
    assert again["update_dram_bytes"] == adam["update_dram_bytes"] and again["macs"] > adam["macs"]
    for argv in (("--profile", "paper"), ("--profile", "operands", "--forward-only")):
        assert "update_dram_bytes" not in as_json(capsys, "cost", *small(), *argv)


def test_flags_say_the_levels_and_their_format_as_in_training(capsys):
    flags = "--dsq-format=fixed --dsq-sign-bit extra --dsq-levels '[8,8,8,8] [16,8,8,16]'"
    found = as_json(capsys, "cost", *small(flags))
    argv = ("--format", "fixed", "--sign-bit", "extra", "--precision", "8,8,8,8")
    alone = as_json(capsys, "cost", *small(), *argv)
    assert [level["precision"] for level in found["levels"]] == [[8, 8, 8, 8], [16, 8, 8, 16]]
    assert found["format"] == "fixed" and all(alone[key] == value for key, value in found["levels"][0].items())


def test_levels_that_rules_alone_tell_apart_are_priced_apart(capsys):
    rules = "--dsq-rules '*.fc*=[2,2,2,16] [16,16,16,16]'"
    ruled = f"--dsq-levels '[4,4,4,16] [4,4,4,16]' {rules}"
    found = as_json(capsys, "cost", *small(ruled))["levels"]
    alone = [
        as_json(capsys, "cost", *small(f"--dsq-levels [4,4,4,16] --dsq-rules '*.fc*={level}'"))
        for level in ("[2,2,2,16]", "[16,16,16,16]")
    ]
    costs = [level["arithmetic_relative"] for level in alone]
    assert costs[0] < costs[1] and [level["arithmetic_relative"] for level in found] == costs
    trained = as_json(capsys, "cost", *small(ruled), "--trajectory", "4,4,4,16:1 4,4,4,16:3")
    assert trained["arithmetic_relative"] == pytest.approx((costs[0] + 3 * costs[1]) / 4)
    first, second = as_json(capsys, "cost", *small(f"{ruled} --dsq-stash-scope gemm"), "--memory")["memory"]
    assert first["stash"] < second["stash"]


def test_a_precision_may_have_spaces(capsys):
    assert as_json(capsys, "cost", "--precision", "2, 2, 2, 16")["precision"] == [2, 2, 2, 16]


def test_sixteen_bit_fixed_point_has_float_weights_and_states(capsys):
    for flags in ("", "--optimizer dsq_adam"):
        result = as_json(capsys, "cost", *small(flags), "--profile", "operands", "--format", "fixed", "--precision",
                         "16,16,16,16")  # fmt: skip
        assert (result["dram_below_fixed16"] == pytest.approx(1, abs=1e-3)) == (flags == "")
        assert result["dram_below_fixed16"] >= 1


def test_what_a_step_holds_by_part_and_the_batch_that_fits(capsys):
    flags = "--optimizer dsq_adam"
    result = as_json(
        capsys, "cost", "--arch", "transformer_tiny", "--tokens", 96, "--precision", "2,2,2,16",
        "--memory", "--fit", "0.1GiB", "--flags", flags,
    )  # fmt: skip
    rows = result["memory"]
    assert result["fit"] == int(0.1 * 2**30) and result["workload"]["optimizer"] == "dsq_adam"
    assert [(row["precision"], row["stash_scope"]) for row in rows] == [
        ("float32", ""), ("[2,2,2,16]", "gemm"), ("[2,2,2,16]", "all"),
    ]  # fmt: skip
    for row in rows:
        parts = [row[part] for part in ("weights", "gradients", "states", "stash", "saved")]
        assert row["total"] == sum(parts) and row["largest_tokens"] == 32 * row["largest_batch"]
        assert row["states"] < row["weights"] == row["gradients"]
    assert rows[0]["stash"] == 0 < rows[1]["stash"] and rows[2]["stash"] + rows[2]["saved"] < rows[1]["saved"]
    assert rows[2]["saved"] < rows[1]["saved"] < rows[0]["saved"]
    assert rows[0]["largest_batch"] < rows[1]["largest_batch"] < rows[2]["largest_batch"]
    (scope,) = as_json(capsys, "cost", *small("--dsq-stash-scope gemm"), "--memory")["memory"]
    assert scope["stash_scope"] == "gemm"
    text = run(capsys, "cost", *small(), "--memory", "--trajectory", "2,2,2,16:1 16,4,4,16:1")
    assert text.count("[2,2,2,16]") == text.count("[16,4,4,16]") == 2 and "float32" not in text
    assert "largest" not in text and "Not counted" in text


def test_flags_change_the_model_and_validation_has_no_backward(capsys):
    small = ("cost", "--arch", "transformer_iwslt_de_en", "--tokens", 64)
    whole = as_json(capsys, *small)
    forward = as_json(capsys, *small, "--forward-only")
    assert 3 * forward["macs"] == whole["macs"]
    assert forward["stash_bytes"] == 0 < whole["stash_bytes"]
    assert as_json(capsys, *small, "--flags", "--encoder-layers 12")["macs"] > whole["macs"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--precision", "2,2,2"), "--precision: got '2,2,2', expected four integers"),
        (("--precision", "2,2,2,99"), "--precision: q3: got 99, expected 2 to 32 (--format bfp)"),
        (("--format", "nix"), "--format: got 'nix', expected one of bfp, fixed, float32"),
        (("--trajectory", "2,2,2,16"), "--trajectory: got '2,2,2,16', expected Q:EPOCHS"),
        (("--trajectory", "2,2,2,16:0"), "--trajectory: got '2,2,2,16:0', expected Q:EPOCHS"),
        (("--trajectory", " "), "--trajectory: got nothing, expected Q:EPOCHS"),
        (("--layer", "3x4"), "--layer: got '3x4', expected MxKxN"),
        (("--profile", "nix"), "--profile: got 'nix', expected operands, paper or the path"),
        (("--arch", "nix"), "--arch: got 'nix', expected opt-1.3b"),
        (("--arch", "roberta-base", "--layer", "1x2x3"), "--layer: got it beside --arch"),
        (("--arch", "roberta-base", "--tokens", "100"), "--tokens: got 100, expected a multiple of length 512"),
        (("--arch", "roberta-base", "--flags", "--nix 3"), "--flags: unrecognized arguments: --nix 3"),
        (("--arch", "roberta_dsq", "--flags", "--dsq-format nix"), "--flags: argument --dsq-format: got 'nix'"),
        (("--arch", "roberta_dsq", "--flags", "--dsq-levels '[8"), "--flags: No closing quotation"),
        (
            ("--arch", "roberta_dsq", "--format", "bfp", "--flags", "--dsq-format fixed"),
            "--format: got bfp beside --dsq-format in --flags, expected --dsq-format there",
        ),
        (
            ("--arch", "roberta_dsq", "--format", "fixed", "--flags", "--dsq-rules '*.fc1=[8,8,8,16]'"),
            "--format: got fixed beside --dsq-rules in --flags, expected --dsq-format there",
        ),
        (
            ("--arch", "roberta_dsq", "--precision", "2,2,2,16", "--flags", "--dsq-levels [2,2,2,16]"),
            "--precision: got '2,2,2,16' beside --dsq-levels in --flags, expected one of the two",
        ),
        (
            ("--arch", "roberta_dsq", "--trajectory", "2,2,2,16:1 4,4,4,16:1", "--flags", "--dsq-levels [2,2,2,16]"),
            "--trajectory: got [4,4,4,16], expected one of --dsq-levels in --flags, [2,2,2,16]",
        ),
        (("--flags", "--encoder-layers 1"), "--flags: got it without --arch, expected none"),
        (("--paper-table", "--format", "fixed"), "--format: got it beside --paper-table, expected none"),
        (("--arch", "transformer", "--memory", "--profile", "paper"), "--profile: got it beside --memory"),
        (("--memory",), "--memory: got no --arch beside it"),
        (("--arch", "roberta-base", "--fit", "16G"), "--fit: got it without --memory"),
        (("--arch", "roberta-base", "--memory", "--fit", "16X"), "--fit: got '16X', expected a size such as 16GB"),
        (("--arch", "roberta-base", "--memory", "--forward-only"), "--forward-only: got it beside --memory"),
        (("--arch", "lightconv", "--memory"), "--arch: got 'lightconv', expected one with a twin"),
        (("--arch", "transformer", "--memory", "--flags", " --fp16"), "--flags: got --fp16, expected none"),
        (("--paper-table", "--arch", "roberta-base"), "--paper-table: got a model beside it"),
    ],
)
def test_bad_input_gets_one_line(capsys, argv, message):
    assert f"fairseq-dsq cost: error: {message}" in refused(capsys, "cost", *argv)


def test_roofline_prints_table_7_and_draws_figure_1(capsys, tmp_path):
    pytest.importorskip(MATPLOTLIB)
    text = run(capsys, "roofline", "--out", tmp_path / "figures")
    table = text[text.index("Table 7") :]
    for group, share, bound in (("attention", "47.93", "memory"), ("fully connected", "32.20", "compute"),
                                ("others", "19.87", "memory")):  # fmt: skip
        row = next(line for line in table.splitlines() if line.startswith(group))
        assert share in row and row.split().count(bound) == 2 and row.endswith("equal")
    assert "16384 tokens in sequences of 2048" in text and "A100" in text
    first = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert set(first) == {"roofline.png", "roofline.svg"}
    assert first["roofline.png"].startswith(b"\x89PNG")
    for label in ("not quantized", "standard quantization", "stashing", "DSQ level 0", "DSQ level 1"):
        assert label in first["roofline.svg"].decode()
    run(capsys, "roofline", "--out", tmp_path / "again")
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}


def test_roofline_s_json_is_json_where_it_draws_too(capsys, tmp_path):
    pytest.importorskip(MATPLOTLIB)
    model = ("--model", "transformer_iwslt_de_en", "--tokens", "64")
    assert main(["roofline", *model, "--json", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["tokens"] == 64 and err.count("wrote ") == 2


def test_roofline_of_another_model_and_machine(capsys):
    result = as_json(
        capsys, "roofline", "--model", "transformer_iwslt_de_en", "--tokens", 512, "--hardware", "jetson-orin-nano",
        "--float-bits", 32, "--levels", "[2,2,2,16] [4,4,4,16] [16,4,4,16]",
    )  # fmt: skip
    assert [setting["setting"] for setting in result["settings"]] == [
        "not quantized", "standard quantization", "stashing", "DSQ level 0", "DSQ level 1", "DSQ level 2",
    ]  # fmt: skip
    assert result["paper_table_7"] == {} and result["tokens"] == 512
    for setting in result["settings"]:
        assert sum(group["share"] for group in setting["groups"]) == pytest.approx(1)


@pytest.mark.parametrize("name", ["nvfp4", "float32"])
def test_roofline_refuses_a_format_that_cannot_express_its_settings(capsys, name):
    levels = {"nvfp4": "[nvfp4,nvfp4,nvfp4,nvfp4]", "float32": "[32,32,32,32]"}[name]
    assert main(["roofline", "--format", name, "--levels", levels]) == 2
    assert f"--format: got {name}, expected one of any width, such as bfp" in capsys.readouterr().err


def test_measured_hardware_can_be_saved_and_used(capsys, tmp_path):
    path = tmp_path / "here.yaml"
    model = ("--model", "transformer_iwslt_de_en", "--tokens", 64)
    measured = as_json(capsys, "roofline", *model, "--hardware", "measure", "--save-hardware", path)
    assert as_json(capsys, "roofline", *model, "--hardware", path)["hardware"] == measured["hardware"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--hardware", "nix"), "--hardware: got 'nix', expected a100-sxm-80gb"),
        (("--model", "nix"), "--model: got 'nix'"),
        (
            ("--model", "transformer_dsq_tiny", "--tokens", "64"),
            "--model: got 'transformer_dsq_tiny', expected the float",
        ),
        (("--levels", "[16,4,4,16] [2,2,2,1]"), "--levels: level 1: q3: got 1, expected 2 to"),
    ],
)
def test_bad_input_to_roofline_gets_one_line(capsys, argv, message):
    assert f"fairseq-dsq roofline: error: {message}" in refused(capsys, "roofline", *argv)
