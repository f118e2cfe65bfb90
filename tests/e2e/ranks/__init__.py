"""A user-dir: fairseq_dsq, and a translation task whose workers each keep the model that they validate.

With ``$LONE_NOISE`` each worker rounds its optimizer's states with noise of its own, as other libraries do.
"""

import os

import torch
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

import fairseq_dsq  # noqa: F401
from fairseq_dsq import adam

if "LONE_NOISE" in os.environ:
    adam.noise_seed = lambda *place: int(torch.randint(2**62, ()))


@register_task("translation_of_ranks", dataclass=TranslationConfig)
class TranslationOfRanks(TranslationTask):
    """Every worker writes the parameters that it begins a validation with to ``$RANKS/RANK.pt``."""

    def begin_valid_epoch(self, epoch, model):
        super().begin_valid_epoch(epoch, model)
        torch.save(model.state_dict(), os.path.join(os.environ["RANKS"], f"{torch.distributed.get_rank()}.pt"))
