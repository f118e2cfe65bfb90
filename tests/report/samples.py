"""Small logs in fairseq's own words."""

import json

FLOAT32 = {"dsq_format": "float32"}
STATIC = {"dsq_format": "bfp", "dsq_levels": "[16,4,4,16]"}
DSQ = {"dsq_format": "bfp", "dsq_levels": "[2,2,2,16] [16,4,4,16]"}
FIXED = {"dsq_format": "fixed", "dsq_levels": "[16,4,4,16]"}
# (arithmetic, DRAM traffic) relative to 32-bit fixed point, as a log says
LOW, HIGH, ONE = (0.0318, 0.305453), (0.1048, 0.446078), (1.0, 1.0)
BASELINES = (1e9, 2e8)  # MACs, bytes of an epoch


def config_line(max_epoch=0, arch="transformer_dsq", **flags):
    """What fairseq-train prints first, shortened."""
    shown = {"no_progress_bar": True, "arch": arch, "dsq_skip": "", **flags}
    if "dsq" not in arch:
        shown = {"arch": arch, **flags}
    namespace = ", ".join(f"{name}={value!r}" for name, value in shown.items())
    return (
        "2026-11-22 02:04:26 | INFO | fairseq_cli.train | {'_name': None, 'common': {'seed': 1, 'fp16': False}, "
        f"'dataset': {{'valid_subset': 'valid'}}, 'optimization': {{'max_epoch': {max_epoch}, 'max_update': 0}}, "
        f"'model': Namespace({namespace}), 'criterion': {{'_name': 'dsq_cross_entropy'}}}}\n"
    )


def begin_line(epoch):
    return f"2026-11-22 02:04:28 | INFO | fairseq.trainer | begin training epoch {epoch}\n"


def costs(relative):
    """A training epoch's dsq metrics."""
    arithmetic, dram = relative
    return {
        "dsq_arithmetic": f"{arithmetic * BASELINES[0]:g}",
        "dsq_dram_bytes": f"{dram * BASELINES[1]:g}",
        "dsq_arithmetic_baseline": f"{BASELINES[0]:g}",
        "dsq_dram_baseline_bytes": f"{BASELINES[1]:g}",
        "dsq_arithmetic_relative": f"{arithmetic:g}",
        "dsq_dram_relative": f"{dram:g}",
    }


def valid_line(epoch, updates, loss, subset="valid", **metrics):
    stats = {"loss": f"{loss:g}", **metrics, "num_updates": f"{updates:g}"}
    record = {"epoch": epoch, **{f"{subset}_{name}": str(value) for name, value in stats.items()}}
    return f"2026-11-22 02:04:28 | INFO | {subset} | {json.dumps(record)}\n"


def train_line(epoch, updates, loss, level=None, relative=None, stash=2e6):
    stats = {"loss": f"{loss:g}", "num_updates": f"{updates:g}"}
    if relative:
        stats |= {"dsq_level": f"{level:g}", "dsq_stash_bytes": f"{stash:g}", **costs(relative)}
    record = {"epoch": epoch, **{f"train_{name}": value for name, value in stats.items()}, "train_wall": "3"}
    return f"2026-11-22 02:04:28 | INFO | train | {json.dumps(record)}\n"


def log(flags, losses, levels=None, relatives=None, max_epoch=None, done=True, arch="transformer_dsq", **metrics):
    """A whole log: ``losses`` are the validation's; ``metrics`` map a name to a value per epoch."""
    text = config_line(max_epoch or len(losses), arch, **flags)
    for index, loss in enumerate(losses):
        epoch, updates = index + 1, 10 * (index + 1)
        extra = {name: values[index] for name, values in metrics.items()}
        text += begin_line(epoch) + valid_line(epoch, updates, loss, **extra)
        relative = relatives[index] if relatives else None
        text += train_line(epoch, updates, loss + 0.5, levels[index] if levels else 0, relative)
    return text + ("2026-11-22 02:04:29 | INFO | fairseq_cli.train | done training in 1.4 seconds\n" if done else "")


def write_runs(folder, count):
    """``count`` runs of 12 epochs with BLEU, the first in float32; returns their folders."""
    settings = [
        ("float32", FLOAT32, ONE, 35.44, 0.0),
        ("dsq", DSQ, None, 34.17, 0.25),
        ("stashing", STATIC, HIGH, 34.85, 0.05),
        ("fixed", FIXED, (0.125, 0.3125), 33.9, 0.3),
        ("fixed16", {"dsq_format": "fixed", "dsq_levels": "[16,16,16,16]"}, (0.25, 0.5), 35.1, 0.02),
        ("bfp16", {"dsq_format": "bfp", "dsq_levels": "[16,16,16,16]"}, (0.181, 0.634), 35.3, 0.01),
        ("stochastic", {**STATIC, "dsq_rounding": "stochastic"}, HIGH, 35.0, 0.04),
        ("two-bits", {"dsq_format": "bfp", "dsq_levels": "[2,2,2,16]"}, LOW, 21.3, 1.6),
    ]
    settings += [(f"seed {i}", STATIC, HIGH, 34.8 + i / 10, 0.05 + i / 50) for i in range(2, 10)]
    paths = []
    for name, flags, relative, bleu, worse in settings[:count]:
        levels = [0] * 4 + [1] * 8 if name == "dsq" else [0] * 12
        relatives = [LOW] * 4 + [HIGH] * 8 if relative is None else [relative] * 12
        losses = [4 + 3.5 * 0.75**epoch + worse for epoch in range(12)]
        path = folder / name
        path.mkdir(parents=True)
        (path / "train.log").write_text(log(flags, losses, levels, relatives))
        (path / "generate.out").write_text(
            f"D-1\t-0.1\ta sentence\nGenerate test with beam=4: BLEU4 = {bleu}, 60.0/40.0/30.0/20.0 (BP=1.000)\n"
        )
        paths.append(path)
    return paths
