"""``fairseq-dsq report`` over what fairseq-train and fairseq-generate really write."""

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
