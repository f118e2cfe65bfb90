"""Small records, and logs in fairseq's own words."""

import json

from fairseq_dsq.formats import FormatOptions, names
from fairseq_dsq.precision import parse_levels

FLOAT32 = {"dsq_format": "float32", "dsq_levels": "[32,32,32,32]"}
STATIC = {"dsq_format": "bfp", "dsq_levels": "[16,4,4,16]"}
DSQ = {"dsq_format": "bfp", "dsq_levels": "[2,2,2,16] [16,4,4,16]"}
FIXED = {"dsq_format": "fixed", "dsq_levels": "[16,4,4,16]"}
# (arithmetic, DRAM traffic) relative to 32-bit fixed point
LOW, HIGH, ONE = (0.0318, 0.305453), (0.1048, 0.446078), (1.0, 1.0)
BASELINES = (1e9, 2e8)  # MACs, bytes of an epoch


def values(dsq_levels=DSQ["dsq_levels"], dsq_format="bfp", dsq_sign_bit="counted", **_):
    """The levels of flags, by value; as those of bfp where the format is none."""
    name = dsq_format if dsq_format in names() else "bfp"
    return [level.by_value for level in parse_levels(dsq_levels, name, FormatOptions(dsq_sign_bit == "extra"))]


def start_line(max_epoch=0, update=0, epoch=1, arch="transformer_dsq", **flags):
    """What a training's record begins with."""
    profile = flags.pop("dsq_cost_profile", "paper")
    shown = {"dsq_skip": "", "max_epoch": max_epoch, "max_update": 0, "valid_subset": "valid", "fp16": False, **flags}
    line = {
        "schema": 1, "update": update, "epoch": epoch, "version": "1.0", "arch": arch,
        "criterion": "dsq_cross_entropy", "cost_profile": profile, "levels": values(**flags),
        "flags": shown, "machine": {"processor": "a CPU", "torch": "2.0"},
    }  # fmt: skip
    return json.dumps(line) + "\n"


def costs(relative):
    """A training epoch's dsq metrics."""
    arithmetic, dram = relative
    return {
        "dsq_arithmetic": arithmetic * BASELINES[0], "dsq_dram_bytes": dram * BASELINES[1],
        "dsq_arithmetic_baseline": BASELINES[0], "dsq_dram_baseline_bytes": BASELINES[1],
        "dsq_arithmetic_relative": arithmetic, "dsq_dram_relative": dram,
    }  # fmt: skip


def point_line(
    epoch,
    update,
    valid=None,
    train=None,
    level=0,
    relative=LOW,
    ended=True,
    stash=2e6,
    held=(),
    lr=0.1,
    levels=None,
    **metrics,
):
    """A validation of loss ``valid``, or an epoch's end without one; ``train``: the training loss so far.

    ``held``: bytes of weights, gradients and states; ``levels``: by value, of which ``level`` is in force.
    """
    line = {
        "update": update, "epoch": epoch, "epoch_ended": ended, "counts": valid is not None, "level": int(level),
        "precision": (levels or values())[int(level)],
        "train": {
            "loss": valid if train is None else train, "num_updates": update, "dsq_level": level, "lr": lr,
            "dsq_stash_bytes": stash, **costs(relative),
            **dict(zip(("dsq_weight_bytes", "dsq_gradient_bytes", "dsq_state_bytes"), held, strict=False)),
        },
        "valid": {} if valid is None else {"valid": {"loss": valid, **metrics}}, "wall_s": 3.5,
    }  # fmt: skip
    return json.dumps(line).replace("NaN", '"nan"') + "\n"


def record(flags, losses, levels=None, relatives=None, max_epoch=None, **metrics):
    """A whole record: ``losses`` are the validation's; ``metrics`` map a name to a value per epoch."""
    text = start_line(max_epoch or len(losses), **flags)
    for index, loss in enumerate(losses):
        text += point_line(
            index + 1, 10 * (index + 1), loss, loss + 0.5, levels[index] if levels else 0,
            relatives[index] if relatives else LOW, levels=values(**flags),
            **{name: given[index] for name, given in metrics.items()},
        )  # fmt: skip
    return text


def valid_line(epoch, updates, loss, subset="valid", **metrics):
    """As ``--log-format json`` has it."""
    stats = {"loss": f"{loss:g}", **metrics, "num_updates": f"{updates:g}"}
    record = {"epoch": epoch, **{f"{subset}_{name}": str(value) for name, value in stats.items()}}
    return f"2026-11-22 02:04:28 | INFO | {subset} | {json.dumps(record)}\n"


def train_line(epoch, updates, loss, **metrics):
    stats = {"loss": f"{loss:g}", **metrics, "num_updates": f"{updates:g}"}
    record = {"epoch": epoch, **{f"train_{name}": str(value) for name, value in stats.items()}, "train_wall": "3"}
    return f"2026-11-22 02:04:28 | INFO | train | {json.dumps(record)}\n"


DONE = "2026-11-22 02:04:29 | INFO | fairseq_cli.train | done training in 1.4 seconds\n"


def log(losses, done=True):
    """A plain fairseq run's log; ``losses`` are the validation's."""
    epochs = (
        valid_line(index, 10 * index, loss) + train_line(index, 10 * index, loss + 0.5)
        for index, loss in enumerate(losses, 1)
    )
    return "".join(epochs) + (DONE if done else "")


def write(folder, name, text, file="dsq.jsonl"):
    """A run's folder with this record, or log."""
    path = folder / name / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path.parent


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
        path = write(folder, name, record(flags, losses, levels, relatives))
        (path / "generate.out").write_text(
            f"D-1\t-0.1\ta sentence\nGenerate test with beam=4: BLEU4 = {bleu}, 60.0/40.0/30.0/20.0 (BP=1.000)\n"
        )
        paths.append(path)
    return paths
