"""The data files of configs/: cost profiles, hardware, models, published numbers; each names its source."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

T = TypeVar("T")

SUFFIX = ".yaml"


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
    if not path.is_file():
        raise ValueError(f"got {name!r}, expected {', '.join(names(kind))} or the path of a {SUFFIX} file")
    return path


def read(path: Path) -> DictConfig:
    """The mapping in a YAML file.

    Raises:
        ValueError: not YAML, or not a mapping; names the file.
    """
    try:
        config = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path}: got a {type(config).__name__}, expected a mapping")
    return config


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
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        keys = ", ".join(field.name for field in dataclasses.fields(cast(Any, cls)))
        key = getattr(error, "full_key", None)
        where = f"{path}: {key}: " if key else f"{path}: "
        raise ValueError(f"{where}{str(error).splitlines()[0]} (keys: {keys})") from None


def load(cls: type[T], kind: str, name: str) -> T:
    """An instance of a dataclass from the data file of a name or path; errors as :func:`find` and :func:`build`."""
    path = find(kind, name)
    return build(cls, read(path), path)
