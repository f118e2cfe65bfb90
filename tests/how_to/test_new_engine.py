"""To add a GEMM engine: a file that registers one. --dsq-gemm then knows its name, and auto tries it in its turn."""

ENGINE = '''
"""Sums in float64: what is left of a training when the order of float32 summation no longer matters."""

import atexit

import torch

from fairseq_dsq import gemm
from fairseq_dsq.gemm.base import Engine, finish


class Double(Engine):
    name = "double"
    products = 0

    def accepts(self, a, b, device, dtype):
        return dtype is torch.float32  # any format: float64 holds the product of two float32 exactly

    def multiply(self, a, b, bias, add_to):
        self.products += 1
        return finish((a.rows.double() @ b.rows.mT.double()).float(), bias, add_to)


double = Double()
gemm.register(double, first=True)  # asked before all; without first, after those that are there, but for float32
atexit.register(lambda: print(f"{double.products} products in float64"))
'''


def test_an_engine_is_one_file(cli, tmp_path):
    user_dir = tmp_path / "double_dsq"
    user_dir.mkdir()
    (user_dir / "__init__.py").write_text("import fairseq_dsq\nfrom double_dsq import double\n")
    (user_dir / "double.py").write_text(ENGINE)
    assert 15 <= len(ENGINE.strip().splitlines()) <= 40
    for mode in ("double", "auto", "float32"):
        log = cli.train(tmp_path / mode, "--user-dir", user_dir, "--dsq-gemm", mode, "--max-epoch", 1, "--no-save")
        (line,) = [line for line in log.splitlines() if line.endswith(" products in float64")]
        assert (int(line.split()[0]) > 0) == (mode != "float32")
