"""A training that is killed and goes on, by the script that does it hundreds of times."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_a_metric_that_differs_is_found_in_a_log_that_a_kill_cut(soak, tmp_path):
    valid = '{"epoch": 1, "valid_loss": "5.1", "valid_dsq_level": "0", "valid_wps": "%d", "valid_num_updates": "2"}'
    whole, cut = tmp_path / "whole.log", tmp_path / "cut.log"
    whole.write_text(f"x | INFO | valid | {valid % 7}\n")
    cut.write_text(f"x | INFO | valid | {valid[:40]}\n" + f"x | INFO | valid | {valid % 9}\n")
    assert list(soak.logged(cut)) == list(soak.logged(whole))  # speed is no matter
    cut.write_text(f"x | INFO | valid | {(valid % 9).replace('5.1', '5.2')}\n")
    assert list(soak.logged(cut)) != list(soak.logged(whole))


def test_the_soak_refuses_a_count_that_is_none(soak, capsys):
    assert soak.main(["kill", "ten"]) == 2
    assert "soak.sh: error: N: got 'ten', expected an integer >= 1" in capsys.readouterr().err
