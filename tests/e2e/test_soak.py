"""A training that is killed and goes on, by the script that does it hundreds of times."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from report import samples

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def soak():
    """The script as a module."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        spec = importlib.util.spec_from_file_location("soak", ROOT / "scripts/soak.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def test_a_training_that_was_killed_ends_as_one_that_was_not(tmp_path):
    process = subprocess.run(
        [ROOT / "scripts/soak.sh", "kill", "1", "--seed", "3", "--out", tmp_path],
        env={**os.environ, "DSQ_ENV": str(Path(sys.executable).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["kills"], result["trainings"], result["trainings that differ"]) == (1, 1, 0)
    assert "kill 1 of 1: training 0" in process.stdout and "equal, bit for bit" in process.stdout


def test_a_cost_that_differs_in_its_last_bit_is_found(soak, tmp_path):
    for name, cost, wall_s in (("a", 1e9, 1.5), ("b", 1e9, 2.5), ("c", 1e9 * (1 + 2**-52), 1.5)):
        line = json.loads(samples.point_line(1, 6, 5.0))
        line["train"]["dsq_arithmetic"], line["wall_s"] = cost, wall_s
        samples.write(tmp_path, name, samples.start_line() + json.dumps(line) + "\n")
    a, b, c = (soak.recorded(tmp_path / name) for name in "abc")
    assert list(soak._compare(a, b, "record")) == []
    assert list(soak._compare(a, c, "record")) == ["record 0 train dsq_arithmetic: 1000000000.0 for 1000000000.0000002"]


def test_the_soak_refuses_a_count_that_is_none(soak, capsys):
    assert soak.main(["kill", "ten"]) == 2
    assert "soak.sh: error: N: got 'ten', expected an integer >= 1" in capsys.readouterr().err
