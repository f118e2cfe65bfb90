"""How to add a GEMM engine: one file, used here through fairseq-train."""

import re

PLUGIN = '''
from fairseq_dsq import gemm


class Float64Engine(gemm.Engine):
    """Products in float64, for operands of any format; it rounds none of them itself."""

    name = "float64"
    used = 0

    def accepts(self, a, b, device, dtype):
        return True

    def multiply(self, a, b, bias, add_to):
        self.used += 1
        if self.used == 1:
            print("float64 multiplies", a.side.fmt, "by", b.side.fmt)
        product = (a.rows.double() @ b.rows.mT.double()).to(a.rows.dtype)
        if bias is not None:
            product += bias
        return product if add_to is None else add_to.add_(product)


gemm.register(Float64Engine())
'''


def test_an_engine_of_ones_own(cli, tmp_path):
    (tmp_path / "__init__.py").write_text("import fairseq_dsq\nfrom . import float64\n")
    (tmp_path / "float64.py").write_text(PLUGIN)
    own = ("--user-dir", tmp_path, "--max-epoch", 1)
    log = cli.train(tmp_path / "float64", *own, "--dsq-gemm", "float64")
    assert "float64 multiplies bfp2 by bfp2" in log
    auto = cli.train(tmp_path / "auto", *own)
    assert "float64 multiplies" not in auto  # registered after the others: tried after them
    losses = [float(re.search(r'"train_loss": "([\d.]+)"', text)[1]) for text in (log, auto)]
    assert abs(losses[0] - losses[1]) < 0.05
    _, error = cli.run(*cli.train_command(tmp_path / "other", *own, "--dsq-gemm", "float16"), code=1)
    assert "argument --dsq-gemm: got 'float16', expected one of auto, int8, native, cuda, float32, float64" in error
