"""A few inputs of every target of fuzz.py, and the inputs that were found by it."""

import signal
import time

import pytest
from fuzz import fuzz

from fairseq_dsq import data_files, formats
from fairseq_dsq.cost.hardware import Hardware, load_hardware
from fairseq_dsq.formats import BlockFloat
from fairseq_dsq.glue import TASKS, tsv
from fairseq_dsq.precision import parse_levels, parse_q
from fairseq_dsq.report.runs import read_run
from fairseq_dsq.report.scores import scores

TARGETS = fuzz.targets()
# Inputs each; a million in scripts/fuzz.sh.
COUNTS = {"levels": 3000, "q": 3000, "format": 3000, "log": 300, "table": 300, "vocabulary": 100, "packed": 300}


@pytest.fixture(autouse=True)
def alarm():
    before = signal.signal(signal.SIGALRM, fuzz._too_long)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_gives_a_value_or_one_line(name):
    failures, kinds = fuzz.fuzz(name, TARGETS[name], 1, range(COUNTS.get(name, 40)))
    assert not failures, kinds


@pytest.mark.parametrize(
    "text",
    [
        *("[2,2,2,1_6]", "[2,2,2,+16]", "[2,2,2,016]", "[2,2,2,0x10]", "[2,2,2,²]", "[2,2,2,٣]", "[2,2,2,16,]"),
        *("[" * 10**6, "-0" * 10**6, "[2,2,2," + "9" * 5000 + "]", "(" * 10**5, "[2,2,2,16\0]", "[2,\n2,2,x]"),
    ],
    ids=lambda text: text[:12],
)
def test_what_is_no_decimal_number_is_no_q(text):
    begun = time.monotonic()
    for parse in (parse_q, parse_levels):
        with pytest.raises(ValueError, match="expected") as error:
            parse(text)
        assert len(str(error.value)) < 300 and "\n" not in str(error.value)
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize("text", ["bfp٤", "bfp²", "bfp4x" + "9" * 5000, "fixed8.٤", "bfp4\n", "x" * 10**6])
def test_formats_are_written_in_ascii_and_short(text):
    with pytest.raises(ValueError, match=r"^format: got .*expected") as error:
        formats.parse(text)
    assert len(str(error.value)) < 300


def test_a_box_that_no_kernel_can_count_is_refused():
    with pytest.raises(ValueError, match="box_size"):
        BlockFloat(4, 2**64)  # the kernels would see 0: the whole tensor


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &a [x, x]\nb: [*a, *a]\n", "alias"),
        ("[" * 10**5, "nested too deeply"),
        ("name: ${name\n", "not YAML"),
        ("name: !!timestamp 9\n", "tag"),
        ("name: !!python/name:os.system\n", "tag"),
        ("12\n", "expected a mapping"),
        ("1: \0\n", "not YAML"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
        ("#" * (1 << 20) + "\n", "bytes, expected at most"),
    ],
    ids=["alias", "nesting", "interpolation", "tag", "python", "scalar", "nul", "documents", "size"],
)
def test_a_data_file_that_is_none_is_named_in_one_line(tmp_path, text, expected):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected) as error:
        data_files.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("speed", [float("nan"), float("inf"), 0.0])
def test_a_machine_s_speed_is_a_number(speed):
    with pytest.raises(ValueError, match="gigabytes_per_s"):
        Hardware("x", {32: 1.0}, speed, "")
    with pytest.raises(ValueError, match="tera_ops_per_s"):
        Hardware("x", {32: 1.0, 16: speed}, 1.0, "")
    with pytest.raises(ValueError, match="expected"):
        load_hardware("x" * 5000)


@pytest.mark.parametrize(
    "line",
    [
        '{"epoch": 2, "train_num_updates": NaN, "train_loss": "1"}',
        '{"epoch": 2, "train_num_updates": 1e999, "train_loss": "1"}',
        '{"epoch": 2, "train_num_updates": ' + "9" * 400 + "}",
        '{"epoch": ' + "9" * 5000 + ', "train_num_updates": "1"}',
        '{"epoch": 2, "train_num_updates": "1", "a": ' + "[" * 10**5,
    ],
    ids=range(5),
)
def test_a_damaged_line_does_not_spoil_a_log(tmp_path, line):
    path = tmp_path / "train.log"
    path.write_text(fuzz.LOGS[0] + line + "\n")
    run = read_run(path)
    assert [epoch.train_loss for epoch in run.epochs] == [8, 6.75, 6.5]


def test_a_score_is_a_finite_number(tmp_path):
    (tmp_path / "dsq.jsonl").write_text(fuzz.RECORDS[0])
    for text in ('{"name": "BLEU", "score": ' + "9" * 400 + "}", "[" * 10**5 + '"BLEU"', f"BLEU = {'9' * 400}"):
        (tmp_path / "score.json").write_text(text)
        assert "sacrebleu" not in scores(read_run(tmp_path))


def test_a_score_of_glue_is_a_decimal_number(tmp_path):
    for text in ("1_0", "٣", "nan", "+-1", "0x1", ""):
        (tmp_path / "dev.tsv").write_text(f"sentence1\tsentence2\tscore\nA\tB\t{text}\n", encoding="utf-8")
        with pytest.raises(ValueError, match="expected a number from 0 to 5"):
            tsv.read(TASKS["STS-B"], tmp_path / "dev.tsv")
