"""scripts/gpu.py goes its way on a CPU in small; what it is for takes a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def run(*words):
    command = [sys.executable, ROOT / "scripts" / "gpu.py", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize("device", DEVICES)
def test_it_checks_times_and_writes_its_table(tmp_path, device):
    done = run("--device", device, "--out", tmp_path, "--sections", "environment", "products", "layers", "quantizers")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["wrong"] == [] and found["machine"]["torch"] == torch.__version__
    assert all(row["ok"] for name in ("products", "layers") for row in found["sections"][name])
    page = (tmp_path / "gpu.md").read_text()
    assert "- products: 28 of 28 right" in page and "| both directions, bfp16 |" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so():
    done = run("--device", "cuda")
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1] == "gpu.py: error: torch finds no CUDA device here, expected one, or --device cpu"
    )
