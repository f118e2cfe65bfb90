"""What an installed package brings with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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

    elsewhere = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fairseq_dsq.cli", "cost", "--paper-table"]
    done = subprocess.run(command, cwd=tmp_path, env=elsewhere, capture_output=True, text=True)
    assert "8 rows equal" in done.stdout, done.stderr
    where = [sys.executable, "-c", "import fairseq_dsq.data_files as d; print(d.root())"]
    done = subprocess.run(where, cwd=tmp_path, env=elsewhere, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == installed / "fairseq_dsq/configs"
