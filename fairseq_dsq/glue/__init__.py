"""The GLUE benchmark (arXiv 1804.07461): its tasks, its files as it ships them, tokenisation and metrics.

No torch and no fairseq: what runs a model is in :mod:`fairseq_dsq.models.sentence_prediction`.
"""

from fairseq_dsq.glue.tasks import TASKS, GlueTask, find_task

__all__ = ["TASKS", "GlueTask", "find_task"]
