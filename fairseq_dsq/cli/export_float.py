"""Turn a checkpoint of a *_dsq architecture into one of the float architecture it was made from."""

from __future__ import annotations

import argparse
from pathlib import Path

from fairseq_dsq.criterions.dsq_criterion import PREFIX
from fairseq_dsq.flags import DEFAULTS, ENCODER_DEFAULTS, PROFILE_FIELD

SUFFIX = "_dsq"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="IN", help="checkpoint of a *_dsq architecture")
    parser.add_argument("output", type=Path, metavar="OUT", help="checkpoint to write, for plain fairseq")


def main(args: argparse.Namespace) -> int:
    import torch
    from fairseq import checkpoint_utils

    if not args.checkpoint.is_file():
        raise OSError(f"{args.checkpoint}: does not exist, expected a checkpoint")
    state = checkpoint_utils.load_checkpoint_to_cpu(str(args.checkpoint))
    model = state["cfg"]["model"]
    arch = str(getattr(model, "arch", "") or getattr(model, "_name", ""))
    if SUFFIX not in arch:
        raise ValueError(f"{args.checkpoint}: got architecture {arch!r}, expected a *{SUFFIX} one")
    for name in ("token_types", "layer_norm_eps"):
        value, own = getattr(model, name, ENCODER_DEFAULTS[name]), ENCODER_DEFAULTS[name]
        if value != own:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{args.checkpoint}: {flag}: got {value}, expected {own}: fairseq has no such float model")
    for name in ("arch", "_name"):
        if hasattr(model, name):
            setattr(model, name, str(getattr(model, name)).replace(SUFFIX, ""))
    for name in (*DEFAULTS, *ENCODER_DEFAULTS):
        if hasattr(model, name):
            delattr(model, name)
    criterion = state["cfg"]["criterion"]
    criterion["_name"] = str(criterion["_name"]).removeprefix(PREFIX)
    criterion.pop(PROFILE_FIELD, None)
    state["model"] = {key: value for key, value in state["model"].items() if not key.startswith("dsq.")}
    torch.save(state, args.output)
    print(f"wrote {args.output} ({model.arch})")
    return 0
