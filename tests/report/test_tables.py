"""Table 1's layout: labels, rounding, differences, notes, escapes."""

import argparse
import csv
import io
import json

import pytest
from report import samples

from fairseq_dsq.cli.repricing import _batch, reprice
from fairseq_dsq.report import tables
from fairseq_dsq.report.runs import read_run
from fairseq_dsq.report.scores import scores


def table_of(paths, baseline=None):
    runs = tables.tell_apart([read_run(path) for path in paths])
    return tables.make_table(runs, [scores(run) for run in runs], baseline), runs


def test_markdown(tmp_path):
    table, _ = table_of(samples.write_runs(tmp_path, 4))
    assert tables.markdown(table) == (
        "| Method           | Precision setup        | BLEU4 (fairseq, tokenised) | Arithmetic | DRAM |\n"
        "| ---------------- | ---------------------- | -------------------------: | ---------: | ---: |\n"
        "| Float32          | [32,32,32,32]          |                      35.44 |       1.00 | 1.00 |\n"
        "| DSQ (BFP)        | [2,2,2,16] [16,4,4,16] |              34.17 (-1.27) |      0.080 | 0.40 |\n"
        "| Stashing (BFP)   | [16,4,4,16]            |              34.85 (-0.59) |       0.10 | 0.45 |\n"
        "| Stashing (Fixed) | [16,4,4,16]            |              33.90 (-1.54) |       0.13 | 0.31 |\n"
        "\n"
        "Arithmetic and DRAM: modelled, of the whole training, relative to the same GEMMs in 32-bit fixed point.\n"
        "\n"
        "In brackets: the difference from float32.\n"
        "\n"
        "| Levels                           | Shares                                | Changed after | Updates |\n"
        "| -------------------------------- | ------------------------------------- | ------------- | ------: |\n"
        "| DSQ (BFP) [2,2,2,16] [16,4,4,16] | [2,2,2,16] 33.3 %, [16,4,4,16] 66.7 % | 40            |     120 |\n"
        f"\n{tables.LEVELS_NOTE}\n"
    )


def held_runs(folder):
    """A run of float32 whose stash is said alone, one of codes over two epochs, one that is cut before an update."""
    codes = samples.start_line(2, **samples.DSQ)
    codes += samples.point_line(1, 10, 7.0, stash=3e6, held=(1e6, 4e6, 2.5e6), level=0)
    codes += samples.point_line(2, 20, 6.0, stash=5.125e6, held=(1e6, 4e6, 2e6), level=1)
    cut = samples.start_line(2, **samples.STATIC) + samples.point_line(1, 10, 7.0, held=(4e6,))
    texts = {"float32": samples.record(samples.FLOAT32, [5.0]), "codes": codes, "cut": cut}
    return [samples.write(folder, name, text) for name, text in texts.items()]


def test_what_the_runs_hold_is_a_table_of_its_own(tmp_path):
    paths = held_runs(tmp_path)
    table, runs = table_of(paths)
    first, second = tables.markdown(table).split("\n\n| Held")
    assert "| Held" + second == (
        "| Held (MB)                        | Weights | Gradients | States | Stash |   Sum |\n"
        "| -------------------------------- | ------: | --------: | -----: | ----: | ----: |\n"
        "| Float32                          |       - |         - |      - |  2.00 |     - |\n"
        "| DSQ (BFP) [2,2,2,16] [16,4,4,16] |    1.00 |      4.00 |   2.00 |  5.13 | 12.13 |\n"
        "| Stashing (BFP) [16,4,4,16]       |    4.00 |         - |      - |  2.00 |     - |\n"
        f"\n{tables.HELD_NOTE}\n"
    )
    # Table 1 is what it is without.
    without, _ = table_of([paths[0]])
    assert "Held" not in tables.markdown(without) and tables.held(without) == []
    assert first.splitlines()[0].endswith("| Arithmetic | DRAM |")
    row = json.loads(tables.to_json(table, runs, []))["summary"]["rows"][1]
    assert [row[f"{part}_bytes"] for part in ("weight", "gradient", "state", "stash")] == [1e6, 4e6, 2e6, 5.125e6]
    _, codes, cut = csv.DictReader(io.StringIO(tables.csv_text(table)))
    assert (float(codes["states (bytes)"]), cut["states (bytes)"]) == (2e6, "")
    assert tables.tex(table).count(r"\begin{tabular}") == 3 and r"{lrrrrr}" in tables.tex(table)


def test_a_profile_that_prices_updates_is_noted(tmp_path):
    flags = {**samples.DSQ, "dsq_cost_profile": "operands"}
    table, _ = table_of([samples.write(tmp_path, "run", samples.record(flags, [7]))])
    assert "DRAM by profile operands includes updates, relative to Adam's in float32." in tables.all_notes(table)
    table, _ = table_of([samples.write(tmp_path, "gone", samples.record({**flags, "dsq_cost_profile": "x.yaml"}, [7]))])
    assert not any("updates" in note for note in tables.all_notes(table))


def test_formats_that_a_profile_does_not_price_are_noted(tmp_path):
    levels = {"dsq_format": "mxfp4", "dsq_levels": "[4,nvfp4,4,bfp16]"}
    runs = {"mx": levels, "operands": {**levels, "dsq_cost_profile": "operands"}, "float": samples.FLOAT32}
    runs |= {"gone": {**levels, "dsq_format": "of_mine"}}
    table, _ = table_of([samples.write(tmp_path, name, samples.record(flags, [7])) for name, flags in runs.items()])
    said = "Profile paper has no price for mxfp4, nvfp4: charged as fixed point of the same bits, scales not counted."
    assert [note for note in tables.all_notes(table) if "no price" in note] == [said]


def test_costs_are_of_the_whole_training(tmp_path):
    text = samples.record(samples.DSQ, [7, 6, 5], [0, 0, 1], [samples.LOW, samples.LOW, samples.HIGH])
    path = samples.write(tmp_path, "dsq", text)
    table, _ = table_of([path])
    (row,) = table.rows
    assert row.arithmetic == pytest.approx((0.0318 * 2 + 0.1048) / 3)
    assert row.dram == pytest.approx((0.305453 * 2 + 0.446078) / 3, rel=1e-5)
    assert (row.arithmetic_total, row.epochs) == (pytest.approx(1.684e8), 3)


def test_tex(tmp_path):
    table, _ = table_of(samples.write_runs(tmp_path, 2))
    assert tables.tex(table) == (
        r"""\begin{tabular}{llrrr}
\toprule
Method & Precision setup & BLEU4 (fairseq, tokenised) & Arithmetic & DRAM \\
\midrule
Float32 & [32,32,32,32] & 35.44 & 1.00 & 1.00 \\
DSQ (BFP) & [2,2,2,16] [16,4,4,16] & 34.17 (-1.27) & 0.080 & 0.40 \\
\bottomrule
\end{tabular}
% Arithmetic and DRAM: modelled, of the whole training, relative to the same GEMMs in 32-bit fixed point.
% In brackets: the difference from float32.
\begin{tabular}{lllr}
\toprule
Levels & Shares & Changed after & Updates \\
\midrule
DSQ (BFP) [2,2,2,16] [16,4,4,16] & [2,2,2,16] 33.3 \%, [16,4,4,16] 66.7 \% & 40 & 120 \\
\bottomrule
\end{tabular}
% Share of the updates at each level, and after how many updates it changed, as of the lines of the record.
"""
    )


def test_csv_is_unrounded_and_names_its_units(tmp_path):
    table, _ = table_of(samples.write_runs(tmp_path, 2))
    float32, dsq = csv.DictReader(io.StringIO(tables.csv_text(table)))
    assert (float32["run"], dsq["run"]) == ("float32", "dsq")
    assert float(dsq["arithmetic (relative to 32-bit fixed point)"]) == pytest.approx((4 * 0.0318 + 8 * 0.1048) / 12)
    assert float(dsq["DRAM traffic (bytes)"]) == pytest.approx(4 * 6.10906e7 + 8 * 8.92156e7)
    assert float(dsq["BLEU4 (fairseq, tokenised): difference from the baseline"]) == pytest.approx(-1.27)
    assert float32["BLEU4 (fairseq, tokenised): difference from the baseline"] == ""


def test_json_holds_runs_epochs_and_summary_unrounded(tmp_path):
    path = samples.write(tmp_path, "dsq", samples.record(samples.DSQ, [7.125, float("nan")], [0, 1], [samples.LOW] * 2))
    table, runs = table_of([path])
    document = json.loads(tables.to_json(table, runs, ["x.log: an empty file"]))
    assert set(document) == {"runs", "summary", "skipped"}
    assert document["runs"][0]["epochs"][0]["valid_loss"] == 7.125
    assert document["runs"][0]["epochs"][1]["valid_loss"] is None
    assert document["summary"]["rows"][0]["arithmetic"] == pytest.approx(0.0318)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1.00"), (0.125, "0.13"), (0.1249968, "0.13"), (0.12494, "0.12"), (0.4461, "0.45"), (0.0318, "0.032"),
     (0.0995, "0.10"), (0.0994, "0.099"), (0.0125, "0.013"), (0.3125, "0.31"), (1.13359, "1.13"), (None, "-")],
)  # fmt: skip
def test_relative_costs_round_half_up_with_the_paper_s_digits(value, text):
    assert tables.relative(value) == text


def test_differences_carry_their_sign():
    assert [tables.fixed(value, 2, sign=True) for value in (0.565, -0.59, 0.0, -0.001)] == [
        "+0.57",
        "-0.59",
        "+0.00",
        "+0.00",
    ]


@pytest.mark.parametrize(
    ("flags", "labels"),
    [
        (samples.FLOAT32, ("Float32", "[32,32,32,32]")),
        (samples.DSQ, ("DSQ (BFP)", "[2,2,2,16] [16,4,4,16]")),
        (samples.STATIC, ("Stashing (BFP)", "[16,4,4,16]")),
        (samples.FIXED, ("Stashing (Fixed)", "[16,4,4,16]")),
        ({"dsq_format": "bfp", "dsq_levels": "[16,16,16,16]"}, ("BFP 16", "[16,16,16,16]")),
        ({"dsq_format": "fixed", "dsq_levels": "[16,16,16,16]"}, ("Fixed-point 16", "[16,16,16,16]")),
        ({"dsq_format": "posit", "dsq_levels": "[16,4,4,16]"}, ("Stashing (posit)", "[16,4,4,16]")),
        (
            {"dsq_levels": "[mxfp8e4m3,mxfp8e4m3,mxfp8e4m3,mxfp8e5m2]"},
            ("Stashing (mxfp8e4m3/mxfp8e5m2)", "[mxfp8e4m3,mxfp8e4m3,mxfp8e4m3,mxfp8e5m2]"),
        ),
        (
            {"dsq_format": "int", "dsq_levels": "[int8/row,int8/row,int8/row,int8/row]"},
            ("int8/row", "[int8/row,int8/row,int8/row,int8/row]"),
        ),
        ({"dsq_levels": "[16,mxfp4,mxfp4,16]"}, ("Stashing (BFP)", "[16,mxfp4,mxfp4,16]")),
        (
            {**samples.STATIC, "dsq_rounding": "stochastic", "dsq_skip": "*.fc1"},
            ("Stashing (BFP)", "[16,4,4,16], rounding stochastic, skip *.fc1"),
        ),
        ({**samples.DSQ, "dsq_patience": 9}, ("DSQ (BFP)", "[2,2,2,16] [16,4,4,16]")),
        (
            {"dsq_levels": "[1,1,1,15] [15,4,4,15]", "dsq_sign_bit": "extra"},
            ("DSQ (BFP)", "[1,1,1,15] [15,4,4,15], sign bit extra"),
        ),
        # Not everything is float32 under --dsq-format float32.
        (
            {"dsq_format": "float32", "dsq_levels": "[mxfp8e4m3,mxfp8e4m3,mxfp8e4m3,mxfp8e5m2]"},
            ("Stashing (mxfp8e4m3/mxfp8e5m2)", "[mxfp8e4m3,mxfp8e4m3,mxfp8e4m3,mxfp8e5m2]"),
        ),
        (
            {**samples.FLOAT32, "dsq_rules": "*.fc2=bfp4"},
            ("Float32, partly quantized", "float32, rules *.fc2=bfp4"),
        ),
        (
            {**samples.FLOAT32, "dsq_weights": "direct", "dsq_weight_format": "ternary"},
            ("Float32, partly quantized", "float32, weights direct, weight format ternary"),
        ),
        (
            {**samples.DSQ, "dsq_schedule": "updates", "dsq_raise_at": "4000"},
            ("DSQ (BFP)", "[2,2,2,16] [16,4,4,16], schedule updates, raise at 4000"),
        ),
    ],
)
def test_labels(tmp_path, flags, labels):
    run = read_run(samples.write(tmp_path, "x", samples.record(flags, [7], [0], [samples.HIGH])))
    assert tables.describe(run) == labels


def test_the_baseline_is_a_run_in_which_nothing_rounds(tmp_path):
    settings = {
        "mx": {"dsq_format": "float32", "dsq_levels": "[mxfp8e4m3,mxfp8e4m3,mxfp8e4m3,mxfp8e5m2]"},
        "rules": {**samples.FLOAT32, "dsq_rules": "*.fc2=bfp4"},
        "float": samples.FLOAT32,
    }
    paths = [samples.write(tmp_path, name, samples.record(flags, [7])) for name, flags in settings.items()]
    table, _ = table_of(paths)
    assert table.baseline == "float" and [row.partner for row in table.rows] == ["float", "float", None]


def test_a_plain_fairseq_run_has_no_costs_and_serves_as_the_baseline(tmp_path):
    plain = samples.write(tmp_path, "plain", samples.log([6.5]), "train.log")
    dsq = samples.write(tmp_path, "dsq", samples.record(samples.DSQ, [7], [0], [samples.LOW]))
    table, _ = table_of([dsq, plain])
    assert [tables.cells(table, row) for row in table.rows] == [
        ["DSQ (BFP)", "[2,2,2,16] [16,4,4,16]", "7.000 (+0.500)", "0.032", "0.31"],
        ["fairseq", "-", "6.500", "-", "-"],
    ]
    assert tables.header(table)[2] == "best valid loss (bits; lower is better)"


def test_without_a_record_a_run_with_costs_is_called_by_its_name(tmp_path):
    costs = {name: f"{value:g}" for name, value in samples.costs(samples.LOW).items()}
    text = samples.valid_line(1, 5, 6) + samples.train_line(1, 5, 7, **costs) + samples.DONE
    table, _ = table_of([samples.write(tmp_path, "mine", text, "train.log")])
    assert tables.cells(table, table.rows[0]) == ["mine", "-", "6.000", "0.032", "0.31"]


def test_unlike_metrics_get_columns_of_their_own_and_no_differences(tmp_path):
    float32, dsq = samples.write_runs(tmp_path, 2)
    (dsq / "generate.out").unlink()
    scored = {"accuracy": [91.5, 90.1], "f1": [88, 89]}
    text = samples.record(samples.STATIC, [0.5, 0.4], [0, 0], [samples.HIGH] * 2, **scored)
    glue = samples.write(tmp_path, "glue", text)
    table, _ = table_of([float32, dsq, glue])
    assert tables.header(table)[2:-2] == [
        "BLEU4 (fairseq, tokenised)",
        "best valid accuracy (%)",
        "best valid f1 (%)",
        "best valid loss (bits; lower is better)",
    ]
    assert [tables.cells(table, row)[2:-2] for row in table.rows] == [
        ["35.44", "-", "-", "4.148"],
        ["-", "-", "-", "4.398 (+0.250)"],
        ["-", "91.5", "89.0", "0.400 (-3.748)"],
    ]


def test_a_baseline_can_be_named_and_several_float32_runs_are_noted(tmp_path):
    paths = samples.write_runs(tmp_path / "a", 3) + samples.write_runs(tmp_path / "b", 1)
    table, runs = table_of(paths)
    assert tables.all_notes(table)[2] == "Differences are from a/float32, the first of 2 float runs."
    table, _ = table_of(paths, tables.find(runs, "stashing"))
    assert tables.cells(table, table.rows[0])[3] == "35.44 (+0.59)"
    with pytest.raises(ValueError, match="got 'x', expected one of the runs: a/float32, dsq, stashing, b/float32"):
        tables.find(runs, "x")
    assert tables.find(runs, str(paths[3])) == tables.find(runs, f"{paths[3].parent}/./{paths[3].name}/") == 3


def test_runs_of_one_name_are_told_apart(tmp_path):
    text = samples.record(samples.DSQ, [7])
    folders = [samples.write(tmp_path, f"{parent}/run", text) for parent in "ab"]
    (tmp_path / "seed.jsonl").write_text(text)
    (tmp_path / "seed.txt").write_text(samples.log([7]))
    paths = [*folders, tmp_path / "seed.jsonl", tmp_path / "seed.txt", folders[0] / "dsq.jsonl"]
    table, runs = table_of(paths)
    names = [run.name for run in runs]
    assert names == ["a/run", "b/run", "seed.jsonl", "seed.txt", "a/run/dsq.jsonl"]
    assert len({table.label(row) for row in table.rows}) == 5


def test_incomplete_runs_are_marked(tmp_path):
    text = samples.record(samples.DSQ, [7, 6], max_epoch=5) + samples.point_line(3, 25, 5.0, ended=False)
    table, _ = table_of([samples.write(tmp_path, "cut", text)])
    assert tables.cells(table, table.rows[0])[0] == "DSQ (BFP) *"
    assert tables.all_notes(table)[-1] == "* cut: incomplete: epoch 3 of 5 begun and not ended."


def test_costs_that_are_not_known_and_mixed_profiles_are_noted(tmp_path):
    late = samples.start_line(5, 20, 2, **samples.DSQ) + samples.point_line(2, 20, 6.0, ended=False)
    late += samples.point_line(3, 30, 6.0, ended=False) + samples.point_line(5, 50, 6.0)
    other = samples.record({**samples.STATIC, "dsq_cost_profile": "operands"}, [7], [0], [samples.HIGH])
    table, _ = table_of([samples.write(tmp_path, "late", late), samples.write(tmp_path, "other", other)])
    notes = tables.all_notes(table)
    assert "The runs' costs follow different profiles (operands, paper)." in notes
    assert (
        "* late: begins at update 20; what earlier updates cost is not in it; "
        "the end of epoch 2, 3, 4 was not logged; what it cost is not in it."
    ) in notes


def test_a_precision_that_never_rose_is_noted(tmp_path):
    three = {**samples.DSQ, "dsq_levels": "[2,2,2,16] [4,4,4,16] [16,4,4,16]"}
    records = {
        "low": samples.record(samples.DSQ, [7, 6], [0, 0], [samples.LOW] * 2),
        "within": samples.record(samples.DSQ, [7, 6], [0, 0.4], [samples.LOW] * 2),
        "high": samples.record(samples.DSQ, [7, 6], [0, 1], [samples.LOW] * 2),
        "middle": samples.record(three, [7, 6], [0, 1], [samples.LOW] * 2),
        "static": samples.record(samples.STATIC, [7, 6], [0, 0], [samples.HIGH] * 2),
    }
    table, _ = table_of([samples.write(tmp_path, name, text) for name, text in records.items()])
    assert [note for note in tables.all_notes(table) if "never rose" in note] == [
        "The precision of low never rose to [16,4,4,16].",
        "The precision of middle never rose to [16,4,4,16].",
    ]


def test_levels_are_labelled_by_value_where_a_resumed_run_was_given_others(tmp_path):
    before = {**samples.DSQ, "dsq_levels": "[2,2,2,16] [4,4,4,16]"}
    after = {**samples.DSQ, "dsq_levels": "[4,4,4,16] [8,8,8,16] [16,4,4,16]"}
    text = samples.start_line(4, **before) + samples.point_line(1, 10, 7.0, levels=samples.values(**before))
    text += samples.point_line(2, 20, 6.5, level=1, levels=samples.values(**before))
    text += samples.point_line(3, 25, 6.0, level=1, ended=False, levels=samples.values(**before))
    text += samples.start_line(4, 25, 3, **after)
    text += samples.point_line(3, 30, 6.0, level=0.5, levels=samples.values(**after))
    text += samples.point_line(4, 40, 5.0, level=1, levels=samples.values(**after))
    path = samples.write(tmp_path, "resumed", text)
    table, (run,) = table_of([path])
    # The first level is not among those that the run was given last, whose label has their notation.
    assert table.rows[0].levels == (("[bfp2,bfp2,bfp2,bfp16]", 10), ("[4,4,4,16]", 20), ("[8,8,8,16]", 10))
    assert run.levels == ()
    assert [epoch.level for epoch in run.epochs] == [None, None, None, 1]
    with pytest.raises(ValueError, match="resumed: got levels that it was resumed without, expected one list"):
        reprice(run, [])
    assert table.rows[0].notes == ("trained at other levels up to update 25",)
    assert [note for note in table.notes if "never rose" in note] == [
        "the precision of resumed never rose to [16,4,4,16]"
    ]


def test_levels_that_rules_alone_tell_apart_are_counted_apart(tmp_path):
    flags = {"dsq_levels": "[4,4,4,16] [4,4,4,16]", "dsq_rules": "*.fc2=[2,2,2,16] [16,16,16,16]"}
    path = samples.write(tmp_path, "ruled", samples.record(flags, [7, 6, 5], [0, 1, 1]))
    table, (run,) = table_of([path])
    assert run.levels == ((0, 10), (1, 20))
    assert table.rows[0].levels == (("[4,4,4,16]", 10), ("[4,4,4,16]", 20))


def test_a_batch_is_priced_at_the_mean_size_of_all_updates(tmp_path):
    text = samples.start_line(0, max_update=41)
    for epoch, update, sentences, tokens in ((1, 10, 100, 3000), (2, 40, 120, 4000), (3, 41, 4, 60)):
        line = json.loads(samples.point_line(epoch, update, 7.0))
        line["train"] |= {"bsz": sentences, "wpb": tokens}
        text += json.dumps(line) + "\n"
    spec = _batch(read_run(samples.write(tmp_path, "run", text)), argparse.Namespace(arch="transformer"), 2)
    # (10 * 3000 + 30 * 4000 + 60) / (10 * 100 + 30 * 120 + 4) = 32.6 tokens; 4604 / 41 / 2 = 56.1 sentences
    assert (spec.length, spec.batch) == (33, 56)


def test_costs_of_several_profiles_are_not_added_up(tmp_path):
    text = samples.start_line(2, **samples.DSQ) + samples.point_line(1, 10, 7.0)
    text += samples.start_line(2, 10, 2, dsq_cost_profile="operands", **samples.DSQ) + samples.point_line(2, 20, 6.0)
    table, (run,) = table_of([samples.write(tmp_path, "mixed", text)])
    row = table.rows[0]
    assert (row.arithmetic, row.dram, row.arithmetic_total, row.dram_total) == (None, None, None, None)
    assert row.notes == ("charged by several profiles in turn (paper, operands), whose costs do not add up",)
    assert [epoch.arithmetic_relative for epoch in run.epochs] == [None, None]
    # A training that charged nothing at first has one profile's costs.
    plain = json.loads(samples.point_line(1, 10, 7.0))
    plain["train"] = {"loss": 7.0, "num_updates": 10}
    text = text.replace(samples.point_line(1, 10, 7.0), json.dumps(plain) + "\n")
    assert table_of([samples.write(tmp_path, "once", text)])[0].rows[0].arithmetic == pytest.approx(samples.LOW[0])


def test_special_characters_are_escaped(tmp_path):
    name = "a|b_c *x* $y$ <i>&[z](u) 50% {q}~^#"
    costs = {name: f"{value:g}" for name, value in samples.costs(samples.LOW).items()}
    text = samples.train_line(1, 5, 7, **costs) + samples.DONE
    table, _ = table_of([samples.write(tmp_path, name, text, "train.log")])
    assert r"a\|b_c \*x\* \$y\$ \<i\>\&[z\](u) 50% {q}\~^\#" in tables.markdown(table)
    assert (
        r"a|b\_c *x* \$y\$ \textless{}i\textgreater{}\&[z](u) 50\% \{q\}\textasciitilde{}\textasciicircum{}\#"
        in tables.tex(table)
    )
    assert next(csv.reader(io.StringIO(tables.csv_text(table).split("\n", 1)[1])))[0] == name
    first = samples.write(tmp_path, "[x]", text, "train.log")
    assert "\n{[}x] & - " in tables.tex(table_of([first])[0])


SACREBLEU = '{\n "name": "BLEU",\n "score": 35.4,\n "signature": "nrefs:1"\n}\n'


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generate.out": "Generate test with beam=4: BLEU4 = 34.85, 66.5/41.5\n"}, {"bleu4": 34.85}),
        ({"a.txt": "x | INFO | fairseq_cli.generate | Generate test with beam=5: BLEU4 = 1.5, 1\n"}, {"bleu4": 1.5}),
        (
            {"generate-valid.txt": "Generate valid with beam=4: BLEU4 = 40.0, 1\n",
             "generate-test.txt": "Generate test with beam=4: BLEU4 = 30.0, 1\n"},
            {"bleu4": 30.0},
        ),
        ({"generate.out": "Generate test with beam=4: BLEU4 = 1.5, 1\nGenerate test with beam=5: BLEU4 = 2.5, 1\n"},
         {"bleu4": 2.5}),
        ({"generate.out": "Generate test with beam=4: BLEU = 35.44 66.9/42.0 (BP = 1.000)\n"}, {"sacrebleu": 35.44}),
        ({"score.txt": "BLEU|nrefs:1|case:mixed|tok:13a|version:2.6.0 = 35.4 66.9/42.0\n"}, {"sacrebleu": 35.4}),
        ({"score.bleu": "BLEU+case.mixed+numrefs.1+version.1.5.1 = 35.4 66.9/42.0\n"}, {"sacrebleu": 35.4}),
        ({"score.json": SACREBLEU}, {"sacrebleu": 35.4}),
        ({"score.json": f'[{SACREBLEU}, {{"name": "chrF2", "score": 60.1}}]'}, {"sacrebleu": 35.4}),
        ({"score.json": '{"name": "BLEU", "score": '}, {}),
        ({"score.txt": "BLEU4 = 20.5, 50/40/30/20 (BP=1.000)\n"}, {"bleu4": 20.5}),
        ({"hypotheses.en": "BLEU4 = 1.0\n"}, {}),
    ],
)  # fmt: skip
def test_scores_beside_a_record_are_found(tmp_path, files, expected):
    folder = samples.write(tmp_path, "run", samples.record(samples.DSQ, [7.5], bleu=[31.5]))
    for name, text in files.items():
        (folder / name).write_text(text)
    assert scores(read_run(folder)) == {"valid_loss": 7.5, "valid_bleu": 31.5, **expected}
    # A file stands for itself: what lies beside it may be another run's.
    assert scores(read_run(folder / "dsq.jsonl")) == {"valid_loss": 7.5, "valid_bleu": 31.5}


def test_a_run_is_judged_by_the_best_that_is_known(tmp_path):
    folder = samples.write(tmp_path, "run", samples.record(samples.DSQ, [7.5], bleu=[31.5]))
    assert table_of([folder])[0].metrics == ("valid_bleu",)
    (folder / "score.json").write_text(SACREBLEU)
    (folder / "generate.out").write_text("Generate test with beam=4: BLEU4 = 34.85, 1\n")
    assert table_of([folder])[0].metrics == ("sacrebleu",)
