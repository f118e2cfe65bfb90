"""Which way imports may point: the core (formats <- precision <- quant <- nn) knows neither plugin nor fairseq."""

import ast
from pathlib import Path

import pytest

import fairseq_dsq

PACKAGE = Path(fairseq_dsq.__path__[0])
FAIRSEQ_ROOMS = {"bench", "criterions", "glue", "models", "optim", "plugin", "translation"}
# room: the rooms it may import, beside itself
ARROWS = {
    # The core: torch at most.
    "text": set(),
    "errors": set(),
    "formats": {"text"},
    "precision": {"formats", "text"},
    "flags": {"text"},
    "schedules": {"errors", "flags", "precision", "text"},
    "ledger": {"precision"},
    "kernels": {"formats"},
    "quantized": {"formats", "kernels", "text"},
    "gemm": {"formats", "kernels"},
    "nn": {"formats", "gemm", "kernels", "ledger", "precision", "quantized", "text"},
    "adam": {"formats", "kernels", "quantized", "text"},
    "data_files": {"text"},
    "cost": {"data_files", "formats", "ledger", "precision"},
    # What knows fairseq, and what is made of it.
    "artefact": set(),
    "download": {"artefact"},
    "record": {"artefact", "text"},
    "plugin": {
        *("adam", "artefact", "cost", "data_files", "errors", "flags", "formats", "gemm", "ledger", "nn"),
        *("precision", "quantized", "record", "schedules", "text"),
    },
    "__init__": {"criterions", "errors", "models", "optim", "plugin"},
    "models": {"plugin"},
    "criterions": {"plugin"},
    "optim": {"plugin"},
    "glue": {"artefact", "data_files", "download", "plugin", "text"},
    "lm": {"artefact", "translation"},
    "recipes": {"artefact", "data_files", "record", "translation"},
    "translation": {"artefact", "data_files", "download"},
    "report": {"artefact", "cost", "formats", "glue", "plugin", "precision", "record", "schedules", "text"},
    "bench": {"adam", "formats", "gemm", "kernels", "nn", "plugin", "precision", "quantized"},
    "cli": {
        *("artefact", "bench", "cost", "criterions", "data_files", "download", "errors", "formats", "gemm", "glue"),
        *("kernels", "ledger", "lm", "nn", "plugin", "precision", "quantized", "recipes", "record", "report"),
        *("schedules", "text", "translation"),
    },
}


def imports_of(room):
    """(file, dotted name) of every import in a room."""
    for path in sorted([*PACKAGE.glob(f"{room}.py"), *(PACKAGE / room).rglob("*.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            yield from ((str(path.relative_to(PACKAGE)), name) for name in names)


def follows_the_arrows(room, name):
    parts = name.split(".")
    if parts[0] in ("fairseq", "fairseq_cli"):
        return room in FAIRSEQ_ROOMS or room == "cli"
    if parts[0] == "matplotlib":
        return room == "report"
    return parts[0] != "fairseq_dsq" or parts[1] in ARROWS[room] | {room}


@pytest.mark.parametrize("room", ARROWS)
def test_imports_follow_the_arrows(room):
    found = list(imports_of(room))
    assert found
    assert [each for each in found if not follows_the_arrows(room, each[1])] == []


def test_every_room_has_an_arrow():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert rooms == set(ARROWS)
