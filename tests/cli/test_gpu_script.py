"""scripts/gpu.py goes its way on a CPU in small; what it is for takes a GPU."""

import json
import os
from pathlib import Path

import command
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def run(*words):
    return command.run(["python", *map(str, (ROOT / "scripts" / "gpu.py", *words))], ROOT, os.environ)


@pytest.mark.parametrize("device", DEVICES)
def test_it_checks_times_and_writes_its_table(tmp_path, device):
    words = ("--device", device, "--out", tmp_path, "--sections", "environment", "products", "layers", "quantizers")
    code, out, err = run(*words)
    assert code == 0, out + err
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["wrong"] == [] and found["machine"]["torch"] == torch.__version__
    assert all(row["ok"] for name in ("products", "layers") for row in found["sections"][name])
    page = (tmp_path / "gpu.md").read_text()
    assert "- products: 28 of 28 right" in page and "| both directions, bfp16 |" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so():
    code, _, err = run("--device", "cuda")
    assert code == 2
    assert err.splitlines()[-1] == "gpu.sh: error: torch finds no CUDA device here, expected one, or --device cpu"
