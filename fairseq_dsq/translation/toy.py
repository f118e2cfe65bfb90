"""A toy corpus: German-English sentences of a small grammar, for short trainings that show German word order.

The finite verb comes second in a main clause, whatever is first, and last in a subordinate clause; a participle or a
separable verb's prefix comes at the end. Each German sentence has one translation.
"""

from __future__ import annotations

import random
from pathlib import Path

Pair = tuple[str, str]
MAX_DRAWS = 200_000
COLUMNS = "mfnap"  # masculine, feminine, neuter; masculine accusative, which alone differs; plural
DETERMINERS = (  # English singular and plural; German, and the endings of an adjective after it, for each of COLUMNS
    ("the", "the", "der die das den die", "e e e en en"),
    ("this", "these", "dieser diese dieses diesen diese", "e e e en en"),
    ("my", "my", "mein meine mein meinen meine", "er e es en en"),
    ("a", "two", "ein eine ein einen zwei", "er e es en e"),
)
ADJECTIVES = (("klein", "small"), ("alt", "old"), ("groß", "big"), ("schön", "beautiful"))
PEOPLE = (
    "m Arzt Ärzte doctor doctors", "m Sohn Söhne son sons", "f Lehrerin Lehrerinnen teacher teachers",
    "f Tochter Töchter daughter daughters", "n Kind Kinder child children", "n Mädchen Mädchen girl girls",
)  # fmt: skip
ANIMALS = ("m Hund Hunde dog dogs", "f Katze Katzen cat cats", "n Pferd Pferde horse horses")
READING = ("m Brief Briefe letter letters", "f Zeitung Zeitungen newspaper newspapers", "n Buch Bücher book books")
FOOD = ("m Apfel Äpfel apple apples", "f Tomate Tomaten tomato tomatoes", "n Ei Eier egg eggs")
VERBS = (  # German singular and plural, of its auxiliary too, participle, prefix; English likewise, past; objects
    ("sieht sehen hat haben gesehen ", "sees see saw", (*PEOPLE, *ANIMALS, *READING, *FOOD)),
    ("findet finden hat haben gefunden ", "finds find found", (*ANIMALS, *READING, *FOOD)),
    ("besucht besuchen hat haben besucht ", "visits visit visited", PEOPLE),
    ("isst essen hat haben gegessen ", "eats eat ate", FOOD),
    ("ruft rufen hat haben angerufen an", "calls call called", PEOPLE),
    ("holt holen hat haben abgeholt ab", "fetches fetch fetched", (*PEOPLE, *ANIMALS, *READING)),
    ("macht machen hat haben aufgemacht auf", "opens open opened", READING),
    ("schläft schlafen hat haben geschlafen ", "sleeps sleep slept", ()),
    ("kommt kommen ist sind angekommen an", "arrives arrive arrived", ()),
)
SAYING = (("sagt sagen", "says say"), ("weiß wissen", "knows know"))
TIMES = {
    "present": (("heute", "today"), ("am Abend", "in the evening"), ("", "")),
    "past": (("gestern", "yesterday"), ("letzte Woche", "last week"), ("", "")),
    "future": (("morgen", "tomorrow"), ("nächste Woche", "next week")),
}
PLACES = (("im Garten", "in the garden"), ("im Park", "in the park"), ("in der Schule", "at school"))


def noun_phrase(rng: random.Random, nouns: tuple[str, ...], accusative: bool = False) -> tuple[Pair, bool]:
    """A noun with its determiner and, often, an adjective; and whether it is a plural."""
    gender, one, several, en, en_several = rng.choice(nouns).split()
    plural = rng.random() < 0.35
    column = COLUMNS.index("p" if plural else "a" if accusative and gender == "m" else gender)
    article, articles, german, endings = rng.choice(DETERMINERS)
    stem, adjective = rng.choice(ADJECTIVES) if rng.random() < 0.4 else ("", "")
    article += "n" * (article == "a" and (adjective or en)[0] in "aeiou")
    de = _join(german.split()[column], stem and stem + endings.split()[column], several if plural else one)
    return (de, _join(articles if plural else article, adjective, en_several if plural else en)), plural


def clause(rng: random.Random, verb_last: bool) -> Pair:
    """A main clause or, with the verb last, a subordinate one; without punctuation."""
    forms, en_forms, objects = rng.choice(VERBS)
    (subject, en_subject), plural = noun_phrase(rng, PEOPLE if objects else (*PEOPLE, *ANIMALS))
    german, english = forms.split(" "), en_forms.split()
    tense = rng.choice(("present", "past", "future"))
    finite, end, en_verb = german[plural], german[5], english[plural]
    if tense == "past":
        finite, end, en_verb = german[2 + plural], german[4], english[2]
    elif tense == "future":  # the German present, which the adverb of time makes a future
        en_verb = f"will {english[1]}"
    thing, en_thing = noun_phrase(rng, objects, accusative=True)[0] if objects else ("", "")
    time, en_time = rng.choice(TIMES[tense])
    place, en_place = rng.choice(PLACES) if rng.random() < 0.25 else ("", "")
    en = _join(en_subject, en_verb, en_thing, en_place)
    if verb_last:
        last = f"{end} {finite}" if tense == "past" else end + finite
        return _join(subject, time, thing, place, last), _join(en, en_time)
    if time and rng.random() < 0.5:
        return _join(time, finite, subject, thing, place, end), _join(en_time, en)
    return _join(subject, finite, time, thing, place, end), _join(en, en_time)


def sentence(rng: random.Random) -> Pair:
    """A German sentence and its translation: a main clause, or one of three with a subordinate clause."""
    (de, en), (last, en_last) = clause(rng, verb_last=False), clause(rng, verb_last=True)
    (subject, en_subject), plural = noun_phrase(rng, PEOPLE)
    says, en_says = (verb.split()[plural] for verb in rng.choice(SAYING))
    that = f"{subject} {says} , dass {last} .", f"{en_subject} {en_says} that {en_last} ."
    because = f"{de} , weil {last} .", f"{en} because {en_last} ."
    return rng.choice((that, because, (f"{de} .", f"{en} ."), (f"{de} .", f"{en} .")))


def generate(train: int = 6000, valid: int = 300, test: int = 300, seed: int = 1) -> dict[str, list[Pair]]:
    """The pairs of each split, the same for the same arguments; no German sentence occurs twice.

    Raises:
        ValueError: a size is below 1, or one is larger than what MAX_DRAWS draws leave for it.
    """
    sizes, rng, found = {"train": train, "valid": valid, "test": test}, random.Random(seed), dict[str, str]()
    for _ in range(min(MAX_DRAWS, 2 * sum(map(abs, sizes.values())))):
        found.update([sentence(rng)])
    pairs, splits = list(found.items()), {}
    for name, size in sizes.items():
        if not 1 <= size <= len(pairs):
            raise ValueError(f"{name}={size}: expected an integer from 1 to the {len(pairs)} sentences that are left")
        splits[name], pairs = pairs[:size], pairs[size:]
    return splits


def write(directory: Path, train: int = 6000, valid: int = 300, test: int = 300, seed: int = 1) -> None:
    """Write {train,valid,test}.{de,en} below ``directory``, which is made; errors as :func:`generate`."""
    for name, pairs in generate(train, valid, test, seed).items():
        directory.mkdir(parents=True, exist_ok=True)
        for text, language in zip(zip(*pairs, strict=True), ("de", "en"), strict=True):
            (directory / f"{name}.{language}").write_text("\n".join(text) + "\n", encoding="utf-8", newline="\n")


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)
