"""What the environment broke in fairseq is mended, and fairseq finds this package imported already."""

import ast
import io
import os
import sys
import tarfile
from pathlib import Path

import fairseq
import numpy as np
import pytest
from command import run
from fairseq import file_utils

import fairseq_dsq
from fairseq_dsq.errors import DSQError
from fairseq_dsq.plugin import compat

ROOT = Path(fairseq.__file__).parent


def dropped_names():
    """(module of fairseq, name) of every use of a name that the installed numpy lacks."""
    for path in sorted(ROOT.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        relative = path.relative_to(ROOT)
        if "examples" in relative.parts or "np." not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "np"
                and not hasattr(np, node.attr)
            ):
                yield ".".join(("fairseq", *relative.with_suffix("").parts)), node.attr


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_no_module_of_fairseq_lacks_a_name_of_numpy():
    for module, name in dropped_names():
        assert module in compat.NUMPY_1_MODULES
        assert hasattr(sys.modules[module].np, name), f"{module}: np.{name}"


def test_numpy_itself_is_left_alone():
    if np.__version__.startswith("2."):
        assert not hasattr(np, "compat")
    assert not hasattr(np, "int")


IMPORTS = """
import argparse, os, sys
{first}
from fairseq import utils
for folder in sys.argv[1:]:
    utils.import_user_module(argparse.Namespace(user_dir=folder))
from fairseq.models import ARCH_MODEL_REGISTRY
print("transformer_dsq" in ARCH_MODEL_REGISTRY, len([name for name in sys.modules if name == "fairseq_dsq"]))
"""


@pytest.mark.parametrize("first", ["import fairseq_dsq", "pass"])
def test_the_package_is_one_by_every_path_before_and_after_its_import(tmp_path, first):
    package = Path(fairseq_dsq.__path__[0])
    (tmp_path / "linked").symlink_to(package.parent)
    folders = [package, "fairseq_dsq", "fairseq_dsq", "linked/fairseq_dsq", f"{package}/", package / "../fairseq_dsq"]
    command = ["python", "-c", IMPORTS.format(first=first), *map(str, folders)]
    _, out, err = run(command, tmp_path, os.environ)
    assert out.splitlines()[-1:] == ["True 1"], err


def test_another_package_of_the_same_name_is_none_of_this_one(tmp_path):
    other = tmp_path / "fairseq_dsq"
    other.mkdir()
    (other / "__init__.py").write_text("")
    assert str(other) not in fairseq_dsq.__path__
    assert fairseq_dsq.__path__[0] in fairseq_dsq.__path__


def entry(name, **fields):
    found = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(found, field, value)
    return found


@pytest.mark.parametrize(
    "hostile",
    [
        [entry("model/../../out", size=1)],
        [entry("model/link", type=tarfile.SYMTYPE, linkname="../.."), entry("model/link/out", size=1)],
        [entry("model/link", type=tarfile.LNKTYPE, linkname="../../secret")],
        [entry("model/device", type=tarfile.CHRTYPE)],
    ],
)
def test_an_archive_that_leaves_its_folder_is_refused(tmp_path, monkeypatch, hostile):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(file_utils.tempfile, "tempdir", str(tmp_path / "temporary"))
    archive = tmp_path / "model.tar.gz"
    with tarfile.open(archive, "w:gz") as content:
        for member in (entry("model/dict.txt", size=1), *hostile):
            content.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(DSQError, match=r"model\.tar\.gz: .*refused: an archive must stay in its folder"):
        file_utils.load_archive_file(str(archive))
    assert not [path for path in tmp_path.rglob("*") if path.name == "out"]


def test_a_sound_archive_is_extracted(tmp_path):
    archive = tmp_path / "model.tar.gz"
    with tarfile.open(archive, "w:gz") as content:
        content.addfile(entry("model/dict.txt", size=1), io.BytesIO(b"x"))
        content.addfile(entry("model", type=tarfile.DIRTYPE))
    assert (Path(file_utils.load_archive_file(str(archive))) / "dict.txt").read_text() == "x"
