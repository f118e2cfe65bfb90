"""The data files of configs/: cost profiles, hardware, models, published numbers; each names its source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fairseq_dsq.text import printable, quoted, shortened

T = TypeVar("T")

SUFFIX = ".yaml"
MOST_BYTES, DEEPEST = 1 << 17, 20


def root() -> Path:
    """The folder of the data files: inside an installed package, beside the package in a clone."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names(kind: str) -> list[str]:
    """The names that :func:`find` knows without a path, sorted; ``kind`` is a folder of configs/."""
    return sorted(path.stem for path in (root() / kind).glob(f"*{SUFFIX}"))


def find(kind: str, name: str) -> Path:
    """The file of a name, or of a path to a file of one's own.

    Raises:
        ValueError: there is no such file; the message lists the names.
    """
    own = Path(name)
    path = own if own.suffix in (SUFFIX, ".yml") else root() / kind / f"{name}{SUFFIX}"
    try:
        found = path.is_file()
    except OSError:  # too long a name
        found = False
    if not found:
        raise ValueError(f"got {quoted(name)}, expected {', '.join(names(kind))} or the path of a {SUFFIX} file")
    return path


def read(path: Path) -> DictConfig:
    """The mapping in a YAML file.

    Raises:
        ValueError: not YAML, or not a mapping; names the file.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: got {path.stat().st_size} bytes, expected at most {MOST_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
        _check_yaml(text)
        config = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not YAML: {_line(error)}") from None
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path}: got a {type(config).__name__}, expected a mapping")
    return config


def _check_yaml(text: str) -> None:
    """Refuse what no data file needs, and what a YAML library takes endless time or memory for or stumbles over.

    Raises:
        ValueError, yaml.YAMLError: an alias (a few stand for more values than any memory holds), a tag, deep nesting,
            a single value.
    """
    depth = 0
    for event in yaml.parse(text):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("got an alias (*name), expected none")
        if getattr(event, "tag", None):
            raise ValueError(f"got the tag {quoted(event.tag)}, expected none")
        if isinstance(event, yaml.ScalarEvent) and not depth:
            raise ValueError(f"got {quoted(event.value)}, expected a mapping")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError("nested too deeply")


def _line(error: object) -> str:
    """What went wrong, in one line of bearable length."""
    lines = str(error).splitlines() or [type(error).__name__]
    if not isinstance(error, yaml.YAMLError):  # OmegaConf's first says it all
        del lines[1:]
    return shortened(printable(" ".join(" ".join(lines).split())), 200)


def build(cls: type[T], config: DictConfig, path: Path) -> T:
    """An instance of a dataclass from the mapping that ``path`` holds, its types checked.

    Raises:
        ValueError: an unknown, missing or ill-typed key, or a value that the class refuses; names the file.
    """
    try:
        schema = OmegaConf.structured(cls)
        OmegaConf.set_readonly(schema, False)  # a frozen class gives a read-only schema
        merged = OmegaConf.merge(schema, config)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ValueError(f"{', '.join(missing)}: missing")
        return cast(T, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
        keys = ", ".join(field.name for field in dataclasses.fields(cast(Any, cls)))
        key = getattr(error, "full_key", None)
        where = f"{path}: {_line(key)}: " if key else f"{path}: "
        raise ValueError(f"{where}{_line(error)} (keys: {keys})") from None


def load(cls: type[T], kind: str, name: str) -> T:
    """An instance of a dataclass from the data file of a name or path; errors as :func:`find` and :func:`build`."""
    path = find(kind, name)
    return build(cls, read(path), path)


def load_kind(kinds: Mapping[str, type[T]], folder: str, name: str) -> T:
    """The same of a file whose ``kind`` names the dataclass.

    Raises:
        ValueError: besides, a kind that is none of ``kinds``; names the file.
    """
    path = find(folder, name)
    config = read(path)
    kind = config.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"{path}: kind: got {kind!r}, expected one of {', '.join(kinds)}")
    return build(kinds[kind], config, path)
