"""The GLUE benchmark (arXiv 1804.07461): its tasks, its files as it ships them, encoders, tokenisation and metrics.

What runs a model is in :mod:`fairseq_dsq.glue.sentence_prediction`, Hugging Face's encoders in ``hf_*``; nothing else
imports torch or fairseq.
"""

from fairseq_dsq.glue.tasks import TASKS, GlueTask, find_task

__all__ = ["TASKS", "GlueTask", "find_task"]
