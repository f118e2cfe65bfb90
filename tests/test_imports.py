"""Which way imports may point: the core (formats <- precision <- quant <- nn) knows neither plugin nor fairseq."""

import ast
from pathlib import Path

import pytest

import fairseq_dsq

PACKAGE = Path(fairseq_dsq.__path__[0])
FAIRSEQ_ROOMS = {"criterions", "glue", "models", "optim", "plugin", "translation"}
# room: the rooms it may import, beside itself
ARROWS = {
    "artefact": set(),
    "__init__": {"criterions", "errors", "models", "plugin"},
    "data_files": {"text"},
    "download": {"artefact"},
    "errors": set(),
    "formats": {"text"},
    "precision": {"formats", "text"},
    "schedule": set(),
    "text": set(),
    "quant": {"formats", "precision"},
    "cost": {"data_files", "formats", "precision"},
    "nn": {"formats", "precision", "quant"},
    "plugin": {"cost", "data_files", "errors", "formats", "precision", "quant", "nn", "schedule", "text"},
    "models": {"plugin"},
    "criterions": {"plugin"},
    "glue": {"artefact", "download", "plugin", "text"},
    "translation": {"artefact", "download"},
    "report": {"artefact", "cost", "formats", "glue", "plugin", "precision", "text"},
    "cli": {
        "artefact",
        "data_files",
        "download",
        "errors",
        "plugin",
        "formats",
        "glue",
        "precision",
        "quant",
        "nn",
        "schedule",
        "cost",
        "report",
        "text",
        "translation",
    },
}


def rooms_and_imports():
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                yield pytest.param(room, name, id=f"{path.relative_to(PACKAGE)}: {name}")


IMPORTS = list(rooms_and_imports())


@pytest.mark.parametrize(("room", "name"), IMPORTS)
def test_imports_follow_the_arrows(room, name):
    parts = name.split(".")
    if parts[0] in ("fairseq", "fairseq_cli"):
        assert room in FAIRSEQ_ROOMS or room == "cli"
    elif parts[0] == "matplotlib":
        assert room == "report"
    elif parts[0] == "fairseq_dsq":
        assert parts[1] in ARROWS[room] | {room}


def test_every_room_has_an_arrow():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert rooms == set(ARROWS)
    assert len(IMPORTS) > 50
