"""Is a training to be trusted with a week of machine time?

    soak.sh kill N [--ranks R] [--seed S] [--out DIR]
        SIGKILL a training at N random moments (while it starts, in a step, a validation, a checkpoint's write), resume
        it each time, and hold what it ends with to an undisturbed training's: parameters, optimizer, precision level
        and counters of the schedule, learning rate, and its record (of every validation, losses, level and costs), bit
        for bit. A training that has ended is followed by one of another seed until N kills are done.
    soak.sh minutes M [--ranks R] [--seed S] [--out DIR]
        train for M minutes; resident memory and open file descriptors have to stay flat.

DIR (default: runs/soak/kill-R-S, runs/soak/minutes-R-S) keeps what was done: the same command goes on where it was
stopped. The result is DIR/result.json; the exit code is 1 where something differed or grew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from distributed import Workers

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 6  # of 6 updates, or 3 with two ranks; a checkpoint every second update, each after a validation
# What the log says when the next phase begins. Until the first of them, a training starts.
PHASES = {
    "Start iterating over samples": "step",
    "begin validation on": "validation",
    "Preparing to save checkpoint": "checkpoint",
    "Saved checkpoint": "step",
}
# After which a kill comes, and for how many seconds at most it waits then: as long as the phase takes on a CPU.
MOMENTS = {
    "start": (None, 5.0),
    "step": ("Saved checkpoint", 0.05),
    "validation": ("begin validation on", 0.1),
    "checkpoint": ("Preparing to save checkpoint", 0.015),
}
MOST_CHECKPOINTS = 6  # between two kills
SAMPLE_S = 2.0
# The most of the last fifth of the samples over that of the fifth after the first tenth. Each epoch and validation has
# a process that loads data, whose descriptors are closed whenever Python collects garbage.
MOST_GROWTH = {"MiB": 1.02, "descriptors": 1.5}


class Soak:
    """A folder with a small corpus, trainings and the state of a soak, which is written whole after every step."""

    def __init__(self, folder: Path, ranks: int):
        self.folder = folder
        self.ranks = ranks
        self.state_file = folder / "state.json"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "data.done").exists():
            _run("fairseq-dsq", "corpus", folder / "text", "--train", 240, "--valid", 24, "--test", 24)
            prefixes = (f"--{name}pref={folder / 'text' / name}" for name in ("train", "valid", "test"))
            _run("fairseq-preprocess", "-s", "de", "-t", "en", *prefixes, "--destdir", folder / "data")
            (folder / "data.done").touch()

    def read_state(self) -> dict[str, Any]:
        """What was done; empty at first."""
        return json.loads(self.state_file.read_text()) if self.state_file.exists() else {}

    def write(self, path: Path, value: Any) -> None:
        """As JSON, whole or not at all."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(value, indent=1) + "\n")
        part.replace(path)

    def discard(self, save_dir: Path) -> None:
        """Forget a training, if there is one."""
        shutil.rmtree(save_dir, ignore_errors=True)
        save_dir.with_suffix(".log").unlink(missing_ok=True)

    def start(self, save_dir: Path, seed: int, log: IO[bytes], epochs: int = EPOCHS) -> Workers:
        """A training that goes on from ``save_dir``; rank 0's output is in a pipe, that of the others in ``log``."""
        return Workers(
            [
                "fairseq-train", str(self.folder / "data"), "--user-dir", str(ROOT / "fairseq_dsq"),
                "--arch", "transformer_dsq", "--encoder-layers", "1", "--decoder-layers", "1",
                "--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "48", "--encoder-attention-heads", "2",
                "--decoder-attention-heads", "2", "--share-decoder-input-output-embed", "--dropout", "0.1",
                "--criterion", "dsq_label_smoothed_cross_entropy", "--optimizer", "adam", "--lr", "5e-3",
                "--dsq-levels", "[2,2,2,16] [4,4,4,16] [16,4,4,16]", "--dsq-patience", "3", "--dsq-min-delta", "0.5",
                "--dsq-rounding", "stochastic" if seed % 2 else "nearest", "--max-tokens", "600", "--seed", str(seed),
                "--max-epoch", str(epochs), "--update-epoch-batch-itr", "True", "--save-interval-updates", "2",
                "--keep-interval-updates", "2", "--keep-last-epochs", "1", "--save-dir", str(save_dir), "--cpu",
                "--log-format", "json", "--log-interval", "1",
            ],
            self.ranks,
            output=subprocess.PIPE,
            others_output=log,
        )  # fmt: skip

    def train(self, save_dir: Path, seed: int) -> None:
        """To its end.

        Raises:
            RuntimeError: it failed.
        """
        with open(save_dir.with_suffix(".log"), "ab") as log:
            workers = self.start(save_dir, seed, log)
            for line in _output(workers):
                log.write(line)
            code = workers.wait()
        if code:
            raise RuntimeError(f"a training failed that nobody killed, see {log.name}")


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _output(workers: Workers) -> IO[bytes]:
    output = workers.processes[0].stdout
    assert output is not None
    return output


def kill_once(soak: Soak, save_dir: Path, seed: int, chance: random.Random) -> tuple[str, int] | None:
    """Train on and kill at a random moment; the phase that was hit and the rank, None if training ended before.

    Raises:
        RuntimeError: the training failed before it was killed.
    """
    moment = chance.choice(list(MOMENTS))
    text, seconds = MOMENTS[moment]
    countdown = chance.randrange(1, MOST_CHECKPOINTS)
    delay = chance.uniform(0, seconds)
    victim = chance.randrange(soak.ranks)
    with open(save_dir.with_suffix(".log"), "ab") as log:
        workers = soak.start(save_dir, seed, log)
        lines: list[bytes] = []
        if text is None:
            countdown = 0
        else:
            for line in _output(workers):
                lines.append(line)
                countdown -= text in line.decode(errors="replace")
                if not countdown:
                    break
        killed = not countdown
        if killed:
            time.sleep(delay)
            workers.processes[victim].kill()
        code = workers.wait()  # ends the other ranks
        lines += _output(workers)  # what was in the pipe tells the phase
        log.writelines([*lines, b"\n"])  # the last line may have been cut
    if not code:
        return None
    if not killed:
        raise RuntimeError(f"a training failed that nobody killed, with exit code {code}, see {log.name}")
    marks = (name for line in reversed(lines) for mark, name in PHASES.items() if mark in line.decode(errors="replace"))
    return next(marks, "start"), victim


def recorded(save_dir: Path) -> list[dict[str, Any]]:
    """The lines of a training's record, but for times and for where it was killed."""
    from fairseq_dsq import record

    lines = (vars(line) for line in record.read(save_dir / record.NAME) if isinstance(line, record.Point))
    return [{name: value for name, value in line.items() if name != "wall_s"} for line in lines]


def differences(folder: Path, reference: Path) -> list[str]:
    """What differs between two trainings, their checkpoints and records, but time; empty if nothing does."""
    from fairseq.checkpoint_utils import load_checkpoint_to_cpu

    import fairseq_dsq  # noqa: F401  (lets torch load the checkpoints)

    def state(save_dir: Path) -> dict[str, Any]:
        checkpoint = load_checkpoint_to_cpu(str(save_dir / "checkpoint_last.pt"))
        extra = checkpoint["extra_state"]
        return {
            "model": checkpoint["model"],
            "best model": load_checkpoint_to_cpu(str(save_dir / "checkpoint_best.pt"))["model"],
            "optimizer": checkpoint["last_optimizer_state"],
            "history": checkpoint["optimizer_history"][-1],
            **{key: extra.get(key) for key in ("train_iterator", "val_loss", "best")},
        }

    checkpoints = _compare(state(folder), state(reference), "checkpoint")
    return [*checkpoints, *_compare(recorded(folder), recorded(reference), "record")]


def _compare(a: Any, b: Any, name: str) -> Iterator[str]:
    import torch

    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from _compare(a[key], b[key], f"{name} {key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, pair in enumerate(zip(a, b, strict=True)):
            yield from _compare(*pair, f"{name} {index}")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or not torch.equal(a, b):
            yield f"{name}: other values"
    elif a != b:
        yield f"{name}: {a!r} for {b!r}"


def kill(soak: Soak, count: int, seed: int) -> int:
    """Kill and resume ``count`` times; returns the exit code."""
    state: dict[str, Any] = soak.read_state() or {"kills": [], "rounds": [], "seconds": 0.0}
    before, started = state["seconds"], time.monotonic()
    while True:
        number = len(state["rounds"])
        round_seed = seed + number
        reference, folder = soak.folder / f"undisturbed-{number}", soak.folder / f"killed-{number}"
        if state.get("reference") != number:
            soak.discard(reference)  # begun, and cut short with this command
            soak.train(reference, round_seed)
            state["reference"] = number
            soak.write(soak.state_file, state)
        ended = len(state["kills"]) >= count
        while not ended:
            hit = kill_once(soak, folder, round_seed, random.Random(f"{seed} {len(state['kills'])}"))
            if hit is not None:
                state["kills"].append({"round": number, "phase": hit[0], "rank": hit[1]})
                print(f"kill {len(state['kills'])} of {count}: training {number}, {hit[0]}, rank {hit[1]}", flush=True)
            ended = hit is None or len(state["kills"]) >= count
            state["seconds"] = before + time.monotonic() - started
            soak.write(soak.state_file, state)
        soak.train(folder, round_seed)
        found = differences(folder, reference)
        kills = sum(kill["round"] == number for kill in state["kills"])
        state["rounds"].append({"seed": round_seed, "kills": kills, "differences": found})
        print(f"training {number}, killed {kills} times: {found[0] if found else 'equal, bit for bit'}", flush=True)
        state["seconds"] = before + time.monotonic() - started
        soak.write(soak.state_file, state)
        if not found:
            soak.discard(folder)
            soak.discard(reference)
        if len(state["kills"]) >= count:
            break
    phases = [kill["phase"] for kill in state["kills"]]
    differing = sum(bool(finished["differences"]) for finished in state["rounds"])
    result = {
        "kills": len(phases),
        "in": {phase: phases.count(phase) for phase in MOMENTS},
        "ranks": soak.ranks,
        "trainings": len(state["rounds"]),
        "trainings that differ": differing,
        "minutes": round(state["seconds"] / 60, 1),
    }
    soak.write(soak.folder / "result.json", result)
    print(json.dumps(result))
    return int(differing > 0)


def minutes(soak: Soak, duration: float, seed: int) -> int:
    """Train for that many minutes and sample memory and descriptors; returns the exit code."""
    samples: list[list[float]] = soak.read_state().get("samples", [])
    begun = samples[-1][0] if samples else 0.0
    log = open(soak.folder / "run.log", "ab")  # noqa: SIM115  (until the process ends)
    workers = soak.start(soak.folder / "run", seed, log, epochs=10**6)
    copy = subprocess.Popen(["cat"], stdin=_output(workers), stdout=log)
    process, started = workers.processes[0], time.monotonic()
    first = len(samples)
    try:
        while (elapsed := begun + time.monotonic() - started) < duration * 60:
            time.sleep(SAMPLE_S)
            if process.poll() is not None:
                raise RuntimeError(f"the training ended, with exit code {workers.wait()}, see {log.name}")
            if not (soak.folder / "run" / "checkpoint_last.pt").exists():
                started = time.monotonic()  # it still starts
                continue
            samples.append([round(elapsed, 1), *_resources(process.pid)])
            if len(samples) % 30 == 0:
                soak.write(soak.state_file, {"samples": samples})
                print("{:.0f} s: {:.1f} MiB resident, {:.0f} descriptors".format(*samples[-1]), flush=True)
    finally:
        workers.end()
        copy.wait()
        log.close()
    soak.write(soak.state_file, {"samples": samples})
    with open(soak.folder / "samples.txt", "w") as table:
        table.write("seconds MiB descriptors\n")
        table.writelines(f"{seconds} {mib:.1f} {descriptors:.0f}\n" for seconds, mib, descriptors in samples)
    own = samples[first:]  # a resumed soak is a new process, which is held to itself
    tenth = max(1, len(own) // 10)
    result: dict[str, Any] = {"minutes": duration, "samples": len(samples), "ranks": soak.ranks}
    flat = True
    for column, (name, growth) in enumerate(MOST_GROWTH.items(), 1):
        early, late = (max(sample[column] for sample in part) for part in (own[tenth : 3 * tenth], own[-2 * tenth :]))
        flat &= late <= early * growth
        result[name] = {"early": early, "late": late}
    result["flat"] = flat
    soak.write(soak.folder / "result.json", result)
    print(json.dumps(result))
    return int(not flat)


def _resources(pid: int) -> tuple[float, float]:
    """Resident memory in MiB, open file descriptors."""
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return round(resident, 1), len(os.listdir(f"/proc/{pid}/fd"))


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="soak.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("kill", "minutes"))
    parser.add_argument("amount", metavar="N", help="kills, or minutes")
    parser.add_argument("--ranks", default="1", help="workers (default: 1)")
    parser.add_argument("--seed", default="1", help="of the first training and of the moments (default: 1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the soak is kept")
    args = parser.parse_args(argv)
    for name, flag in (("amount", "N"), ("ranks", "--ranks"), ("seed", "--seed")):
        text = getattr(args, name)
        if not text.isdecimal() or int(text) < 1:
            print(f"soak.sh: error: {flag}: got {text!r}, expected an integer >= 1", file=sys.stderr)
            return 2
        setattr(args, name, int(text))
    folder = (args.out or ROOT / "runs" / "soak" / f"{args.what}-{args.ranks}-{args.seed}").resolve()
    try:
        soak = Soak(folder, args.ranks)
        return (kill if args.what == "kill" else minutes)(soak, args.amount, args.seed)
    except RuntimeError as error:
        print(f"soak.sh: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
