"""``fairseq-dsq report`` over what fairseq-train and fairseq-generate really write."""

import json

import pytest

import fairseq_dsq
from fairseq_dsq.cli import main
from fairseq_dsq.report.runs import read_run


def test_the_report_puts_a_plain_run_beside_a_recorded_one(cli, tmp_path, capsys):
    plain, dsq = tmp_path / "plain", tmp_path / "dsq"
    plain.mkdir()
    flags = ("--max-epoch", 1, "--no-last-checkpoints")
    raw = ("--log-file", plain / "train.log")
    cli.train(plain, *flags, *raw, arch="transformer", criterion="label_smoothed_cross_entropy")
    cli.train(dsq, *flags, "--dsq-levels", "[16,4,4,16]")
    for folder in (plain, dsq):
        out, _ = cli.run(
            "fairseq-generate", cli.data, "--user-dir", fairseq_dsq.__path__[0], "--path",
            folder / "checkpoint_best.pt", "--beam", 1, "--required-batch-size-multiple", 1,
        )  # fmt: skip
        (folder / "generate.out").write_text(out)
    line = next(line for line in out.splitlines() if line.startswith("Generate test"))
    bleu = line.split("BLEU4 = ")[1].split(",")[0]
    (epoch,) = read_run(plain).epochs
    assert epoch.updates > 3 and epoch.train_loss > epoch.valid_loss > 1 and epoch.arithmetic is None
    assert read_run(plain).incomplete == ""
    assert main(["report", str(plain), str(dsq), str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 0
    text, err = capsys.readouterr()
    assert "| fairseq        | -  " in text
    assert "| Stashing (BFP) | [16,4,4,16] " in text and f" {bleu} (" in text
    assert err.count("\n") == 1 and "no such file or folder" in err
    assert (tmp_path / "out" / "index.html").stat().st_size > 10_000


def test_a_profile_prices_the_updates_anew(train, tmp_path, capsys):
    """The run's own costs come out again by the run's own profile; another's are its trajectory's in plain numbers."""
    folder = tmp_path / "dsq"
    levels = ("--dsq-levels", "[2,2,2,16] [16,4,4,16]", "--dsq-schedule", "updates", "--dsq-raise-at", 4)
    train(folder, "--max-update", 6, *levels, "--validate-interval-updates", 2)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone/dsq.jsonl").write_text((folder / "dsq.jsonl").read_text())
    capsys.readouterr()
    given = ["report", str(folder), str(tmp_path / "gone"), "--profile", "paper", "--profile", "operands", "--json"]
    assert main(given) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)["summary"]
    paper, operands = (summary["priced"][name] for name in ("paper", "operands"))
    row, _ = summary["rows"]
    assert row["levels"] == [["[2,2,2,16]", 4], ["[16,4,4,16]", 2]]
    assert paper[0] == pytest.approx([row["arithmetic"], row["dram"]], rel=0.03)
    # A multiplier's partial products: output at q0 by q0, grad_input at 16 by q2, grad_weight at q1 by 16.
    low, high = (2 * 2 + 2 * (16 * 2)) / 3 / 1024, (16 * 16 + 2 * (16 * 4)) / 3 / 1024
    assert operands[0][0] == pytest.approx((4 * low + 2 * high) / 6, rel=0.01)
    assert 0 < operands[0][1] < 1 and operands[1] is None
    assert f"not priced: {tmp_path}/gone: got no dsq.jsonl or no checkpoint_best.pt, expected both" in err
    assert main(["report", str(folder), "--profile", "none"]) == 2
    assert "--profile: got 'none'" in capsys.readouterr().err
    assert main(["report", str(folder), "--profile", "paper", "--profile", "paper"]) == 2
    assert "--profile: got paper paper, expected profiles whose names differ" in capsys.readouterr().err


def test_batches_that_share_an_update_are_priced_as_they_were_charged(train, tmp_path, capsys):
    charged = ("--dsq-levels", "[4,4,4,16]", "--dsq-cost-profile", "operands", "--max-update", 4)
    train(tmp_path / "run", *charged, "--update-freq", 4, "--max-tokens", 128)
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run"), "--profile", "operands", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    (row,), (priced,) = summary["rows"], summary["priced"]["operands"]
    # Batches of the mean size, none of them padding.
    assert priced == pytest.approx([row["arithmetic"], row["dram"]], rel=0.02)
