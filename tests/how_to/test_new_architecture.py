"""To add an architecture: name a model of fairseq; its flags, its architectures and the way back come with it.

To add a criterion: name it once it is registered, with a dataclass; its twin logs the costs.
"""

from e2e.conftest import cli

__all__ = ["cli"]

MY_PLUGIN = """
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.models import register_model_architecture
from fairseq.models.transformer.transformer_legacy import tiny_architecture

from fairseq_dsq.plugin.criterion import dsq_criterion
from fairseq_dsq.plugin.twins import dsq_twin

dsq_twin("transformer_align")  # makes transformer_align_dsq, and a twin of each of the model's architectures


@register_model_architecture("transformer_align_dsq", "transformer_align_dsq_tiny")
def transformer_align_dsq_tiny(args):
    args.encoder_embed_dim = args.decoder_embed_dim = 32
    tiny_architecture(args)


@register_criterion("mine", dataclass=CrossEntropyCriterionConfig)
class Mine(CrossEntropyCriterion):
    pass


dsq_criterion("mine")  # makes dsq_mine
"""


def test_a_model_of_fairseq_gets_its_quantized_twin(cli, tmp_path):
    (tmp_path / "my_plugin").mkdir()
    (tmp_path / "my_plugin/__init__.py").write_text(MY_PLUGIN, encoding="utf-8")
    out, err = cli.run(
        "fairseq-train", cli.data, "--user-dir", tmp_path / "my_plugin", "--arch", "transformer_align_dsq_tiny",
        "--criterion", "dsq_mine", "--dsq-levels", "[4,4,4,16]", "--max-tokens", 600,
        "--optimizer", "adam", "--max-epoch", 1, "--cpu", "--log-format", "json", "--no-epoch-checkpoints",
        "--save-dir", tmp_path,
    )  # fmt: skip
    assert '"train_dsq_arithmetic_relative"' in out + err
    out, _ = cli.run(
        "fairseq-dsq", "cost", "--user-dir", tmp_path / "my_plugin", "--arch", "transformer_align_dsq_tiny",
        "--tokens", 64, "--vocabulary", 100, "--flags", "--dsq-levels [4,4,4,16]",
    )  # fmt: skip
    assert "[4,4,4,16]: bfp" in out
    cli.run("fairseq-dsq", "export-float", tmp_path / "checkpoint_last.pt", tmp_path / "plain.pt")
