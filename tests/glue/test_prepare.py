"""Prepared folders, as fairseq's own task reads them; bad input leaves nothing behind."""

import json

import numpy as np
import pytest
from fairseq import tasks
from fairseq.data import Dictionary

from fairseq_dsq.cli import main
from fairseq_dsq.glue.encoder import SPECIAL_TOKENS
from fairseq_dsq.glue.prepare import Prepared, training_flags
from fairseq_dsq.glue.sentence_prediction import parse, updates_per_epoch

pytest.importorskip("tokenizers")

ROBERTA = ("--arch", "roberta", "--criterion", "sentence_prediction")
WORDS = ("the", "dog", "cat", "sees", "runs")
HEADERS = {
    "CoLA": "",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
    "RTE": "index\tsentence1\tsentence2\tlabel\n",
    "STS-B": "index\tsentence1\tsentence2\tscore\n",
}


@pytest.fixture
def encoder(tmp_path):
    """A WordPiece encoder folder; the preparation does not read the model."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "model.pt").touch()
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *WORDS]) + "\n")
    (folder / "dict.txt").write_text("".join(f"{word} 1\n" for word in WORDS))
    (folder / "arch.args").write_text("--arch roberta --encoder-layers 1 --max-positions 16\n")
    return folder


@pytest.fixture
def bpe_encoder(encoder):
    """The same folder with byte-level BPE: single letters."""
    (encoder / "vocab.txt").unlink()
    letters = [*"abcdefghijklmnopqrstuvwxyz", "Ġ"]
    (encoder / "encoder.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    (encoder / "vocab.bpe").write_text("#version: 0.2\n")
    (encoder / "dict.txt").write_text("".join(f"{index} 1\n" for index in range(len(letters))))
    return encoder


def write_tsv(tmp_path, task, train, dev):
    folder = tmp_path / "tsv"
    folder.mkdir(exist_ok=True)
    for name, rows in (("train.tsv", train), ("dev.tsv", dev)):
        (folder / name).write_text(HEADERS[task] + "".join(f"{row}\n" for row in rows))
    return folder


def prepare(tmp_path, task, *flags, code=0):
    command = ["glue-prepare", task, str(tmp_path / "out"), "--encoder", str(tmp_path / "encoder"), "--data",
               str(tmp_path / "tsv"), "--downloads", str(tmp_path / "downloads"), *map(str, flags)]  # fmt: skip
    assert main(command) == code
    return tmp_path / "out"


def examples(folder, split):
    """(symbols, target) as fairseq's task gives them to a model."""
    task = tasks.setup_task(parse([str(folder / "bin"), *ROBERTA, *training_flags(Prepared.load(folder))]).task)
    dataset = task.load_dataset(split)
    found = {}
    for item in map(dataset.__getitem__, range(len(dataset))):
        symbols = " ".join(task.dictionary[index] for index in item["net_input.src_tokens"].tolist())
        found[item["id"]] = (symbols, np.asarray(item["target"]).item())
    return [found[index] for index in sorted(found)]


RTE_TRAIN = ["0\tThe dog runs\tthe cat sees\tnot_entailment", "1\tthe cat\tthe fish\tentailment"]
RTE_DEV = ["0\tthe cat\tthe dog\tentailment"]


def test_a_wordpiece_pair_as_fairseq_reads_it(tmp_path, encoder, capsys):
    write_tsv(tmp_path, "RTE", RTE_TRAIN, RTE_DEV)
    out = prepare(tmp_path, "RTE")
    # Classes in the task's order, whatever comes first in the file.
    assert examples(out, "train") == [
        ("<s> the dog runs </s> the cat sees </s>", 1),
        ("<s> the cat </s> the <unk> </s>", 0),
    ]
    assert examples(out, "valid") == [("<s> the cat </s> the dog </s>", 0)]
    assert (out / "train.input1").read_text() == "the cat sees\nthe <unk>\n"
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {out}: RTE (train 2, valid 1) in wordpiece tokens, 1 of 14 unknown to the dictionary"
    ]


def test_a_bpe_pair_has_two_separators(tmp_path, bpe_encoder):
    write_tsv(tmp_path, "RTE", ["0\tab\tc d\tentailment"], RTE_DEV)
    out = prepare(tmp_path, "RTE")
    assert examples(out, "train") == [("<s> 0 1 </s> </s> 2 26 3 </s>", 0)]


@pytest.mark.parametrize("tokens", ["wordpiece", "bpe"])
def test_a_single_sentence_has_no_separator(tmp_path, tokens, request):
    request.getfixturevalue("encoder" if tokens == "wordpiece" else "bpe_encoder")
    write_tsv(tmp_path, "CoLA", ["gj04\t1\t\tthe dog runs", "gj04\t0\t*\tdog the runs"], ["gj04\t1\t\tthe cat"])
    out = prepare(tmp_path, "CoLA")
    symbols, target = examples(out, "train")[0]
    assert symbols.split()[0] == "<s>"
    assert symbols.split().count("</s>") == 1
    assert target == 1


def test_scores_are_scaled_to_1(tmp_path, encoder):
    write_tsv(tmp_path, "STS-B", ["0\tthe dog\tthe cat\t3.800", "1\tthe\tdog\t5"], ["0\tthe dog\tthe cat\t0.000"])
    out = prepare(tmp_path, "STS-B")
    targets = [target for _, target in examples(out, "train")]
    assert targets == [pytest.approx(0.76), 1.0]
    flags = training_flags(Prepared.load(out))
    assert "--regression-target" in flags
    assert flags[flags.index("--num-classes") + 1] == "1"
    assert flags[flags.index("--best-checkpoint-metric") + 1] == "loss"


def test_the_best_of_a_classification_has_the_highest_accuracy(tmp_path, encoder):
    write_tsv(tmp_path, "RTE", RTE_TRAIN, RTE_DEV)
    config = parse([str(tmp_path), *ROBERTA, *training_flags(Prepared.load(prepare(tmp_path, "RTE")))])
    assert config.checkpoint.best_checkpoint_metric == "accuracy"
    assert config.checkpoint.maximize_best_checkpoint_metric


def test_the_dictionary_is_the_encoder_s(tmp_path, encoder):
    write_tsv(tmp_path, "RTE", RTE_TRAIN, RTE_DEV)
    out = prepare(tmp_path, "RTE")
    for side in ("input0", "input1"):
        assert Dictionary.load(str(out / "bin" / side / "dict.txt")) == Dictionary.load(str(encoder / "dict.txt"))


def many(count):
    return [f"{index}\tthe {WORDS[index % 5]}\tthe dog\tentailment" for index in range(count)]


def test_a_subset_is_drawn_with_a_fixed_seed_and_keeps_its_order(tmp_path, encoder):
    everything = [" ".join(["the"] * (index + 1)) for index in range(40)]
    rows = [f"{index}\t{text}\tthe dog\tentailment" for index, text in enumerate(everything)]
    write_tsv(tmp_path, "RTE", rows, RTE_DEV)
    out = prepare(tmp_path, "RTE", "--train-rows", 10)
    lines = (out / "train.input0").read_text().splitlines()
    assert len(lines) == 10
    assert Prepared.load(out).rows == {"train": 10, "valid": 1}
    assert lines != everything[:10]
    assert lines == sorted(set(lines), key=everything.index)
    before = (out / "train.input0").read_bytes()
    (out / "prepared.json").unlink()
    for path in sorted(out.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    prepare(tmp_path, "RTE", "--train-rows", 10)
    assert (out / "train.input0").read_bytes() == before


def test_rows_grouped_by_length_keep_their_labels_and_are_batched_in_their_order(tmp_path, encoder, capsys):
    lengths = [5, 1, 4, 2, 3]
    labels = ["entailment" if length % 2 else "not_entailment" for length in lengths]
    rows = [
        f"{index}\t{' '.join(['the'] * length)}\tthe dog\t{label}"
        for index, (length, label) in enumerate(zip(lengths, labels, strict=True))
    ]
    write_tsv(tmp_path, "RTE", rows, rows)
    out = prepare(tmp_path, "RTE", "--group-by-length")
    for split in ("train", "valid"):
        assert [len(line.split()) for line in (out / f"{split}.input0").read_text().splitlines()] == [1, 2, 3, 4, 5]
        written = (out / f"{split}.label").read_text().splitlines()
        assert written == [label for _, label in sorted(zip(lengths, labels, strict=True))]
    task = tasks.setup_task(parse([str(out / "bin"), *ROBERTA, *training_flags(Prepared.load(out))]).task)
    assert list(task.load_dataset("train").ordered_indices()) == [0, 1, 2, 3, 4]
    prepare(tmp_path, "RTE", code=2)
    assert "(RTE with all training rows, grouped by length); name another folder" in capsys.readouterr().err


def test_the_same_preparation_is_kept_and_another_refused(tmp_path, encoder, capsys):
    write_tsv(tmp_path, "RTE", RTE_TRAIN, RTE_DEV)
    out = prepare(tmp_path, "RTE")
    before = (out / "prepared.json").stat().st_mtime_ns
    capsys.readouterr()
    prepare(tmp_path, "RTE")
    assert capsys.readouterr().out.startswith(f"found {out}: RTE (train 2, valid 1)")
    expected = f"{out}: was prepared of other files or settings (RTE with all training rows); name another folder"
    prepare(tmp_path, "RTE", "--train-rows", 1, code=2)
    assert expected in capsys.readouterr().err
    write_tsv(tmp_path, "RTE", RTE_TRAIN[:1], RTE_DEV)
    prepare(tmp_path, "RTE", code=2)
    assert expected in capsys.readouterr().err
    assert (out / "prepared.json").stat().st_mtime_ns == before


def test_broken_rows_that_glue_ships_are_counted(tmp_path, encoder, capsys):
    HEADER = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    folder = tmp_path / "tsv"
    folder.mkdir()
    (folder / "train.tsv").write_text(HEADER + "1\t2\t3\tthe dog\tthe cat\t1\nbroken\n2\t3\t4\tthe dog\t\t0\n")
    (folder / "dev.tsv").write_text(HEADER + "1\t2\t3\tthe dog\tthe cat\t0\n")
    out = prepare(tmp_path, "QQP")
    assert capsys.readouterr().err == (
        "fairseq-dsq glue-prepare: warning: QQP train: skipped 2 rows that GLUE ships broken\n"
    )
    assert Prepared.load(out).skipped == {"train": 2}


@pytest.mark.parametrize(
    ("train", "flags", "expected"),
    [
        (
            ["0\tthe dog\tthe cat\tmaybe"],
            (),
            "tsv/train.tsv:2: column 'label': got 'maybe', expected one of entailment",
        ),
        (["0\tthe dog\tentailment"], (), "tsv/train.tsv:2: got 3 fields (0 | the dog | entailment), expected 4"),
        (RTE_TRAIN, ("--train-rows", 3), "--train-rows: got 3, expected at most the 2 rows of "),
        (RTE_TRAIN, ("--train-rows", -1), "--train-rows: got -1, expected an integer >= 1, or 0 for all"),
        (["0\txyz\tabc\tentailment"] * 20, (), "dict.txt: does not know 40 of 44 tokens, expected the dictionary that"),
        (
            RTE_TRAIN,
            ("--data", "nowhere"),
            "nowhere: has no train.tsv or train_subset.tsv, expected RTE's training set",
        ),
        (RTE_TRAIN, ("--encoder", "nowhere"), "got 'nowhere', expected an encoder folder or one of roberta.base"),
    ],
)
def test_bad_input_is_named_in_one_line_and_leaves_nothing(tmp_path, encoder, capsys, train, flags, expected):
    write_tsv(tmp_path, "RTE", train, RTE_DEV)
    before = sorted(tmp_path.rglob("*"))
    prepare(tmp_path, "RTE", *flags, code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fairseq-dsq glue-prepare: error: ")
    assert expected in line
    assert sorted(tmp_path.rglob("*")) == before


def test_data_that_are_not_there_are_refused_before_an_encoder_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fairseq_dsq.cli.glue_prepare.find", lambda *_: pytest.fail("an encoder was looked for"))
    command = ["glue-prepare", "RTE", "out", "--data", str(tmp_path), "--downloads", str(tmp_path / "downloads")]
    assert main(command) == 2
    assert f"{tmp_path}: has no train.tsv" in capsys.readouterr().err


def test_an_unknown_task_is_named(tmp_path, encoder, capsys):
    prepare(tmp_path, "SNLI", code=2)
    assert "error: TASK: got 'SNLI', expected one of CoLA, SST-2, MRPC" in capsys.readouterr().err


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, encoder, capsys):
    write_tsv(tmp_path, "RTE", RTE_TRAIN, RTE_DEV)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    prepare(tmp_path, "RTE", code=2)
    assert "out: holds something else, expected a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_failure_of_the_binarisation_leaves_nothing(tmp_path, encoder, monkeypatch, capsys):
    write_tsv(tmp_path, "RTE", RTE_TRAIN, RTE_DEV)
    (encoder / "dict.txt").write_text("the many\n")  # no count: fairseq's loader refuses it
    prepare(tmp_path, "RTE", code=2)
    assert "dict.txt" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


TRAIN = (
    "--criterion", "sentence_prediction", "--batch-size", "32", "--required-batch-size-multiple", "1",
    "--shorten-method", "truncate", "--optimizer", "adam", "--lr", "1e-3", "--lr-scheduler", "polynomial_decay",
)  # fmt: skip


def flags_of(tmp_path, capsys, *more, code=0):
    capsys.readouterr()
    command = ["glue-flags", "--encoder", str(tmp_path / "encoder"), str(tmp_path / "out"), "--", *TRAIN, *more]
    assert main(command) == code
    return capsys.readouterr()


@pytest.mark.parametrize(
    ("more", "updates"),
    [
        (("--max-epoch", "3"), 3 * 4),  # 100 rows of 7 tokens in batches of 32
        (("--max-epoch", "3", "--batch-size", "16"), 3 * 7),
        (("--max-epoch", "3", "--max-tokens", "70"), 3 * 10),
        (("--max-epoch", "3", "--update-freq", "2"), 3 * 2),
    ],
)
def test_the_decay_ends_with_the_updates_that_fairseq_makes(tmp_path, encoder, capsys, more, updates):
    write_tsv(tmp_path, "RTE", many(100), RTE_DEV)
    out = prepare(tmp_path, "RTE")
    flags = flags_of(tmp_path, capsys, *more).out.splitlines()
    config = parse(flags)
    assert config.lr_scheduler.total_num_update == updates
    assert config.lr_scheduler.warmup_updates == round(0.06 * updates)
    assert updates_per_epoch(config) * 3 == updates
    assert config.checkpoint.finetune_from_model == str(encoder / "model.pt")
    assert flags[:3] == [str(out / "bin"), "--arch", "roberta"]


def test_a_flag_of_one_s_own_stands(tmp_path, encoder, capsys):
    write_tsv(tmp_path, "RTE", many(100), RTE_DEV)
    prepare(tmp_path, "RTE")
    config = parse(flags_of(tmp_path, capsys, "--max-epoch", "3", "--warmup-updates", "5").out.splitlines())
    assert (config.lr_scheduler.warmup_updates, config.lr_scheduler.total_num_update) == (5, 12)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--lr", "fast", "--max-epoch", "1"), "error: argument --lr"),
        (("--nonsense", "1", "--max-epoch", "1"), "unrecognized arguments: --nonsense"),
        ((), "error: --max-epoch: got 0, expected an integer >= 1"),
        (("--max-epoch", "1", "--max-tokens", "3"), "should not exceed max_tokens=3"),
    ],
)
def test_flags_that_fairseq_refuses_are_one_line(tmp_path, encoder, capsys, more, expected):
    write_tsv(tmp_path, "RTE", RTE_TRAIN, RTE_DEV)
    prepare(tmp_path, "RTE")
    printed = flags_of(tmp_path, capsys, *more, code=2)
    (line,) = printed.err.splitlines()
    assert line.startswith("fairseq-dsq glue-flags: error: ")
    assert expected in line
    assert not printed.out


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("glue-flags", "{}/tsv"), "tsv: has no prepared.json, expected a folder that fairseq-dsq glue-prepare wrote"),
        (("glue-evaluate", "{}/tsv", "{}/best.pt"), "tsv: has no prepared.json, expected a folder that fairseq-dsq"),
        (("glue-evaluate", "{}/out", "{}/best.pt"), "best.pt: No such file or directory"),
    ],
)
def test_what_is_missing_is_named(tmp_path, encoder, capsys, command, expected):
    write_tsv(tmp_path, "RTE", RTE_TRAIN, RTE_DEV)
    prepare(tmp_path, "RTE")
    assert main([part.format(tmp_path) for part in command]) == 2
    assert expected in capsys.readouterr().err


def test_a_damaged_manifest_is_named(tmp_path, encoder, capsys):
    write_tsv(tmp_path, "RTE", RTE_TRAIN, RTE_DEV)
    out = prepare(tmp_path, "RTE")
    for text in ("{", '{"task": "RTE"}'):
        (out / "prepared.json").write_text(text)
        prepare(tmp_path, "RTE", code=2)
        assert "prepared.json: " in capsys.readouterr().err
