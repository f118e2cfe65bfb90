"""A small German-English parallel corpus, drawn from a hand-written grammar.

The corpus is made for quick training runs: the vocabulary is small, tokens are separated by
spaces, and every German sentence has exactly one English translation. The grammar has gender and
case, agreement, verb-second and verb-final order, modal verbs, the perfect tense, a separable
verb, negation, and a German present tense for the English future.
"""

from __future__ import annotations

import argparse
import pathlib
import random
from dataclasses import dataclass

from fairseq_dsq import artefact
from fairseq_dsq.recipes import fairseq_command

Pair = tuple[str, str]
Endings = dict[str, tuple[str, ...]]

MIN_TOKENS, MAX_TOKENS = 4, 16
MAX_DRAWS = 200_000

# Kinds of nouns, so that one reads books and eats apples, not the other way round.
PEOPLE = ("adult", "known", "family", "child")
ANIMATE = (*PEOPLE, "animal")
GOODS = ("reading", "food", "thing")
OWNED = ("known", "family", "animal", *GOODS)  # no "adult": "meine Frau" would be "my wife"


@dataclass(frozen=True)
class Determiner:
    """A determiner and its adjective endings; an empty English form: it lacks that number."""

    de: str
    en: str
    en_plural: str
    endings: Endings
    adjective: Endings


@dataclass(frozen=True)
class Adjective:
    """An adjective for some kinds of nouns; `stem` takes the endings, `de` is predicative."""

    stem: str
    de: str
    en: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Noun:
    """A noun; the oblique cases of a weak noun look like its plural."""

    de: str
    plural: str
    gender: str
    en: str
    en_plural: str
    kind: str
    weak: bool = False


@dataclass(frozen=True)
class Verb:
    """A verb: German forms for ich, er and the plural; English base, third person and past."""

    forms: str
    participle: str
    en: str
    subjects: tuple[str, ...]
    objects: tuple[str, ...] = ()
    case: str = "acc"
    prep: Pair = ("", "")
    prefix: str = ""
    auxiliary: str = "habe hat haben"
    takes_place: bool = True


@dataclass(frozen=True)
class Modal:
    """A modal verb: German forms; English plain and third person forms, also negated."""

    forms: str
    en: Pair
    en_negative: Pair


@dataclass(frozen=True)
class Phrase:
    """A noun phrase or pronoun; `person` is 0 for ich, 1 for er/sie, 2 for a plural."""

    de: str
    en: str
    person: int
    pronoun: bool = False
    kein: bool = False


@dataclass(frozen=True)
class Clause:
    """A clause before its word order; in a main clause `end` comes last, `en` has no time yet."""

    subject: Phrase
    finite: str
    early: str
    time: Pair
    late: str
    end: str
    separable: bool
    en: str


def _endings(nom: str, acc: str, dat: str) -> Endings:
    """Returns the endings of each case, one for each of COLUMNS; "-" stands for none."""
    rows = {"nom": nom, "acc": acc, "dat": dat}
    return {case: tuple(row.replace("-", "").split(" ")) for case, row in rows.items()}


COLUMNS = "mfnp"  # masculine, feminine, neuter, plural
ARTICLE = _endings("der die das die", "den die das die", "dem der dem den")
STRONG = _endings("er e es e", "en e es e", "em er em en")
EIN = _endings("- e - e", "en e - e", "em er em en")
BARE = _endings("- - - -", "- - - -", "- - - -")
WEAK = _endings("e e e en", "en e e en", "en en en en")
MIXED = _endings("er e es en", "en e es en", "en en en en")

THE = Determiner("", "the", "the", ARTICLE, WEAK)
THIS = Determiner("dies", "this", "these", STRONG, WEAK)
A = Determiner("ein", "a", "", EIN, MIXED)
NO = Determiner("kein", "no", "no", EIN, MIXED)
NOT_A = Determiner("kein", "a", "any", EIN, MIXED)  # "sieht keinen Hund": "does not see a dog"
MY = Determiner("mein", "my", "my", EIN, MIXED)
OUR = Determiner("unser", "our", "our", EIN, MIXED)
ALL = Determiner("all", "", "all the", STRONG, WEAK)
MANY = Determiner("viel", "", "many", STRONG, STRONG)
TWO = Determiner("zwei", "", "two", BARE, STRONG)
THREE = Determiner("drei", "", "three", BARE, STRONG)
DEFINITE = (THE, THE, THE, THIS, MY, OUR)
POSITIVE = (*DEFINITE, A, A, A, ALL, MANY, TWO, THREE)

STATES = (Adjective("krank", "krank", "sick", ANIMATE), Adjective("müd", "müde", "tired", ANIMATE))
ADJECTIVES = (
    *STATES,
    Adjective("klein", "klein", "small", ("child", "animal", *GOODS, "place")),
    Adjective("alt", "alt", "old", ("adult", "known", "animal", "reading", "thing", "place")),
    Adjective("jung", "jung", "young", ("adult", "known", "animal")),
    Adjective("groß", "groß", "big", ("animal", "food", "thing", "place")),
    Adjective("interessant", "interessant", "interesting", ("reading",)),
    Adjective("teur", "teuer", "expensive", ("reading", "thing")),
    Adjective("frisch", "frisch", "fresh", ("food",)),
)
NOUNS = (
    Noun("Mann", "Männer", "m", "man", "men", "adult"),
    Noun("Frau", "Frauen", "f", "woman", "women", "adult"),
    Noun("Lehrer", "Lehrer", "m", "teacher", "teachers", "known"),
    Noun("Arzt", "Ärzte", "m", "doctor", "doctors", "known"),
    Noun("Nachbar", "Nachbarn", "m", "neighbor", "neighbors", "known", weak=True),
    Noun("Bruder", "Brüder", "m", "brother", "brothers", "family"),
    Noun("Schwester", "Schwestern", "f", "sister", "sisters", "family"),
    Noun("Kind", "Kinder", "n", "child", "children", "child"),
    Noun("Junge", "Jungen", "m", "boy", "boys", "child", weak=True),
    Noun("Mädchen", "Mädchen", "n", "girl", "girls", "child"),
    Noun("Hund", "Hunde", "m", "dog", "dogs", "animal"),
    Noun("Katze", "Katzen", "f", "cat", "cats", "animal"),
    Noun("Pferd", "Pferde", "n", "horse", "horses", "animal"),
    Noun("Buch", "Bücher", "n", "book", "books", "reading"),
    Noun("Brief", "Briefe", "m", "letter", "letters", "reading"),
    Noun("Zeitung", "Zeitungen", "f", "newspaper", "newspapers", "reading"),
    Noun("Apfel", "Äpfel", "m", "apple", "apples", "food"),
    Noun("Tomate", "Tomaten", "f", "tomato", "tomatoes", "food"),
    Noun("Ei", "Eier", "n", "egg", "eggs", "food"),
    Noun("Auto", "Autos", "n", "car", "cars", "thing"),
    Noun("Lampe", "Lampen", "f", "lamp", "lamps", "thing"),
    Noun("Hut", "Hüte", "m", "hat", "hats", "thing"),
    Noun("Garten", "Gärten", "m", "garden", "gardens", "place"),
    Noun("Park", "Parks", "m", "park", "parks", "place"),
    Noun("Haus", "Häuser", "n", "house", "houses", "place"),
    Noun("Schule", "Schulen", "f", "school", "schools", "place"),
    Noun("Kirche", "Kirchen", "f", "church", "churches", "place"),
)

ANYTHING = (*ANIMATE, *GOODS)
PLAYMATES = ("family", "child", "animal")
SEIN = "bin ist sind"  # a verb of its own, and the auxiliary of verbs of motion
VERBS = (
    Verb("sehe sieht sehen", "gesehen", "see sees saw", ANIMATE, ANYTHING),
    Verb("suche sucht suchen", "gesucht", "look looks looked", ANIMATE, ANYTHING, "acc",
         ("", "for")),
    Verb("finde findet finden", "gefunden", "find finds found", ANIMATE, ANYTHING),
    Verb("kaufe kauft kaufen", "gekauft", "buy buys bought", PEOPLE, GOODS, takes_place=False),
    Verb("lese liest lesen", "gelesen", "read reads read", PEOPLE, ("reading",)),
    Verb("esse isst essen", "gegessen", "eat eats ate", ANIMATE, ("food",)),
    Verb("besuche besucht besuchen", "besucht", "visit visits visited", PEOPLE, PEOPLE,
         takes_place=False),
    Verb("rufe ruft rufen", "angerufen", "call calls called", PEOPLE, PEOPLE, prefix="an",
         takes_place=False),
    Verb("helfe hilft helfen", "geholfen", "help helps helped", PEOPLE, ANIMATE, "dat"),
    Verb("spreche spricht sprechen", "gesprochen", "talk talks talked", PEOPLE, PEOPLE, "dat",
         ("mit", "to")),
    Verb("spiele spielt spielen", "gespielt", "play plays played", ANIMATE, PLAYMATES, "dat",
         ("mit", "with")),
    Verb("warte wartet warten", "gewartet", "wait waits waited", ANIMATE, PEOPLE, "acc",
         ("auf", "for")),
    Verb("schlafe schläft schlafen", "geschlafen", "sleep sleeps slept", ANIMATE),
    Verb("arbeite arbeitet arbeiten", "gearbeitet", "work works worked", PEOPLE),
    Verb("lache lacht lachen", "gelacht", "laugh laughs laughed", PEOPLE),
    Verb("laufe läuft laufen", "gelaufen", "run runs ran", ANIMATE, auxiliary=SEIN),
    Verb("komme kommt kommen", "gekommen", "come comes came", ANIMATE, auxiliary=SEIN,
         takes_place=False),
)  # fmt: skip
MODALS = (
    Modal("kann kann können", ("can", "can"), ("cannot", "cannot")),
    Modal("soll soll sollen", ("should", "should"), ("should not", "should not")),
    Modal("muss muss müssen", ("have to", "has to"), ("do not have to", "does not have to")),
    Modal("will will wollen", ("want to", "wants to"), ("do not want to", "does not want to")),
)
MATRIX = (("sage sagt sagen", "say says"), ("weiß weiß wissen", "know knows"))
BE = {  # German and English forms of "sein" by tense; German has no future of its own here
    "present": (SEIN, "am is are"),
    "future": (SEIN, "will will will"),
    "past": ("war war waren", "was was were"),
}

# "sie" is only ever a subject, where the verb tells "she" from "they".
ICH, ER, SIE, WIR, SIE_PLURAL = SUBJECTS = (
    Phrase("ich", "I", 0, pronoun=True),
    Phrase("er", "he", 1, pronoun=True),
    Phrase("sie", "she", 1, pronoun=True),
    Phrase("wir", "we", 2, pronoun=True),
    Phrase("sie", "they", 2, pronoun=True),
)
US = Phrase("uns", "us", 2, pronoun=True)
OBJECTS = {
    "acc": (Phrase("ihn", "him", 1, pronoun=True), Phrase("mich", "me", 0, pronoun=True), US),
    "dat": (Phrase("ihm", "him", 1, pronoun=True), Phrase("mir", "me", 0, pronoun=True), US),
}
NOTHING = ("", "")
PLACE_PREPS = (("in", "in"), ("in", "in"), ("hinter", "behind"), ("neben", "next to"))
GENERAL_TIMES = (("am Abend", "in the evening"), ("im Sommer", "in summer"))
TIMES = {
    "past": (("gestern", "yesterday"), ("heute", "today"), ("letzte Woche", "last week")),
    "present": GENERAL_TIMES,
    "future": (("morgen", "tomorrow"), ("nächste Woche", "next week")),
    "modal": (("heute", "today"), ("morgen", "tomorrow"), *GENERAL_TIMES),
}


def join(*parts: str) -> str:
    """Returns the non-empty parts, separated by spaces."""
    return " ".join(part for part in parts if part)


def noun_phrase(
    determiner: Determiner, noun: Noun, case: str, plural: bool, adjective: Adjective | None = None
) -> Phrase:
    """Returns the noun phrase, declined for the case (nom, acc or dat) and number."""
    column = COLUMNS.index("p" if plural else noun.gender)
    form = noun.plural if plural or (noun.weak and case != "nom") else noun.de
    if plural and case == "dat" and form[-1] not in "ns":
        form += "n"
    described = adjective.stem + determiner.adjective[case][column] if adjective else ""
    en = join(adjective.en if adjective else "", noun.en_plural if plural else noun.en)
    article = determiner.en_plural if plural else determiner.en
    if article == "a" and en[0] in "aeiou":
        article = "an"
    return Phrase(
        join(determiner.de + determiner.endings[case][column], described, form),
        join(article, en),
        person=2 if plural else 1,
        kein=determiner is NOT_A,
    )


def locative(prep: Pair, place: Phrase) -> Pair:
    """Returns where something happens, in both languages; "in dem" becomes "im"."""
    return join(prep[0], place.de).replace("in dem ", "im "), join(prep[1], place.en)


def english_verb(verb: Verb, tense: str, modal: Modal | None, person: int, negative: bool) -> str:
    """Returns the English verb group; a negated full verb takes a form of "do"."""
    base, third, past = verb.en.split()
    is_third = person == 1
    if modal:
        return join((modal.en_negative if negative else modal.en)[is_third], base)
    if tense == "future":
        return join("will", "not" if negative else "", base)
    if negative:
        return join("did" if tense == "past" else ("do", "does")[is_third], "not", base)
    return past if tense == "past" else (base, third)[is_third]


def verb_clause(
    subject: Phrase,
    verb: Verb,
    obj: Phrase | None = None,
    *,
    tense: str = "present",
    modal: Modal | None = None,
    time: Pair = NOTHING,
    place: Pair = NOTHING,
    nicht: bool = False,
) -> Clause:
    """Returns a clause with a full verb; `tense` is present, past or future.

    The past is the German perfect, the future is the German present. A modal verb takes the
    present only.
    """
    early = obj.de if obj and obj.pronoun and not verb.prep[0] else ""
    late = join("nicht" if nicht else "", place[0])
    if obj and not early:
        # A noun stands before "nicht", but a phrase that the verb governs stands after it.
        late = join(late, verb.prep[0], obj.de) if verb.prep[0] else join(obj.de, late)
    forms, end = verb.forms, verb.prefix
    if modal:
        forms, end = modal.forms, verb.prefix + verb.forms.split()[2]
    elif tense == "past":
        forms, end = verb.auxiliary, verb.participle
    negative = nicht or (obj is not None and obj.kein)
    en_verb = english_verb(verb, tense, modal, subject.person, negative)
    en_object = join(verb.prep[1], obj.en) if obj else ""
    finite, separable = forms.split()[subject.person], forms is verb.forms and bool(verb.prefix)
    en = join(subject.en, en_verb, en_object, place[1])
    return Clause(subject, finite, early, time, late, end, separable, en)


def predicate_clause(
    subject: Phrase, adjective: Adjective, tense: str, time: Pair = NOTHING, nicht: bool = False
) -> Clause:
    """Returns a clause that says by a form of "sein" how the subject is, was or will be."""
    finite, en_finite = (forms.split()[subject.person] for forms in BE[tense])
    de_not, en_not = ("nicht", "not") if nicht else NOTHING
    en = join(subject.en, en_finite, en_not, "be" if tense == "future" else "", adjective.en)
    return Clause(subject, finite, "", time, join(de_not, adjective.de), "", False, en)


def main_clause(clause: Clause, front: str = "subject") -> Pair:
    """Returns a verb-second clause; `front` says what precedes the verb: subject, time or clause.

    With "clause" the verb comes first, for use after a fronted subordinate clause.
    """
    time, en_time = clause.time
    subject, early, rest = clause.subject.de, clause.early, join(clause.late, clause.end)
    if front == "subject":
        return join(subject, clause.finite, early, time, rest), join(clause.en, en_time)
    # After the verb, a pronoun object precedes a noun: "gestern hat mich der Hund gesehen".
    after = join(subject, early) if clause.subject.pronoun else join(early, subject)
    if front == "time":
        return join(time, clause.finite, after, rest), join(en_time, clause.en)
    return join(clause.finite, after, time, rest), join(clause.en, en_time)


def subordinate_clause(clause: Clause) -> Pair:
    """Returns a verb-final clause, without its conjunction."""
    verb = clause.end + clause.finite if clause.separable else join(clause.end, clause.finite)
    german = join(clause.subject.de, clause.early, clause.time[0], clause.late, verb)
    return german, join(clause.en, clause.time[1])


def _draw_phrase(
    rng: random.Random,
    used: list[Noun],
    determiners: tuple[Determiner, ...],
    kinds: tuple[str, ...],
    case: str,
    described: float = 0.4,
) -> Phrase:
    """Returns a noun phrase with a noun that the sentence does not have yet; adds it to `used`."""
    noun = rng.choice([noun for noun in NOUNS if noun.kind in kinds and noun not in used])
    used.append(noun)
    determiner = rng.choice([d for d in determiners if noun.kind in OWNED or d not in (MY, OUR)])
    plural = not determiner.en or (determiner.en_plural != "" and rng.random() < 0.35)
    adjective = None
    if rng.random() < described:
        adjective = rng.choice([a for a in ADJECTIVES if noun.kind in a.kinds])
    return noun_phrase(determiner, noun, case, plural and noun.kind != "place", adjective)


def _draw_subject(
    rng: random.Random, used: list[Noun], kinds: tuple[str, ...], nicht: bool, described: float
) -> Phrase:
    """Returns a subject; with "nicht" it gets no quantifier, whose scope would be unclear."""
    if kinds[0] in PEOPLE and rng.random() < 0.3:
        return rng.choice((*SUBJECTS, ICH))  # more often "ich", which has verb forms of its own
    determiners = (*DEFINITE, TWO) if nicht else (*POSITIVE, NO)
    return _draw_phrase(rng, used, determiners, kinds, "nom", described)


def _draw_object(rng: random.Random, used: list[Noun], verb: Verb, subject: Phrase, negative: bool) -> Phrase:
    """Returns an object, which is not reflexive, and has "kein" only if negative."""
    if verb.objects[0] in PLAYMATES + PEOPLE and rng.random() < 0.25:
        pronouns = OBJECTS[verb.case]
        return rng.choice(pronouns[:1] if subject in (ICH, WIR) else pronouns)
    determiners: tuple[Determiner, ...] = POSITIVE
    if negative:
        determiners = DEFINITE if verb.prep[0] else (*DEFINITE, NOT_A, NOT_A, NOT_A)
    return _draw_phrase(rng, used, determiners, verb.objects, verb.case)


def _draw_time(rng: random.Random, tense: str) -> Pair:
    """Returns an adverbial of time or none; only an adverbial marks the German future."""
    return rng.choice(TIMES[tense]) if tense == "future" or rng.random() < 0.35 else NOTHING


def _draw_predicate(rng: random.Random, used: list[Noun], tense: str, nicht: bool) -> Clause:
    """Returns a clause with "sein"; only a passing state is dated."""
    if tense == "future" or rng.random() < 0.6:
        subject = _draw_subject(rng, used, ANIMATE, nicht, described=0)
        time = _draw_time(rng, tense)
        return predicate_clause(subject, rng.choice(STATES), tense, time, nicht)
    kind = rng.choice(("animal", *GOODS))
    subject = _draw_subject(rng, used, (kind,), nicht, described=0)
    adjectives = [a for a in ADJECTIVES if kind in a.kinds]
    return predicate_clause(subject, rng.choice(adjectives), tense, NOTHING, nicht)


def _draw_clause(rng: random.Random, used: list[Noun], tense: str) -> Clause:
    """Returns a clause in the tense (present, past or future)."""
    negative = rng.random() < 0.25
    if rng.random() < 0.2:
        return _draw_predicate(rng, used, tense, negative)
    verb = rng.choice(VERBS)
    modal = rng.choice(MODALS) if tense == "present" and rng.random() < 0.4 else None
    subject = _draw_subject(rng, used, verb.subjects, negative, described=0.4)
    obj = _draw_object(rng, used, verb, subject, negative) if verb.objects else None
    place = NOTHING
    if verb.takes_place and rng.random() < 0.3:
        where = _draw_phrase(rng, used, (THE,), ("place",), "dat", described=0.25)
        place = locative(rng.choice(PLACE_PREPS), where)
    time = _draw_time(rng, "modal" if modal else tense)
    nicht = negative and not (obj and obj.kein)
    return verb_clause(subject, verb, obj, tense=tense, modal=modal, time=time, place=place, nicht=nicht)


def sentence(rng: random.Random) -> Pair:
    """Returns a random (german, english) pair, whose length is not bounded yet."""
    used: list[Noun] = []
    tense = rng.choice(("present", "present", "past", "past", "future"))
    shape = rng.random()
    if shape < 0.2:
        subject = _draw_subject(rng, used, PEOPLE, nicht=False, described=0.2)
        forms, en_forms = rng.choice(MATRIX)
        finite, en_finite = forms.split()[subject.person], en_forms.split()[subject.person == 1]
        de, en = subordinate_clause(_draw_clause(rng, used, tense))
        return f"{subject.de} {finite} , dass {de} .", f"{subject.en} {en_finite} that {en} ."
    clause = _draw_clause(rng, used, tense)
    if shape < 0.45:
        # A present reason for a past event would read oddly in English.
        reason = _draw_clause(rng, used, "past" if tense == "past" else "present")
        weil, because = subordinate_clause(reason)
        if shape < 0.27:
            de, en = main_clause(clause, "clause")
            return f"weil {weil} , {de} .", f"because {because} , {en} ."
        de, en = main_clause(clause)
        return f"{de} , weil {weil} .", f"{en} because {because} ."
    de, en = main_clause(clause, "time" if clause.time[0] and rng.random() < 0.6 else "subject")
    return f"{de} .", f"{en} ."


def _require(available: int, sizes: dict[str, int]) -> None:
    """Raises ValueError for the first split that `available` sentences do not fill."""
    for name, size in sizes.items():
        if size > available:
            raise ValueError(
                f"{name}={size} is too large: at most {available} distinct sentences are left for "
                f"it ({MAX_DRAWS} draws from the grammar)"
            )
        available -= size


def generate(train: int = 6000, valid: int = 300, test: int = 300, seed: int = 1) -> dict[str, list[Pair]]:
    """Draws the corpus, the same one for the same arguments.

    Returns:
        The (german, english) pairs of "train", "valid" and "test". No German sentence occurs
        twice, neither in one split nor in two.

    Raises:
        ValueError: A size is below 1 or larger than what MAX_DRAWS draws yield.
    """
    sizes = {"train": train, "valid": valid, "test": test}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: expected an integer of at least 1")
    _require(MAX_DRAWS, sizes)
    rng = random.Random(seed)
    found: dict[str, str] = {}
    for _ in range(MAX_DRAWS):
        if len(found) == train + valid + test:
            break
        de, en = sentence(rng)
        if all(MIN_TOKENS <= len(side.split()) <= MAX_TOKENS for side in (de, en)):
            found[de] = en
    _require(len(found), sizes)
    pairs = list(found.items())
    rng.shuffle(pairs)  # short sentences run out first, so the later draws are longer
    valid_end = train + valid
    return {"train": pairs[:train], "valid": pairs[train:valid_end], "test": pairs[valid_end:]}


def write(directory: pathlib.Path, train: int = 6000, valid: int = 300, test: int = 300, seed: int = 1) -> None:
    """Writes {train,valid,test}.{de,en} to the directory, which is made if missing.

    Raises:
        ValueError: As for `generate`; nothing is written then.
        OSError: The directory or a file cannot be written.
    """
    corpus = generate(train, valid, test, seed)
    directory.mkdir(parents=True, exist_ok=True)
    for name, pairs in corpus.items():
        for side, language in enumerate(("de", "en")):
            path = directory / f"{name}.{language}"
            with path.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(pair[side] + "\n" for pair in pairs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-dsq corpus` to the parser."""
    parser.add_argument("directory", metavar="DIR", type=pathlib.Path, help="where to write")
    for name, size in (("train", 6000), ("valid", 300), ("test", 300)):
        text = f"number of {name} pairs (default: {size})"
        parser.add_argument(f"--{name}", type=int, default=size, metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="random seed (default: 1)")
    parser.add_argument(
        "--binarise", action="store_true",
        help="run fairseq-preprocess too, into DIR/bin; DIR is made whole or not at all, and kept if it is there",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Writes the corpus; returns 0."""
    sizes = f"{args.train} train, {args.valid} valid and {args.test} test"
    if not args.binarise:
        write(args.directory, args.train, args.valid, args.test, args.seed)
    elif not _write_binarised(args.directory, args.train, args.valid, args.test, args.seed):
        print(f"found {sizes} German-English sentence pairs in {args.directory}")
        return 0
    print(f"wrote {sizes} German-English sentence pairs to {args.directory}")
    return 0


def _write_binarised(directory: pathlib.Path, train: int, valid: int, test: int, seed: int) -> bool:
    """Writes the corpus and its binarised form unless it is there, made so; returns whether it was written."""
    artefact.check_path("DIR", directory)
    settings = {"--train": str(train), "--valid": str(valid), "--test": str(test), "--seed": str(seed)}
    directory.parent.mkdir(parents=True, exist_ok=True)
    with artefact.locked(directory.parent):
        if artefact.check(directory, settings):
            return False
        with artefact.atomic(directory) as partial:
            write(partial, train, valid, test, seed)
            fairseq_command.preprocess(partial, "de", "en")
            artefact.write(partial, settings)
    return True
