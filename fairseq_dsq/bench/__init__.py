"""Benches: this project beside plain float32 and its peers, interleaved in one process, as ratios; a module each.

Each offers ``run(rounds) -> rows`` and ``ROUNDS``, how often it times each variant by default; those of ``ON_A_GPU``
also take a :class:`~fairseq_dsq.bench.timing.Place`.
"""

BENCHES = {
    "quantize": "kernels over clone",
    "linear": "a layer's forward and backward over float32",
    "train-step": "transformer_iwslt_de_en, 2048 tokens, over float32",
    "optimizer": "a step and a whole update with low-bit Adam over fairseq's Adam",
    "memory": "bytes kept for backward, and peak resident memory, over float32",
    "python": "a step with small dimensions, and its launches on a GPU that is not there, over fairseq's float step",
    "logging": "a step with the dsq_ criterion over the plain one",
}

ON_A_GPU = ("quantize", "linear", "train-step")
