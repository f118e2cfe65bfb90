"""How to add a number format: one file, used here through the real command lines; fairseq-dsq takes --user-dir too.

Its text has all its options in it: whatever runs the format is told of it by its text. Attention's values take one
scale for each row, ``by_row``, here inherited; of a format that has None they take boxes along the features.
"""

PLUGIN = '''
from dataclasses import dataclass

import torch

from fairseq_dsq import formats
from fairseq_dsq.formats.integer import Integer


@dataclass(frozen=True)
class Powers(Integer):
    """Signed powers of two below the largest magnitude of a row: power4 has 0 and +-max * 2^-k, k = 0 to 6."""

    family = "power"
    significand_bits = 1  # nothing of what Integer says of its values holds: engines are told anew

    def scale_of(self, groups):
        return super().scale_of(groups) * self.max_code

    def encode(self, groups, scale, noise):
        exponents = torch.log2((groups / scale).abs()).round().nan_to_num(-999.0)
        exponents = exponents.where(exponents >= 1 - self.max_code, -999.0)
        return torch.exp2(exponents) * groups.sign()

    def to_codes(self, elements):
        magnitudes = (self.max_code + torch.log2(elements.abs())).clamp(min=0).to(torch.int32)
        return magnitudes | (elements < 0).to(torch.int32) << (self.bits - 1)

    def from_codes(self, codes):
        magnitudes = (codes & self.max_code).to(torch.float32)
        values = torch.where(magnitudes > 0, torch.exp2(magnitudes - self.max_code), 0.0)
        return torch.where(codes > self.max_code, -values, values)

    def __str__(self):
        return f"power{self.bits}"


formats.register("power", lambda q, options: Powers(options.bits(q)))
'''


def test_a_format_of_ones_own(cli, tmp_path):
    (tmp_path / "powers.py").write_text(PLUGIN)
    (tmp_path / "__init__.py").write_text("import fairseq_dsq\nfrom . import powers\n")
    log = cli.train(
        tmp_path / "run", "--user-dir", tmp_path, "--dsq-format", "power", "--dsq-levels", "[6,4,6,8]", "--max-epoch", 1
    )
    assert "done training" in log
    out, _ = cli.run("fairseq-dsq", "formats", "--user-dir", tmp_path, "power4", "--json")
    assert '"format": "power4"' in out
    check = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import torch, powers
from fairseq_dsq import formats
from fairseq_dsq.quantized import fake_quantize, pack
fmt, x = formats.parse("power4"), torch.tensor([[8.0, -3.9, 0.05, 0.9, 0.0]])
assert fake_quantize(x, fmt).tolist() == [[8.0, -4.0, 0.0, 1.0, 0.0]]
assert pack(x, fmt).dequantize().tolist() == [[8.0, -4.0, 0.0, 1.0, 0.0]]
assert pack(x, fmt).nbytes == fmt.nbytes(x.shape) == 4 + 3
"""
    cli.run("python", "-c", check)
