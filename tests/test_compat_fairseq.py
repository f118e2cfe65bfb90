"""What the environment broke in fairseq is mended, and fairseq finds this package imported already."""

import ast
import subprocess
import sys
from pathlib import Path

import fairseq
import numpy as np
import pytest

import fairseq_dsq
from fairseq_dsq import compat

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
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORTS.format(first=first), *map(str, folders)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1:] == ["True 1"], done.stderr


def test_another_package_of_the_same_name_is_none_of_this_one(tmp_path):
    other = tmp_path / "fairseq_dsq"
    other.mkdir()
    (other / "__init__.py").write_text("")
    assert str(other) not in fairseq_dsq.__path__
    assert fairseq_dsq.__path__[0] in fairseq_dsq.__path__
