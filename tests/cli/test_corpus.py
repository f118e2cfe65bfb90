"""Tests of the German-English corpus generator."""

from __future__ import annotations

import hashlib
import pathlib
import random
import re

import pytest

from fairseq_dsq import cli
from fairseq_dsq.cli import corpus
from fairseq_dsq.cli.corpus import (
    ALL,
    ER,
    ICH,
    MANY,
    MY,
    NO,
    NOT_A,
    OUR,
    SIE,
    SIE_PLURAL,
    THE,
    THIS,
    TWO,
    WIR,
    A,
    Adjective,
    Modal,
    Noun,
    Pair,
    Phrase,
    Verb,
    main_clause,
    noun_phrase,
    predicate_clause,
    subordinate_clause,
    verb_clause,
)

NOUNS: dict[str, Noun] = {noun.de: noun for noun in corpus.NOUNS}
ADJECTIVES: dict[str, Adjective] = {adjective.de: adjective for adjective in corpus.ADJECTIVES}
VERBS: dict[str, Verb] = {verb.prefix + verb.forms.split()[2]: verb for verb in corpus.VERBS}
MODALS: dict[str, Modal] = {modal.forms.split()[2]: modal for modal in corpus.MODALS}
YESTERDAY = ("gestern", "yesterday")
TOMORROW = ("morgen", "tomorrow")
EVENING = ("am Abend", "in the evening")
SIZES = (900, 60, 40)


def phrase(
    determiner: corpus.Determiner,
    noun: str,
    case: str = "nom",
    *,
    plural: bool = False,
    adjective: str = "",
) -> Phrase:
    """Returns the noun phrase of the named noun and adjective."""
    described = ADJECTIVES[adjective] if adjective else None
    return noun_phrase(determiner, NOUNS[noun], case, plural, described)


def flat(splits: dict[str, list[Pair]]) -> list[Pair]:
    """Returns the pairs of all splits."""
    return [pair for pairs in splits.values() for pair in pairs]


def run(*arguments: str) -> int:
    """Returns what `fairseq-dsq corpus` returns for the arguments."""
    return cli.main(["corpus", *arguments])


DECLENSIONS = [
    (THE, "Hund", "klein", "der kleine Hund", "den kleinen Hund", "dem kleinen Hund"),
    (A, "Hund", "klein", "ein kleiner Hund", "einen kleinen Hund", "einem kleinen Hund"),
    (NO, "Brief", "alt", "kein alter Brief", "keinen alten Brief", "keinem alten Brief"),
    (THIS, "Mann", "müde", "dieser müde Mann", "diesen müden Mann", "diesem müden Mann"),
    (MY, "Bruder", "müde", "mein müder Bruder", "meinen müden Bruder", "meinem müden Bruder"),
    (THE, "Junge", "klein", "der kleine Junge", "den kleinen Jungen", "dem kleinen Jungen"),
    (A, "Nachbar", "jung", "ein junger Nachbar", "einen jungen Nachbarn", "einem jungen Nachbarn"),
    (THE, "Katze", "klein", "die kleine Katze", "die kleine Katze", "der kleinen Katze"),
    (A, "Katze", "groß", "eine große Katze", "eine große Katze", "einer großen Katze"),
    (THIS, "Frau", "alt", "diese alte Frau", "diese alte Frau", "dieser alten Frau"),
    (THE, "Kind", "klein", "das kleine Kind", "das kleine Kind", "dem kleinen Kind"),
    (A, "Kind", "klein", "ein kleines Kind", "ein kleines Kind", "einem kleinen Kind"),
    (OUR, "Auto", "teuer", "unser teures Auto", "unser teures Auto", "unserem teuren Auto"),
    (THIS, "Pferd", "jung", "dieses junge Pferd", "dieses junge Pferd", "diesem jungen Pferd"),
]
PLURALS = [
    (THE, "Hund", "klein", "die kleinen Hunde", "die kleinen Hunde", "den kleinen Hunden"),
    (NO, "Frau", "müde", "keine müden Frauen", "keine müden Frauen", "keinen müden Frauen"),
    (ALL, "Kind", "krank", "alle kranken Kinder", "alle kranken Kinder", "allen kranken Kindern"),
    (MANY, "Mann", "alt", "viele alte Männer", "viele alte Männer", "vielen alten Männern"),
    (TWO, "Arzt", "jung", "zwei junge Ärzte", "zwei junge Ärzte", "zwei jungen Ärzten"),
    (TWO, "Auto", "alt", "zwei alte Autos", "zwei alte Autos", "zwei alten Autos"),
    (OUR, "Lehrer", "alt", "unsere alten Lehrer", "unsere alten Lehrer", "unseren alten Lehrern"),
]


@pytest.mark.parametrize(("table", "plural"), [(DECLENSIONS, False), (PLURALS, True)])
def test_declension(table: list[tuple[corpus.Determiner, str, str, str, str, str]], plural: bool) -> None:
    for determiner, noun, adjective, *expected in table:
        cases = ("nom", "acc", "dat")
        forms = [phrase(determiner, noun, c, plural=plural, adjective=adjective).de for c in cases]
        assert forms == expected


def test_english_noun_phrases() -> None:
    assert phrase(A, "Apfel").en == "an apple"
    assert phrase(A, "Apfel", adjective="frisch").en == "a fresh apple"
    assert phrase(A, "Buch", adjective="interessant").en == "an interesting book"
    assert phrase(ALL, "Frau", plural=True).en == "all the women"
    assert phrase(NOT_A, "Tomate", "acc", plural=True).en == "any tomatoes"
    assert phrase(NO, "Kind", plural=True, adjective="klein").en == "no small children"


def test_main_clause_with_place_and_time() -> None:
    park = corpus.locative(("in", "in"), phrase(THE, "Park", "dat", adjective="klein"))
    clause = verb_clause(
        phrase(A, "Mann"), VERBS["lesen"], phrase(TWO, "Buch", "acc", plural=True),
        time=EVENING, place=park,
    )  # fmt: skip
    assert main_clause(clause) == (
        "ein Mann liest am Abend zwei Bücher im kleinen Park",
        "a man reads two books in the small park in the evening",
    )
    assert corpus.locative(("hinter", "behind"), phrase(THE, "Haus", "dat")) == (
        "hinter dem Haus",
        "behind the house",
    )
    assert corpus.locative(("in", "in"), phrase(THE, "Schule", "dat"))[0] == "in der Schule"


def test_inversion_and_perfect() -> None:
    clause = verb_clause(phrase(THE, "Kind"), VERBS["finden"], phrase(A, "Hut", "acc"), tense="past", time=YESTERDAY)
    assert main_clause(clause) == (
        "das Kind hat gestern einen Hut gefunden",
        "the child found a hat yesterday",
    )
    assert main_clause(clause, "time") == (
        "gestern hat das Kind einen Hut gefunden",
        "yesterday the child found a hat",
    )
    assert main_clause(clause, "clause")[0] == "hat das Kind gestern einen Hut gefunden"
    assert subordinate_clause(clause) == (
        "das Kind gestern einen Hut gefunden hat",
        "the child found a hat yesterday",
    )


def test_perfect_with_sein_and_agreement() -> None:
    forms = [main_clause(verb_clause(who, VERBS["kommen"], tense="past")) for who in (ICH, SIE, SIE_PLURAL)]
    assert forms == [
        ("ich bin gekommen", "I came"),
        ("sie ist gekommen", "she came"),
        ("sie sind gekommen", "they came"),
    ]


def test_future_and_dative_object() -> None:
    clause = verb_clause(WIR, VERBS["helfen"], phrase(THE, "Nachbar", "dat"), tense="future", time=TOMORROW)
    expected = ("morgen helfen wir dem Nachbarn", "tomorrow we will help the neighbor")
    assert main_clause(clause, "time") == expected


def test_modal() -> None:
    clause = verb_clause(
        phrase(MY, "Schwester"),
        VERBS["kaufen"],
        phrase(THE, "Lampe", "acc"),
        modal=MODALS["müssen"],
        nicht=True,
    )
    assert main_clause(clause) == (
        "meine Schwester muss die Lampe nicht kaufen",
        "my sister does not have to buy the lamp",
    )
    assert subordinate_clause(clause)[0] == "meine Schwester die Lampe nicht kaufen muss"
    clause = verb_clause(WIR, VERBS["schlafen"], modal=MODALS["wollen"])
    assert main_clause(clause) == ("wir wollen schlafen", "we want to sleep")


@pytest.mark.parametrize(
    ("tense", "english"),
    [("present", "does not eat"), ("past", "did not eat"), ("future", "will not eat")],
)
def test_kein_object_negates_the_english_verb(tense: str, english: str) -> None:
    obj = phrase(NOT_A, "Apfel", "acc")
    de, en = main_clause(verb_clause(phrase(THE, "Frau"), VERBS["essen"], obj, tense=tense))
    assert "keinen Apfel" in de
    assert en == f"the woman {english} an apple"


def test_kein_subject_is_no() -> None:
    clause = verb_clause(phrase(NO, "Hund"), VERBS["laufen"])
    assert main_clause(clause) == ("kein Hund läuft", "no dog runs")


def test_separable_verb() -> None:
    who, whom = phrase(THE, "Arzt"), phrase(THIS, "Mann", "acc", plural=True)
    clause = verb_clause(who, VERBS["anrufen"], whom, nicht=True)
    assert main_clause(clause) == (
        "der Arzt ruft diese Männer nicht an",
        "the doctor does not call these men",
    )
    assert subordinate_clause(clause)[0] == "der Arzt diese Männer nicht anruft"
    past = verb_clause(who, VERBS["anrufen"], whom, tense="past")
    assert subordinate_clause(past)[0] == "der Arzt diese Männer angerufen hat"
    modal = verb_clause(who, VERBS["anrufen"], whom, modal=MODALS["können"])
    assert main_clause(modal)[0] == "der Arzt kann diese Männer anrufen"


def test_pronoun_object_comes_early() -> None:
    him = corpus.OBJECTS["acc"][0]
    clause = verb_clause(phrase(THE, "Frau"), VERBS["besuchen"], him, tense="past", time=YESTERDAY, nicht=True)
    assert main_clause(clause) == (
        "die Frau hat ihn gestern nicht besucht",
        "the woman did not visit him yesterday",
    )
    assert main_clause(clause, "time")[0] == "gestern hat ihn die Frau nicht besucht"
    clause = verb_clause(ER, VERBS["sehen"], him, time=EVENING)
    assert main_clause(clause, "time")[0] == "am Abend sieht er ihn"


def test_prepositional_object_follows_nicht() -> None:
    dog = phrase(A, "Hund", "dat", adjective="klein")
    clause = verb_clause(phrase(THE, "Mädchen", plural=True), VERBS["spielen"], dog, time=EVENING, nicht=True)
    assert main_clause(clause) == (
        "die Mädchen spielen am Abend nicht mit einem kleinen Hund",
        "the girls do not play with a small dog in the evening",
    )


def test_predicate() -> None:
    clause = predicate_clause(ICH, ADJECTIVES["müde"], "past", YESTERDAY, nicht=True)
    assert main_clause(clause, "time") == (
        "gestern war ich nicht müde",
        "yesterday I was not tired",
    )
    assert subordinate_clause(clause)[0] == "ich gestern nicht müde war"
    clause = predicate_clause(phrase(THE, "Auto", plural=True), ADJECTIVES["teuer"], "present")
    assert main_clause(clause) == ("die Autos sind teuer", "the cars are expensive")
    clause = predicate_clause(SIE, ADJECTIVES["krank"], "future", TOMORROW)
    assert main_clause(clause) == ("sie ist morgen krank", "she will be sick tomorrow")


def test_corpus_is_the_same_everywhere() -> None:
    text = repr(corpus.generate(*SIZES, seed=7))
    assert text == repr(corpus.generate(*SIZES, seed=7))
    assert text != repr(corpus.generate(*SIZES, seed=8))
    # A fixed digest shows a dependence on the process, such as on the order of hashes.
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "6327ea854856e32e9d7a2f76139e09edb3e5ed3ed7c32fe826dd442c4f8fe7c9"
    )


def test_splits_have_their_sizes_and_are_disjoint() -> None:
    splits = corpus.generate()
    assert [(name, len(pairs)) for name, pairs in splits.items()] == [
        ("train", 6000),
        ("valid", 300),
        ("test", 300),
    ]
    pairs = flat(splits)
    assert len({de for de, _ in pairs}) == len(set(pairs)) == len(pairs)


def test_lengths_vocabulary_and_tokens() -> None:
    splits = corpus.generate()
    for side, largest in ((0, 260), (1, 180)):
        sentences = [pair[side].split(" ") for pair in flat(splits)]
        assert {len(tokens) for tokens in sentences} == set(range(4, 17))
        vocabulary = {token for tokens in sentences for token in tokens}
        assert 100 <= len(vocabulary) <= largest
        assert all(re.fullmatch(r"[A-Za-zÄÖÜäöüß]+|[.,]", token) for token in vocabulary)
        assert all(tokens[-1] == "." and "." not in tokens[:-1] for tokens in sentences)
        trained = {token for pair in splits["train"] for token in pair[side].split(" ")}
        assert len(vocabulary - trained) <= 2


def test_one_translation_for_each_german_sentence() -> None:
    # Raw draws: generate() would hide a second translation by dropping it.
    rng = random.Random(0)
    translations: dict[str, str] = {}
    for _ in range(40_000):
        de, en = corpus.sentence(rng)
        assert translations.setdefault(de, en) == en
    assert 20_000 < len(translations) < 40_000


def test_drawn_sentences_keep_the_word_order() -> None:
    finite = {form for verb in corpus.VERBS for form in verb.forms.split()}
    finite |= {form for modal in corpus.MODALS for form in modal.forms.split()}
    finite |= {form for forms, _ in corpus.BE.values() for form in forms.split()}
    finite |= {"habe", "hat", "haben", "anrufe", "anruft", "anrufen"}
    for de, _ in flat(corpus.generate(2000, 1, 1)):
        for conjunction in ("weil", "dass"):
            _, found, after = f" {de}".partition(f" {conjunction} ")
            if found:
                assert re.split(r" [,.]", after)[0].split()[-1] in finite, de
        first = de.split()[0]
        if first in ("gestern", "heute", "morgen"):
            assert de.split()[1] in finite, de


def test_no_reflexive_pronoun_object() -> None:
    rng = random.Random(1)
    text = "\n".join(corpus.sentence(rng)[1] for _ in range(5000))
    verb = r"(?:(?:do|did|will|can|should|have|want|not|to|cannot) )*"
    assert not re.search(rf"\b(?:I|we) {verb}\w+ (?:for |to |with )?(?:me|us)\b", text)


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_sizes_below_one(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=0: expected an integer of at least 1$"):
        corpus.generate(**{name: 0})


def test_sizes_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"train=1000000 is too large: at most 200000"):
        corpus.generate(train=1_000_000)
    monkeypatch.setattr(corpus, "MAX_DRAWS", 500)
    # Fewer than 500 draws are distinct and of a fitting length: the last split stays short.
    with pytest.raises(ValueError, match=r"test=100 is too large: at most \d+ distinct"):
        corpus.generate(train=300, valid=100, test=100)


def test_main_writes_six_files(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "corpus"
    sizes = dict(zip(("train", "valid", "test"), SIZES, strict=True))
    options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    assert run(str(target), *options, "--seed", "3") == 0
    out, err = capsys.readouterr()
    assert out == (f"wrote 900 train, 60 valid and 40 test German-English sentence pairs to {target}\n")
    assert err == ""
    expected = corpus.generate(*SIZES, seed=3)
    for name, pairs in expected.items():
        for side, language in enumerate(("de", "en")):
            content = (target / f"{name}.{language}").read_bytes().decode("utf-8")
            assert content == "".join(pair[side] + "\n" for pair in pairs)
    assert len(list(target.iterdir())) == 6


def test_main_reports_bad_input(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "corpus"
    assert run(str(target), "--valid", "-1") == 2
    assert capsys.readouterr() == (
        "",
        "fairseq-dsq corpus: error: valid=-1: expected an integer of at least 1\n",
    )
    assert run(str(target), "--test", "300000") == 2
    err = capsys.readouterr().err
    assert err.startswith("fairseq-dsq corpus: error: test=300000 is too large")
    assert err.count("\n") == 1
    assert not target.exists()

    target.write_text("a file, not a directory")
    assert run(str(target), "--train", "10", "--valid", "1", "--test", "1") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fairseq-dsq corpus: error: ")
    assert err.count("\n") == 1


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
