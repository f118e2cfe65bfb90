"""Benches: this project beside plain float32, rivals and peers, interleaved in one process, as ratios; a module each.

Each offers ``run(settings) -> Found`` (:mod:`fairseq_dsq.bench.timing`) and ``ROUNDS``, how often it times each
variant by default.
"""

BENCHES = {
    "quantize": "kernels over clone",
    "linear": "a layer's forward and backward over float32",
    "train-step": "transformer_iwslt_de_en, 2048 tokens, over float32",
    "optimizer": "a step and a whole update with low-bit Adam over fairseq's Adam",
    "memory": "bytes kept for backward, and peak memory, over float32",
    "python": "a step with small dimensions, and its launches on a GPU that is not there, over fairseq's float step",
    "logging": "a step with the dsq_ criterion over the plain one",
}
# What `fairseq-dsq bench all` runs.
ALL = ("quantize", "linear", "train-step", "optimizer", "memory", "python")

ON_A_GPU = ("quantize", "linear", "train-step", "memory")
IN_HALF_PRECISION = ("quantize", "linear", "train-step")
# By bench, the names of what a user may pick instead.
RIVALS = {
    "linear": ("autocast", "compile", "mkldnn", "peers"),
    "train-step": ("autocast", "compile", "mkldnn"),
    "memory": ("autocast", "checkpointing"),
}
