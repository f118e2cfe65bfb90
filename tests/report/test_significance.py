"""Paired tests and the spread of seeds against sacreBLEU's own, on small runs; the levels that a run went through."""

import json
import subprocess
import sys

import pytest
from report import samples

from fairseq_dsq.report import tables
from fairseq_dsq.report.runs import read_run
from fairseq_dsq.report.scores import scores
from fairseq_dsq.report.significance import p_value, read_translations
from fairseq_dsq.translation.toy import generate

TEXT = [english for _, english in generate(train=1, valid=1, test=60)["test"]]
SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:{}|smooth:exp|version:2.6.0"


def worse(every, word="something"):
    """Translations with a wrong word in every so many."""
    return [f"{word} {line}" if number % every == 0 else line for number, line in enumerate(TEXT)]


def run(folder, name, flags, hypotheses, seed, score=50.0, tok="13a"):
    path = samples.write(folder, name, samples.record({**flags, "seed": seed}, [5.0, 4.0]))
    (path / "hypotheses.en").write_text("\n".join(hypotheses) + "\n")
    (path / "reference.en").write_text("\n".join(TEXT) + "\n")
    found = {"name": "BLEU", "score": score, "signature": SIGNATURE.format(tok)}
    (path / "score.json").write_text(json.dumps(found))
    return path


def table_of(paths):
    runs = tables.tell_apart([read_run(path) for path in paths])
    found = [scores(run) for run in runs]
    return tables.make_table(runs, found, translations=[read_translations(run) for run in runs])


@pytest.mark.parametrize("tok", ["13a", "none"])
def test_a_p_value_is_sacrebleu_s_own(tmp_path, tok):
    paths = [
        run(tmp_path, "float32-seed1", samples.FLOAT32, worse(4), 1, tok=tok),
        run(tmp_path, "dsq-seed1", samples.DSQ, worse(3, "otherwise"), 1, tok=tok),
    ]
    files = [path / "hypotheses.en" for path in paths]
    command = [sys.executable, "-m", "sacrebleu", paths[0] / "reference.en", "-i", *files, "-m", "bleu", "--paired-bs"]
    done = subprocess.run([*command, "--tokenize", tok, "--format", "json"], capture_output=True, text=True, check=True)
    expected = json.loads(done.stdout)[1]["BLEU"]["p_value"]
    baseline, other = (read_translations(read_run(path)) for path in paths)
    assert 0 < expected < 1 and p_value(baseline, other) == pytest.approx(expected, abs=1e-4)
    assert "| " + f"{expected:.3f}" in tables.markdown(table_of(paths))


def test_seeds_of_a_method_stand_together_beside_their_spread(tmp_path):
    paths = [
        run(tmp_path, "float32-seed1", samples.FLOAT32, worse(6), 1, 40.0),
        run(tmp_path, "dsq-seed1", samples.DSQ, worse(2), 1, 38.0),
        run(tmp_path, "stash-seed1", samples.STATIC, worse(6), 1, 40.0),
        run(tmp_path, "float32-seed2", samples.FLOAT32, worse(2), 2, 41.0),
        run(tmp_path, "dsq-seed2", samples.DSQ, worse(2), 2, 37.0),
        # Others that records cannot tell from a seed.
        run(tmp_path, "wider", samples.DSQ, worse(3), 3, 39.0),
    ]
    table = table_of(paths)
    lines = tables.seeds(table)
    assert [line[:5] for line in lines] == [
        ["Method", "Seeds", "BLEU (sacreBLEU)", "Spread", "Difference"],
        ["float32", "1 2", "40.50", "1.00", "-"],
        ["dsq", "1 2", "37.50", "1.00", "-3.00 (-4.00, -2.00)"],
        # Each from the run of its own seed: the mean of other seeds would be 0.5 off.
        ["stash", "1", "40.00", "-", "+0.00"],
        ["wider", "3", "39.00", "-", "-1.00"],
    ]
    assert [tables.cells(table, row)[3] for row in table.rows] == [
        "40.00", "38.00 (-2.00)", "40.00 (+0.00)", "41.00", "37.00 (-4.00)", "39.00 (-1.00)",
    ]  # fmt: skip
    assert "In brackets: the difference from float32-seed1's method at the same seed, else from float32-seed1." in (
        tables.all_notes(table)
    )
    translations = [read_translations(read_run(path)) for path in paths]
    first, second = (p_value(translations[a], translations[b]) for a, b in ((0, 1), (3, 4)))
    assert lines[1][5] == "-" and lines[2][5] == f"{first:.3f}, {second:.3f}"
    assert first < 0.05 and (second, lines[3][5]) == (1.0, "1.000")  # what is equal differs by chance
    notes = tables.markdown(table)
    assert (
        f"BLEU: {SIGNATURE.format('13a')}".replace("|", "\\|") in notes
        and "from float32's run of the same seed" in notes
    )
    (group,) = [method for method in table.methods if method.name == "dsq"]
    assert (group.mean, group.spread, group.difference, group.seeds) == (37.5, 1.0, -3.0, (1, 2))


def test_a_run_of_another_folder_changes_no_comparison(tmp_path):
    """It has a baseline's name, by which that one is then shown under a longer one."""
    folder, flags = tmp_path / "a", {"float32": samples.FLOAT32, "bfp": samples.STATIC}
    paths = [
        run(folder, f"{name}-seed{seed}", flags[name], worse(3), seed, score)
        for name, seed, score in (("float32", 1, 40.0), ("float32", 2, 50.0), ("bfp", 1, 41.0), ("bfp", 2, 49.0))
    ]
    alone = table_of(paths)
    beside = table_of([*paths, run(tmp_path / "b", "float32-seed1", samples.FLOAT32, worse(3), 1, 45.0)])
    assert beside.rows[0].name == "a/float32-seed1"
    assert [row.differences for row in beside.rows[:4]] == [row.differences for row in alone.rows]
    assert [(method.seeds, method.differences) for method in beside.methods[:2]] == [
        ((1, 2), (None, None)), ((1, 2), (1.0, -1.0)),
    ]  # fmt: skip


def test_records_that_lie_elsewhere_are_seeds_of_a_method_too(tmp_path):
    paths = [tmp_path / f"dsq.v{version}-seed{seed}.jsonl" for version, seed in ((1, 1), (1, 2), (2, 1))]
    for path, seed in zip(paths, (1, 2, 1), strict=True):
        path.write_text(samples.record({**samples.DSQ, "seed": seed}, [5.0, 4.0]))
    assert [method.seeds for method in table_of(paths).methods] == [(1, 2), (1,)]


def test_what_was_not_translated_from_the_same_text_is_not_tested(tmp_path):
    paths = [run(tmp_path, f"{name}-seed1", flags, worse(3), 1) for name, flags in (
        ("float32", samples.FLOAT32), ("dsq", samples.DSQ), ("stash", samples.STATIC), ("fixed", samples.FIXED),
        ("damaged", samples.DSQ), ("listed", samples.DSQ),
    )]  # fmt: skip
    (paths[4] / "score.json").write_text('{"name": "BLEU", "score": 1.0, "signature": ' + "[" * 9999)
    (paths[5] / "score.json").write_text('[{"name": "BLEU", "score": 1.0}]')
    (paths[1] / "reference.en").write_text("\n".join(reversed(TEXT)) + "\n")
    (paths[2] / "hypotheses.en").write_text("one line\n")
    score = json.loads((paths[3] / "score.json").read_text())
    (paths[3] / "score.json").write_text(json.dumps({**score, "signature": SIGNATURE.format("none")}))
    table = table_of(paths)
    assert all(value is None for method in table.methods for value in method.p_values)
    assert tables.seeds(table) == []
    assert f"BLEU of fixed-seed1: {SIGNATURE.format('none')}." in tables.all_notes(table)


def test_levels_are_counted_in_updates(tmp_path):
    text = samples.start_line(9, **samples.DSQ)
    for epoch, update, level in ((1, 100, 0), (1, 130, 0), (1, 130, 0), (2, 200, 1), (2, 260, 1), (3, 390, 0)):
        text += samples.point_line(epoch, update, 5.0, level=level)
    path = samples.write(tmp_path, "dsq", text)
    assert read_run(path).levels == ((0, 130), (1, 130), (0, 130))
    table = table_of([path])
    assert table.rows[0].levels == (("[2,2,2,16]", 130), ("[16,4,4,16]", 130), ("[2,2,2,16]", 130))
    assert tables.trained_levels(table)[1][1:] == ["[2,2,2,16] 66.7 %, [16,4,4,16] 33.3 %", "130, 260", "390"]
    assert read_run(path).trained == table.rows[0].levels
    never = samples.write(tmp_path, "never", samples.record(samples.DSQ, [5.0]))
    assert tables.trained_levels(table_of([never]))[1][1:] == ["[2,2,2,16] 100.0 %", "never", "10"]
    one = samples.write(tmp_path, "static", samples.record(samples.STATIC, [5.0]))
    assert tables.trained_levels(table_of([one])) == []
