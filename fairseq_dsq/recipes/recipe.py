"""Recipes: data files in configs/recipes/ (or anywhere) that say what is trained, and what of it can be chosen."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import Any

from fairseq_dsq import data_files
from fairseq_dsq.translation.pieces import LEARN, SENTENCEPIECE

FOLDER, METHODS = "recipes", "methods"
PARAMETER = re.compile(r"\{([\w-]+)\}")


@dataclass(frozen=True)
class Method:
    """A row of a table: a number format and its levels, the default ones where they are empty.

    Attributes:
        flags: more flags of fairseq-train.
    """

    format: str
    levels: str = ""
    flags: str = ""

    def __post_init__(self) -> None:
        try:
            shlex.split(self.flags)
        except ValueError as error:
            raise ValueError(f"flags: {error}") from None


@dataclass
class Recipe:
    """What every recipe holds; numbers and flags are the defaults of the flags of their names.

    Attributes:
        about: what it trains and where its data comes from.
        train: flags of fairseq-train.
        epochs, format: the training's length, the number format.
        patience, min_delta: of the schedule; None: those of fairseq-train.
        parameters: more flags, integers whose values ``train`` names as {NAME}.
        update_freq: batches of an update on one GPU; several GPUs share them.
    """

    about: str
    train: str
    epochs: int
    format: str = "bfp"
    patience: int | None = None
    min_delta: str | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    update_freq: int = 1

    def __post_init__(self) -> None:
        try:
            shlex.split(self.train)
        except ValueError as error:
            raise ValueError(f"train: {error}") from None
        self.check_parameters("train", self.train)

    def check_parameters(self, field: str, flags: str) -> None:
        """Refuse flags that name what is no parameter.

        Raises:
            ValueError: they do; names the field.
        """
        for name in PARAMETER.findall(flags):
            if name not in self.parameters:
                known = ", ".join(self.parameters)
                raise ValueError(f"{field}: got {{{name}}}, expected one of the parameters: {known}")


@dataclass
class Tabled(Recipe):
    """A recipe that may train the rows of tables.

    Attributes:
        methods: files in configs/methods/, separated by spaces, whose rows are trained; empty: one run.
        seeds: of a table's rows, separated by spaces; 1 where nothing is said.
        profiles: cost profiles of the report besides the runs' own, separated by spaces.
    """

    methods: str = ""
    profiles: str = ""
    seeds: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        tables = self.methods.split()
        for table, seeds in self.seeds.items():
            if table not in tables:
                raise ValueError(f"seeds: got {table}, expected some of the methods: {self.methods}")
            if not seeds_of(seeds):
                raise ValueError(f"seeds: {table}: got {seeds!r}, expected integers >= 0 such as '1 2 3'")

    def tables(self) -> dict[str, dict[str, Method]]:
        """The methods by name, by table, in their order.

        Raises:
            ValueError: not a table of methods, or a name that stands for two; names the file.
        """
        found: dict[str, dict[str, Method]] = {}
        known: dict[str, Method] = {}
        for table in self.methods.split():
            path = data_files.find(METHODS, table)
            rows = {str(name): data_files.build(Method, row, path) for name, row in data_files.read(path).items()}
            for name, row in rows.items():
                if known.setdefault(name, row) != row:
                    raise ValueError(f"{path}: {name}: got {row}, expected what another table has: {known[name]}")
            found[table] = rows
        return found

    def rows(self) -> dict[str, Method]:
        """The methods of all tables by name; errors as :meth:`tables`."""
        return {name: row for rows in self.tables().values() for name, row in rows.items()}


def seeds_of(text: str) -> list[int]:
    """The seeds of a text such as ``1 2 3``; none where it is no such text."""
    words = text.split()
    return [*dict.fromkeys(map(int, words))] if all(re.fullmatch("[0-9]{1,9}", word) for word in words) else []


@dataclass
class Translation(Tabled):
    """A parallel corpus: prepared, trained, translated, scored with sacreBLEU.

    Attributes:
        corpus: a name of fairseq_dsq.translation, or plain text below $DSQ_DATA, see
            :class:`fairseq_dsq.translation.PlainText`.
        test: what the test set is called.
        vocab: joint pieces.
        pieces: what they are, a name in :data:`fairseq_dsq.translation.pieces.LEARN`.
        search: flags of fairseq-generate.
        tokenize: sacreBLEU's tokenizer: 13a for text, none for what is tokenised.
    """

    corpus: Any = "???"  # must be given
    test: str = "test"
    vocab: int = 4000
    pieces: str = SENTENCEPIECE
    search: str = "--beam 5"
    tokenize: str = "13a"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pieces not in LEARN:
            raise ValueError(f"pieces: got {self.pieces!r}, expected {' or '.join(LEARN)}")


@dataclass
class Glue(Recipe):
    """A GLUE task: prepared for an encoder, fine-tuned, scored on its development sets.

    Attributes:
        encoder: the folder of one, or the name of one that is downloaded.
        lr: the highest learning rate.
    """

    encoder: str = "roberta.base"
    lr: str = "1e-5"


@dataclass
class LanguageModel(Tabled):
    """Any text: cut into sentence pieces, split, trained, scored by its test part's perplexity.

    Attributes:
        arch: the architecture; has :attr:`architectures`' flags, where they name it.
        architectures: flags of fairseq-train by architecture.
        evaluate: flags of fairseq-eval-lm.
        vocab: sentence pieces.
        held_out: share of the lines that valid and test have, each.
    """

    arch: str = "transformer_lm_dsq"
    architectures: dict[str, str] = field(default_factory=dict)
    evaluate: str = ""
    vocab: int = 4000
    held_out: str = "0.05"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, flags in {**self.architectures, "evaluate": self.evaluate}.items():
            self.check_parameters(name, flags)


KINDS: dict[str, type[Recipe]] = {"translation": Translation, "glue": Glue, "language_model": LanguageModel}


def load_recipe(name: str) -> Recipe:
    """The recipe of a name in configs/recipes/, or of the path of a file of one's own.

    Raises:
        ValueError: no such recipe, or a file that is not one; the message says what is expected.
    """
    return data_files.load_kind(KINDS, FOLDER, name)
