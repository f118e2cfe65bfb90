"""The toy corpus: German word order, one translation a sentence, the same everywhere."""

import hashlib
import random
import re

import pytest

from fairseq_dsq import cli
from fairseq_dsq.translation import toy

SIZES = (900, 60, 40)
TIMES = [time for times in toy.TIMES.values() for time, _ in times if time]
FINITE = {form for forms, _, _ in toy.VERBS for form in forms.split()[:4]}
FINITE |= {forms.split(" ")[5] + form for forms, _, _ in toy.VERBS for form in forms.split()[:2]}
PARTICIPLES = {forms.split()[4] for forms, _, _ in toy.VERBS} - FINITE
PREFIXES = {forms.split(" ")[5] for forms, _, _ in toy.VERBS} - {""}
NOUNS = {noun.split()[number] for noun in (*toy.PEOPLE, *toy.ANIMALS) for number in (1, 2)}


def sentences(count=3000, seed=0):
    rng = random.Random(seed)
    return [toy.sentence(rng) for _ in range(count)]


def clauses(german):
    """The main clause and the subordinate one, if any, as words."""
    main, _, subordinate = re.sub(r" \.$", "", german).partition(" , ")
    return main.split(), subordinate.split()[1:]


def test_the_finite_verb_is_second_after_a_time_too():
    fronted = 0
    for german, _ in sentences():
        main, _ = clauses(german)
        time = next((time.split() for time in TIMES if main[: len(time.split())] == time.split()), None)
        fronted += time is not None
        # What is first is a time, or a noun phrase, which ends with its noun.
        first = len(time) if time else next(at for at, word in enumerate(main) if word in NOUNS) + 1
        assert main[first] in FINITE | {form for verb, _ in toy.SAYING for form in verb.split()}, german
    assert fronted > 500


def test_the_finite_verb_of_a_subordinate_clause_is_last():
    found = 0
    for german, _ in sentences():
        _, subordinate = clauses(german)
        found += bool(subordinate)
        assert not subordinate or subordinate[-1] in FINITE, german
        if set(subordinate) & PARTICIPLES:
            assert subordinate[-2] in PARTICIPLES, german
    assert found > 1000


def test_a_participle_or_a_prefix_ends_the_main_clause():
    ends = {main[-1] for main, _ in map(clauses, (german for german, _ in sentences()))}
    assert ends >= PARTICIPLES | PREFIXES
    for german, _ in sentences():
        main, _ = clauses(german)
        assert not (set(main[:-1]) & (PARTICIPLES | PREFIXES)), german


def test_some_sentences_and_their_translations():
    found = dict(sentences(10_000))
    for german, english in {
        "letzte Woche hat ein Arzt die Ärzte gesehen .": "last week a doctor saw the doctors .",
        "das Kind ruft am Abend zwei Mädchen an .": "the child calls two girls in the evening .",
        "der Arzt sagt , dass ein Kind diese Bücher abholt .": "the doctor says that a child fetches these books .",
        "eine Lehrerin besucht diese kleine Lehrerin , weil ein Mädchen gestern ein altes Ei gegessen hat .": (
            "a teacher visits this small teacher because a girl ate an old egg yesterday ."
        ),
        "morgen kommt ein Hund an .": "tomorrow a dog will arrive .",
        "zwei alte Hunde schlafen im Garten .": "two old dogs sleep in the garden .",
    }.items():
        assert found[german] == english


def test_one_translation_for_each_german_sentence():
    translations = {}
    for german, english in sentences(20_000):
        assert translations.setdefault(german, english) == english
    assert len(translations) > 15_000


def test_it_is_the_same_everywhere():
    text = repr(toy.generate(*SIZES, seed=7))
    assert text == repr(toy.generate(*SIZES, seed=7)) != repr(toy.generate(*SIZES, seed=8))
    # A fixed digest shows a dependence on the process, such as on the order of hashes.
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "8023f7ce8321ceb5f69908dc2ee8c30e2f0f15bd77045a84024b1f667e63e4ed"
    )


def test_splits_have_their_sizes_no_sentence_twice_and_a_small_vocabulary():
    splits = toy.generate()
    assert {name: len(pairs) for name, pairs in splits.items()} == {"train": 6000, "valid": 300, "test": 300}
    pairs = [pair for pairs in splits.values() for pair in pairs]
    assert len({german for german, _ in pairs}) == len(pairs)
    for side, largest in ((0, 140), (1, 100)):
        known = {word for pair in splits["train"] for word in pair[side].split(" ")}
        assert 80 < len(known) <= largest
        assert all(re.fullmatch(r"[A-Za-zÄÖÜäöüß]+|[.,]", word) for word in known)
        assert {word for pair in pairs for word in pair[side].split(" ")} <= known


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"train": 0}, "train=0: expected an integer from 1 to the "),
        ({"valid": -1}, "valid=-1: expected an integer from 1 to the "),
        ({"train": 1_000_000}, "train=1000000: expected an integer from 1 to the 1"),
    ],
)
def test_sizes_that_cannot_be_had(monkeypatch, sizes, expected):
    monkeypatch.setattr(toy, "MAX_DRAWS", 20_000)
    with pytest.raises(ValueError, match=expected):
        toy.generate(**sizes)


def test_the_command_writes_six_files(tmp_path, capsys):
    target = tmp_path / "new" / "corpus"
    flags = [text for name, size in zip(("train", "valid", "test"), SIZES, strict=True) for text in (f"--{name}", size)]
    assert cli.main(["corpus", str(target), *map(str, flags), "--seed", "3"]) == 0
    said = f"wrote 900 train, 60 valid and 40 test German-English sentence pairs to {target}\n"
    assert capsys.readouterr() == (said, "")
    for name, pairs in toy.generate(*SIZES, seed=3).items():
        for side, language in enumerate(("de", "en")):
            text = (target / f"{name}.{language}").read_bytes().decode("utf-8")
            assert text == "".join(pair[side] + "\n" for pair in pairs)
    assert len(list(target.iterdir())) == 6


def test_bad_input_gets_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toy, "MAX_DRAWS", 9000)
    target = tmp_path / "corpus"
    for flags in (("--valid", "-1"), ("--test", "300000")):
        assert cli.main(["corpus", str(target), *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"fairseq-dsq corpus: error: {flags[0][2:]}={flags[1]}: expected an integer from 1 to")
        assert not target.exists()
    target.write_text("a file, not a directory")
    assert cli.main(["corpus", str(target), "--train", "10", "--valid", "1", "--test", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fairseq-dsq corpus: error: ")


def test_a_binarised_corpus_is_kept_and_another_refused(tmp_path, capsys):
    command = ["corpus", str(tmp_path / "toy"), "--train", "20", "--valid", "2", "--test", "2", "--binarise"]
    assert cli.main(command) == 0
    made = (tmp_path / "toy/bin/train.de-en.de.bin").stat().st_mtime_ns
    assert cli.main(command) == 0
    assert "found 20 train" in capsys.readouterr().out
    assert cli.main([*command, "--seed", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "toy: made with --seed 1, asked for 2; remove it or name another" in line
    assert (tmp_path / "toy/bin/train.de-en.de.bin").stat().st_mtime_ns == made
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
