"""The corpora from archives laid out as the public ones are, and from $DSQ_DATA."""

import dataclasses
import gzip
import hashlib
import io
import sys
import tarfile
from collections import Counter

import pytest
import sacrebleu.dataset
from fairseq.data import Dictionary
from sacrebleu.dataset.fake_sgml import FakeSGMLDataset

from fairseq_dsq.artefact import differences
from fairseq_dsq.cli import main
from fairseq_dsq.translation import CORPORA, iwslt14, iwslt17, multi30k, prepare, settings, wmt14
from fairseq_dsq.translation.corpus import SPLITS, Corpus, extract
from fairseq_dsq.translation.toy import generate

TEXT = generate(train=400, valid=6, test=12)


@pytest.fixture(autouse=True)
def public_source(monkeypatch):
    monkeypatch.delenv("DSQ_DATA", raising=False)


def side(pairs, index):
    return "".join(f"{pair[index]}\n" for pair in pairs)


def sgm(pairs, index):
    """A NIST file of one document; an ampersand in it is no entity, as in the published ones."""
    rows = [f'<seg id="{number}"> {pair[index]} & more </seg>' for number, pair in enumerate(pairs, 1)]
    return "\n".join(['<?xml version="1.0" encoding="UTF-8"?>', '<doc docid="1" genre="x">', *rows, "</doc>"]) + "\n"


def more(pairs):
    return [(f"{first} & more", f"{second} & more") for first, second in pairs]


def pack(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return path.as_uri()


def flipped(pairs):
    return [(second, first) for first, second in pairs]


def publish_multi30k(folder, monkeypatch):
    for split, name in multi30k.CORPUS.files.items():
        for index, language in enumerate(("de", "en")):
            content = gzip.compress(side(TEXT[split], index).encode())
            (folder / f"{name}.{language}.gz").write_bytes(content)
            monkeypatch.setitem(multi30k.SHA256, f"{name}.{language}", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(multi30k, "URL", folder.as_uri() + "/")
    return {split: TEXT[split] for split in SPLITS}


def publish_iwslt14(folder, monkeypatch):
    pytest.importorskip("sacremoses")
    long = (" ".join(["Haus"] * 176), " ".join(["house"] * 176))
    quoted = ('Das ist\u2019s (z.B. "100%").', "That\u2019s it.")
    unlike, nearly = ("ein Haus", "a house , I say"), ("ein Haus", "a small house")
    members, text = {}, [long, unlike, nearly, *TEXT["train"]]
    for index, language in enumerate(("de", "en")):
        tags = "<url>http://x</url>\n<keywords>a, b</keywords>\n<talkid>1</talkid>\n<title>A Talk</title>\n"
        members[f"de-en/train.tags.de-en.{language}"] = tags + side(text, index)
        for number, name in enumerate(iwslt14.TEST):
            part = [*TEXT["test"][2 * number :][:2], quoted]
            members[f"de-en/IWSLT14.{name}.de-en.{language}.xml"] = sgm(part, index)
    monkeypatch.setattr(iwslt14, "URL", pack(folder / "de-en.tgz", members))
    # The toy's words and points stand apart already.
    kept = [("a talk", "a talk"), *((source.lower(), target.lower()) for source, target in [nearly, *TEXT["train"]])]
    test = [(f"{source.lower()} &amp; more", f"{target.lower()} &amp; more") for source, target in TEXT["test"][:10]]
    tokens = "das ist &apos; s ( z.B. &quot; 100 % &quot; ) . &amp; more".lower(), "that &apos;s it . &amp; more"
    return {
        "train": [pair for number, pair in enumerate(kept, 1) if number % 23],
        "valid": kept[22::23],
        "test": [pair for number in range(5) for pair in (*test[2 * number :][:2], tokens)],
    }


def publish_iwslt17(folder, monkeypatch):
    members = {}
    for index, language in enumerate(("de", "en")):
        tags = "<url>http://x</url>\n<title>A talk</title>\n"
        members[f"de-en/train.tags.de-en.{language}"] = tags + side(TEXT["train"], index) + "</doc>\n"
        members[f"de-en/IWSLT17.TED.dev2010.de-en.{language}.xml"] = sgm(TEXT["valid"], index)
        for year in range(2010, 2016):
            part = TEXT["test"][2 * (year - 2010) :][:2]
            members[f"de-en/IWSLT17.TED.tst{year}.de-en.{language}.xml"] = sgm(part, index)
    monkeypatch.setattr(iwslt17, "URL", pack(folder / "de-en.tgz", members))
    return {"train": TEXT["train"], "valid": more(TEXT["valid"]), "test": more(TEXT["test"])}


def publish_wmt14(folder, monkeypatch):
    thirds = (TEXT["train"][:100], TEXT["train"][100:250], TEXT["train"][250:])
    archives = []
    for (url, prefix), part in zip(wmt14.TRAIN, thirds, strict=True):
        members = {f"{prefix}.{language}": side(part, index) for index, language in enumerate(("de", "en"))}
        archives.append((pack(folder / url.rpartition("/")[2], {**members, "training/other.fr-en.fr": "?\n"}), prefix))
    monkeypatch.setattr(wmt14, "TRAIN", tuple(archives))
    monkeypatch.setattr("sacrebleu.dataset.base.SACREBLEU_DIR", str(folder / "sacrebleu"))
    for split, name in wmt14.SETS.items():
        files = ["set/source.en.sgm", "set/reference.de.sgm"]
        members = {file: sgm(TEXT[split], index) for file, index in zip(files, (1, 0), strict=True)}
        url = pack(folder / f"{split}.tgz", members)
        dataset = FakeSGMLDataset(name, data=[url], description="", langpairs={"en-de": files})
        monkeypatch.setitem(sacrebleu.dataset.DATASETS, name, dataset)
    return {
        "train": flipped(TEXT["train"]),
        "valid": flipped(more(TEXT["valid"])),
        "test": flipped(more(TEXT["test"])),
    }


PUBLISH = {"multi30k": publish_multi30k, "iwslt14": publish_iwslt14, "iwslt17": publish_iwslt17, "wmt14": publish_wmt14}


def test_every_corpus_is_tried():
    assert set(PUBLISH) == set(CORPORA)


@pytest.mark.parametrize("name", PUBLISH)
def test_the_archives_give_the_pairs_of_every_split(name, tmp_path, monkeypatch):
    expected = PUBLISH[name](tmp_path, monkeypatch)
    sizes = {split: len(pairs) for split, pairs in expected.items()}
    corpus = dataclasses.replace(CORPORA[name], published=sizes)
    for split in SPLITS:
        read = [tuple(text.strip() for text in pair) for pair in corpus.read(split, tmp_path / "downloads")]
        assert read == expected[split]


@pytest.mark.parametrize("name", PUBLISH)
def test_another_size_than_the_published_one_is_an_error(name, tmp_path, monkeypatch):
    PUBLISH[name](tmp_path, monkeypatch)
    published = CORPORA[name].published["test"]
    with pytest.raises(ValueError, match=f"{name}: got 1[25] test pairs, expected {published}"):
        list(CORPORA[name].read("test", tmp_path / "downloads"))


@pytest.mark.parametrize(("name", "module"), [("multi30k", multi30k), ("iwslt17", iwslt17)])
def test_an_address_that_cannot_be_reached_says_what_to_do(name, module, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "URL", (tmp_path / "nowhere/").as_uri())
    assert main(["translation-prepare", name, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "nowhere" in error and f"set DSQ_DATA to a folder that holds {CORPORA[name].folder}/train.de" in error


def test_a_broken_archive_and_a_missing_member_are_named(tmp_path):
    pack(tmp_path / "whole.tgz", {"a.de": "".join(f"{number**3}\n" for number in range(50_000))})
    whole = (tmp_path / "whole.tgz").read_bytes()
    for size in (60, len(whole) // 2):
        (tmp_path / "cut.tgz").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.tgz: a broken archive"):
            extract(tmp_path / "cut.tgz", ["a.de"], tmp_path / "out")
        assert not list((tmp_path / "out").rglob("*"))
    with pytest.raises(ValueError, match=r"whole\.tgz: has no a\.en"):
        extract(tmp_path / "whole.tgz", ["a.de", "a.en"], tmp_path / "out")


def own_corpus(folder, monkeypatch, train, valid=TEXT["valid"], **limits):
    """A corpus below $DSQ_DATA with these training and validation pairs."""
    monkeypatch.setenv("DSQ_DATA", str(folder))
    (folder / "own").mkdir()
    for split in SPLITS:
        pairs = {"train": train, "valid": valid, "test": TEXT["test"]}[split]
        for index, language in enumerate(("de", "en")):
            (folder / "own" / f"{split}.{language}").write_bytes(side(pairs, index).encode())
    return Corpus("own", "de", "en", "own", {}, lambda *_: (), **limits)


def test_a_prepared_folder_depends_on_every_split_s_text_and_on_what_is_left_out(tmp_path, monkeypatch):
    corpus = own_corpus(tmp_path, monkeypatch, TEXT["train"])
    for split in SPLITS:  # files of one name
        (tmp_path / "own" / split).mkdir()
        for language in corpus.languages:
            (tmp_path / f"own/{split}.{language}").rename(tmp_path / f"own/{split}/text.{language}")
    corpus = dataclasses.replace(corpus, files={split: f"{split}/text" for split in SPLITS})
    made = settings(corpus, 150)
    for split in SPLITS:
        with open(tmp_path / f"own/{split}/text.{corpus.source}", "a") as file:
            file.write("more\n")
        changed, made = made, settings(corpus, 150)
        assert {name for name in made if made[name] != changed[name]} == {f"{split}/text.{corpus.source}"}
    for limit in ({"max_pieces": 3}, {"max_ratio": 1.5}):
        assert differences(made, settings(dataclasses.replace(corpus, **limit), 150))


def test_training_pairs_that_are_empty_long_or_unlike_are_left_out_and_no_others(tmp_path, monkeypatch):
    unlike = [("", "something"), ("er " * 60, "he " * 60), ("er", "he sees a very old house")]
    train = [*TEXT["train"], *unlike]
    corpus = own_corpus(tmp_path, monkeypatch, train, unlike, max_pieces=50, max_ratio=4)
    counts = prepare(corpus, tmp_path / "out", vocab_size=300)
    assert counts == {"train": (400, 3), "valid": (3, 0), "test": (12, 0)}
    kept = [(tmp_path / f"out/train.{language}").read_text().splitlines() for language in ("de", "en")]
    assert [len(lines) for lines in kept] == [400, 400]
    lengths = [sorted(len(line.split()) for line in pair) for pair in zip(*kept, strict=True)]
    assert all(shorter >= 1 and longer <= 50 and longer <= 4 * shorter for shorter, longer in lengths)
    assert (tmp_path / "out/raw.test.en").read_text() == side(TEXT["test"], 1)


def test_without_limits_only_empty_training_pairs_are_left_out(tmp_path, monkeypatch):
    train = [*TEXT["train"], ("", "something"), ("", ""), ("er " * 300, "he")]
    corpus = own_corpus(tmp_path, monkeypatch, train)
    assert prepare(corpus, tmp_path / "out", vocab_size=300)["train"] == (401, 2)


def test_the_dictionary_has_every_piece_and_none_of_fairseq_s_own(tmp_path, monkeypatch):
    prepare(own_corpus(tmp_path, monkeypatch, TEXT["train"]), tmp_path / "out", vocab_size=300)
    dictionary = Dictionary.load(str(tmp_path / "out/dict.txt"))
    assert len(dictionary) == dictionary.nspecial + 300 - 3
    for language in ("de", "en"):
        pieces = set((tmp_path / f"out/train.{language}").read_text().split())
        assert not [piece for piece in pieces if dictionary.index(piece) == dictionary.unk()]


def test_a_line_ends_where_its_line_feed_is(tmp_path, monkeypatch):
    odd = [("er sieht\u2028ein Haus", "he sees\x0ba house"), ("sie\rsieht", "she\x85sees")]
    corpus = own_corpus(tmp_path, monkeypatch, [*odd, *TEXT["train"]])
    assert prepare(corpus, tmp_path / "out", vocab_size=300)["train"] == (402, 0)
    for language in ("de", "en"):
        for name in ("raw.train", "train"):
            assert len((tmp_path / f"out/{name}.{language}").read_text().splitlines()) == 402
    assert (tmp_path / "out/raw.train.en").read_text().startswith("he sees a house\nshe sees\n")


def test_sides_of_unlike_length_and_other_encodings_are_named(tmp_path, monkeypatch):
    corpus = own_corpus(tmp_path, monkeypatch, TEXT["train"])
    file = tmp_path / "own/valid.en"
    file.write_text(file.read_text() + "one more\n")
    with pytest.raises(ValueError, match=r"valid\.de, .*valid\.en: got unlike numbers of lines"):
        prepare(corpus, tmp_path / "out", vocab_size=300)
    file.write_bytes("Größe\n".encode("latin-1") * 6)
    with pytest.raises(ValueError, match=r"valid\.en: not UTF-8"):
        prepare(corpus, tmp_path / "out", vocab_size=300)


def test_a_vocabulary_that_the_text_does_not_fill_is_named(tmp_path, monkeypatch, capsys):
    own_corpus(tmp_path, monkeypatch, TEXT["train"])
    (tmp_path / "own").rename(tmp_path / "iwslt17_de-en")
    assert main(["translation-prepare", "iwslt17", str(tmp_path / "out"), "--vocab", "100000"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fairseq-dsq translation-prepare: error: --vocab: got 100000: ")
    assert len(error.splitlines()) == 1


def test_bpe_is_subword_nmt_s_and_its_dictionary_counts_the_training_text(tmp_path, monkeypatch):
    pytest.importorskip("subword_nmt")
    from subword_nmt import apply_bpe, learn_bpe

    corpus = own_corpus(tmp_path, monkeypatch, TEXT["train"])
    prepare(corpus, tmp_path / "out", vocab_size=150, pieces="bpe")
    own = [tmp_path / f"own/train.{language}" for language in ("de", "en")]
    codes = io.StringIO()
    learn_bpe.learn_bpe(io.StringIO("".join(file.read_text() for file in own)), codes, 150)
    assert (tmp_path / "out/bpe.codes").read_text() == codes.getvalue()
    bpe = apply_bpe.BPE(io.StringIO(codes.getvalue()))
    for split in SPLITS:
        for language in ("de", "en"):
            lines = (tmp_path / f"own/{split}.{language}").read_text().splitlines()
            assert (tmp_path / f"out/{split}.{language}").read_text().splitlines() == [bpe.segment(x) for x in lines]
    pieces = " ".join((tmp_path / f"out/train.{language}").read_text() for language in ("de", "en")).split()
    dictionary = Dictionary.load(str(tmp_path / "out/dict.txt"))
    assert {dictionary[index]: dictionary.count[index] for index in range(4, len(dictionary))} == Counter(pieces)
    assert any(piece.endswith("@@") for piece in pieces)


def test_pieces_without_their_package_or_of_too_little_text_say_so(tmp_path, monkeypatch, capsys):
    corpus = own_corpus(tmp_path, monkeypatch, TEXT["train"])
    (tmp_path / "own.yaml").write_text("corpus: {source: de, target: en, folder: own}\n")
    given = ["translation-prepare", str(tmp_path / "own.yaml"), str(tmp_path / "out"), "--pieces", "bpe", "--vocab"]
    monkeypatch.setitem(sys.modules, "subword_nmt", None)
    assert main([*given, "150"]) == 2
    assert "subword_nmt is not installed: pip install '.[translation]' in the clone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.delitem(sys.modules, "subword_nmt")
    pytest.importorskip("subword_nmt")
    assert main([*given, "9000"]) == 2
    assert "--vocab: got 9000: the text has " in capsys.readouterr().err
    assert differences(settings(corpus, 150, "bpe"), settings(corpus, 150)) == ["--pieces bpe, asked for nothing"]


def test_the_published_tokens_need_sacremoses(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    with pytest.raises(ValueError, match="sacremoses is not installed"):
        list(CORPORA["iwslt14"].read("test", tmp_path))
