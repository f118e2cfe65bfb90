"""What an installed package brings with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import run

ROOT = Path(__file__).resolve().parents[1]


def test_an_installed_package_finds_its_data_files(tmp_path):
    pytest.importorskip("setuptools")
    installed = tmp_path / "site"
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(installed)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    configs = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.*")}
    assert configs == {
        path.relative_to(installed / "fairseq_dsq") for path in (installed / "fairseq_dsq/configs").rglob("*.*")
    }
    assert not list(installed.rglob("README.md"))  # the rooms' are for a clone: they link to what lies outside
    templates = {path.name for path in (ROOT / "fairseq_dsq/report").glob("*.jinja")}
    assert templates == {path.name for path in (installed / "fairseq_dsq/report").glob("*.jinja")} != set()

    code = """
import sys
sys.path.insert(0, sys.argv[1])
import fairseq_dsq.cli, fairseq_dsq.data_files
print(fairseq_dsq.data_files.root())
sys.exit(fairseq_dsq.cli.main(["cost", "--paper-table"]))
"""
    code, out, err = run(["python", "-c", code, str(installed)], tmp_path, os.environ)
    assert code == 0 and "8 rows equal" in out, err
    assert Path(out.splitlines()[0]) == installed / "fairseq_dsq/configs"
