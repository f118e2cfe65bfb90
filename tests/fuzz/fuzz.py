"""Feeds what reads text, files and bytes with damaged input: ``python tests/fuzz/fuzz.py [N] [--seed S] [--target T]``.

The property: a value, or one of the errors that the reader promises, whose message is one line of at most 500
characters; never another exception, a crash, more than LIMIT_S seconds or more than LIMIT_BYTES of memory. Inputs are
valid ones, mutated; the i-th of a target depends on the seed, the target and i alone: ``--target T --only I`` runs one.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from report import samples

from fairseq_dsq import data_files, formats, record
from fairseq_dsq.cli import cost as cost_command
from fairseq_dsq.cost.hardware import load_hardware
from fairseq_dsq.cost.profiles import load_profile
from fairseq_dsq.formats import BlockFloat, FixedPoint, FormatOptions, definition
from fairseq_dsq.glue import TASKS, hf_vocabulary, tsv
from fairseq_dsq.plugin import probe
from fairseq_dsq.plugin.config import DSQConfig, add_args, defaults
from fairseq_dsq.plugin.export import export_float
from fairseq_dsq.precision import parse_levels, parse_q
from fairseq_dsq.report.runs import epoch_table, read_run
from fairseq_dsq.report.scores import judged_by, scores

ERRORS = (ValueError, OSError)
LONGEST_MESSAGE = 500
LIMIT_S = 10
LIMIT_BYTES = 4 << 30
# What parsers trip over: digits that int() or only isdigit() knows, numbers that overflow, nesting, separators.
AWKWARD = (
    "²", "٣", "1_6", "+4", "-0", "1e9", "1e999", "-1e999", "nan", "inf", "0x10", "0b1", "1" * 30, "9" * 400, "9" * 5000,
    "True", "None", "''", "[", "]", "[[", "{", "}", "(", "\0", "\n", "\r", "\t", "\x1b", "\u2028", "\ufeff", "é",
    "\U0001d7dc", ",", ":", "|", "=", "*", "&a", "*a", "!!python/object:os.system ''", "!!int x", "!!timestamp 9",
    "${oc.env:HOME}", "#", "'", '"', "\\", "\\N{x}", "%s", "{}", "-", "--", ".", "/", "../", " ", "  ", "null", "~",
    "?", "<<", "\ud800",
)  # fmt: skip
NESTING = ("[", "(", "{", "[{", "'", "((-", "a:\n  ", "- ", '{"a":', "!")


@dataclass(frozen=True)
class Target:
    """One reader: ``make`` an input, ``run`` it. ``share`` of all inputs are its."""

    share: int
    make: Callable[[random.Random], Any]
    run: Callable[[Any], object]


def mutated(rng: random.Random, text: str) -> str:
    """``text`` after one to four changes; one time in ten nothing of it is left, or nothing is changed."""
    for _ in range(rng.randrange(5)):
        kind, at = rng.randrange(9), rng.randrange(len(text) + 1)
        end = min(len(text), at + rng.randrange(1, 12))
        if kind == 0:
            text = text[:at] + text[end:]
        elif kind == 1:
            text = text[:at] + rng.choice(AWKWARD) + text[at:]
        elif kind == 2:
            text = text[:at] + rng.choice(AWKWARD) + text[end:]
        elif kind == 3:
            text = text[:at]
        elif kind == 4:
            text = text[:at] + text[at:end] * rng.randrange(2, 9) + text[end:]
        elif kind == 5:
            text = text[:at] + chr(rng.choice((rng.randrange(128), rng.randrange(0x3000)))) + text[at:]
        elif kind == 6:
            start = rng.randrange(len(text) + 1)
            text = text[:at] + text[start : start + 40] + text[at:]
        elif kind == 7 and rng.random() < 0.02:
            text = text[:at] + rng.choice(NESTING) * rng.choice((100, 3000, 200_000)) + text[at:]
        elif kind == 8 and rng.random() < 0.02:
            text = rng.choice(AWKWARD) * rng.choice((1, 2, 5000))
    return text


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """``data`` with some bytes flipped, cut out, put in or cut off."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randrange(1, 64)]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 16))
        elif kind == 3 and rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def text_of(*seeds: str) -> Callable[[random.Random], str]:
    return lambda rng: mutated(rng, rng.choice(seeds))


class Folder:
    """A folder in memory; every input is written under the same names."""

    def __init__(self) -> None:
        shared = Path("/dev/shm")
        self.path = Path(tempfile.mkdtemp(prefix="fuzz", dir=shared if shared.is_dir() else None))

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path


FOLDER = Folder()


def run_levels(case: tuple[str, str, FormatOptions]) -> None:
    for level in parse_levels(*case):
        assert parse_levels(str(level), *case[1:]) == (level,)


def run_format(text: str) -> None:
    fmt = formats.parse(text)
    assert formats.parse(str(fmt)) == fmt
    fmt.nbytes((3, 40))


def run_flag(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="fairseq-train", exit_on_error=False)
    add_args(parser)
    try:
        parser.parse_args(words)
    except SystemExit as stop:
        raise ValueError(str(stop)) from None


def flag(rng: random.Random) -> list[str]:
    takes_a_value = [(name, value) for name, value in defaults(DSQConfig).items() if not isinstance(value, bool)]
    name, value = rng.choice(takes_a_value)
    return [f"--{name.replace('_', '-')}={mutated(rng, str(value))}"]


def run_cost(words: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    cost_command.add_arguments(parser)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            cost_command.main(parser.parse_args(words))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None


def cost(rng: random.Random) -> list[str]:
    name, value = rng.choice(
        [("--layer", "512x64x32"), ("--trajectory", "2,2,2,16:12 16,4,4,16:3"), ("--precision", "[2,2,2,16]"),
         ("--profile", "paper"), ("--format", "bfp")]
    )  # fmt: skip
    return [f"{name}={mutated(rng, value)}"]


def configs(kind: str) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted((data_files.root() / kind).glob("*.yaml"))]


def packed(rng: random.Random) -> Any:
    """Any bytes for a shape and format: mostly as many as they take."""
    bits = rng.randrange(2, 33)
    fmt: BlockFloat | FixedPoint = rng.choice(
        [BlockFloat(bits), BlockFloat(bits, rng.randrange(1, 40)), FixedPoint(bits), FixedPoint(bits, bits // 2)]
    )
    shape = [rng.randrange(1, 40) for _ in range(rng.randrange(1, 4))]
    if rng.random() < 0.05:
        shape[rng.randrange(len(shape))] = 0
    dim = rng.randrange(-len(shape), len(shape))
    nbytes = fmt.nbytes(shape, dim)
    if rng.random() < 0.2:
        nbytes = max(0, nbytes + rng.choice((-nbytes, -1, 1, 7, nbytes)))
    data = rng.randbytes(nbytes)
    if rng.random() < 0.3:
        data = bytes(rng.choice((0, 255)) if rng.random() < 0.5 else byte for byte in data)
    return data, shape, dim, fmt


def run_packed(case: Any) -> None:
    data, shape, dim, fmt = case
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    right = fmt.nbytes(shape, dim) == len(data)
    try:
        values = torch.ops.fairseq_dsq.unpack(tensor, shape, dim, str(fmt), torch.float32)
    except ValueError:
        assert not right, "bytes of the right length were refused"
        raise
    assert right, "bytes of a wrong length were taken"
    expected = definition.unpack(tensor, shape, fmt, dim, torch.float32)
    assert torch.equal(values.view(torch.int32)[~values.isnan()], expected.view(torch.int32)[~expected.isnan()])
    assert torch.equal(values.isnan(), expected.isnan())


def logs(rng: random.Random) -> str | bytes:
    """A log, cut, shuffled or damaged."""
    return damaged(rng, rng.choice(LOGS))


def records(rng: random.Random) -> str | bytes:
    """A training's record, likewise."""
    return damaged(rng, rng.choice(RECORDS))


def damaged(rng: random.Random, text: str) -> str | bytes:
    """``text`` with its lines shuffled, one of them changed, or bytes of it."""
    lines = text.splitlines(keepends=True)
    if rng.random() < 0.3:
        rng.shuffle(lines)
    if rng.random() < 0.5:
        at = rng.randrange(len(lines))
        lines[at] = mutated(rng, lines[at])
        return "".join(lines)
    return mutated_bytes(rng, "".join(lines).encode())


def run_log(content: str | bytes, name: str = "train.log") -> None:
    run = read_run(FOLDER.write(name, content))
    epoch_table(run.epochs)
    found = scores(run)
    judged_by(found)


def run_score(content: str) -> None:
    path = FOLDER.path / "run"
    path.mkdir(exist_ok=True)
    (path / record.NAME).write_text(RECORDS[0])
    (path / "score.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    for value in scores(read_run(path)).values():
        assert value - value == 0, f"a score of {value}"


def table(rng: random.Random) -> tuple[str, str | bytes]:
    name = rng.choice(list(TABLES))
    text = TABLES[name]
    return name, mutated(rng, text) if rng.random() < 0.7 else mutated_bytes(rng, text.encode())


def run_table(case: tuple[str, str | bytes]) -> None:
    name, content = case
    for row in tsv.read(TASKS[name], FOLDER.write("train.tsv", content)).rows:
        assert all(row.sentences)
        if TASKS[name].is_regression:
            assert 0 <= float(row.label) <= TASKS[name].max_score


def vocabulary(rng: random.Random) -> tuple[str, str]:
    name = rng.choice(list(VOCABULARIES))
    return name, mutated(rng, VOCABULARIES[name])


def run_vocabulary(case: tuple[str, str]) -> None:
    folder = FOLDER.path / "vocabulary"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, text in VOCABULARIES.items():
        if name.split(".")[0] in case[0] or case[0].startswith("tokenizer_config"):
            (folder / name).write_text(text, encoding="utf-8")
    (folder / case[0]).write_bytes(case[1].encode("utf-8", "surrogatepass"))
    words = hf_vocabulary.read(folder)
    words.dictionary(words.rows(40)[-1] + 40)


def run_checkpoint(data: bytes) -> None:
    path = FOLDER.write("checkpoint.pt", data)
    with contextlib.redirect_stdout(io.StringIO()):
        export_float(path, FOLDER.path / "exported.pt")


def checkpoint() -> bytes:
    """A small one, as fairseq writes it."""
    flags = argparse.Namespace(arch="transformer_dsq", _name="transformer_dsq", **defaults(DSQConfig))
    state = {
        "args": None,
        "cfg": {"_name": None, "model": flags, "criterion": {"_name": "dsq_cross_entropy"}, "common": {}},
        "model": {"encoder.fc1.weight": torch.ones(3, 4), "dsq.level": torch.tensor(1)},
        "optimizer_history": [{"best_loss": 3.0, "num_updates": 3}], "extra_state": {"epoch": 1},
        "last_optimizer_state": {}, "task_state": {},
    }  # fmt: skip
    path = FOLDER.path / "sample.pt"
    torch.save(state, path)
    return path.read_bytes()


RECORDS = [
    samples.record(samples.DSQ, [7.5, 6.25, 6.0], [0, 0, 1], [samples.LOW, samples.LOW, samples.HIGH], bleu=[1, 2, 3]),
    samples.start_line(4, patience=2) + samples.point_line(1, 5, 7.5, ended=False) + samples.point_line(1, 9)
    + samples.start_line(4, 9, 2, patience=2, max_update=30) + samples.point_line(2, 18, float("nan")),
]  # fmt: skip
LOGS = [
    samples.log([7.5, 6.25, 6.0]),
    samples.valid_line(1, 12, 6.5, bleu="12.5") + samples.train_line(1, 12, 7.5, dsq_level="0", dsq_arithmetic="100")
    + "Generate test with beam=4: BLEU4 = 35.1, 60.0/40.0/30.0/20.0 (BP=1.000)\ndone training in 3 seconds\n",
]  # fmt: skip
SCORES = (
    '{"name": "BLEU", "score": 35.4, "signature": "nrefs:1"}', '[{"name": "BLEU", "score": 12}]',
    '{"name": "GLUE", "scores": {"accuracy": 88.1, "f1": 1.5, "matthews": 3, "accuracy_mm": 10}}',
    "BLEU = 35.44 60.1/40.2/30.1/20.2 (BP = 1.000)", "BLEU|nrefs:1|case:mixed = 12.5 60/40/30/20",
)  # fmt: skip
TABLES = {
    "CoLA": "gj04\t1\t\tOur friends won't buy this.\ngj04\t0\t*\tThey drank the pub.\n",
    "STS-B": "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\tA plane.\tAn air plane.\t5.000\n1\tx\tA.\tB\t0.25\n",
    "RTE": "index\tsentence1\tsentence2\tlabel\n0\tNo weapons.\tWeapons.\tnot_entailment\n1\tA b\tB\tentailment\n",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tHow?\tWhy?\t0\n2\t3\t4\tA\tB\t1\n",
}
VOCABULARIES = {
    "vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\n##ing\nwalk\n",
    "vocab.json": '{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a": 5, "b": 6, "ab": 7}',
    "merges.txt": "#version: 0.2\na b\n",
    "tokenizer_config.json": '{"do_lower_case": true, "cls_token": "[CLS]", "mask_token": {"content": "[MASK]"}}',
    "tokenizer.json": '{"model": {"type": "WordPiece", "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, '
    '"[MASK]": 4, "a": 5}}, "added_tokens": [{"content": "x", "id": 6}], "normalizer": {"lowercase": true}}',
}
BAD_YAML = [
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b]\n", "name: !!python/name:os.system\n",
    "name: x\n---\nname: y\n", "1: 2\n[1, 2]: 3\n", "name: ${name}\n", "name: 2001-99-99\n", "? {a: b}\n: c\n",
]  # fmt: skip


def options(rng: random.Random) -> FormatOptions:
    return FormatOptions(rng.random() < 0.3, rng.choice(formats.FIXED_SCALES))


def levels(rng: random.Random) -> tuple[str, str, FormatOptions]:
    text = rng.choice(("[2,2,2,16] [16,4,4,16]", "[2,2,2,16]", "4,4,4,16 16,4,4,16", "[32,32,32,32]", "[8, 8,8 ,8]"))
    return mutated(rng, text), rng.choice(("bfp", "bfp", "fixed", "float32", "none")), options(rng)


def yaml_target(share: int, kind: str, load: Callable[[str], object]) -> Target:
    return Target(share, text_of(*configs(kind) * 3, *BAD_YAML), lambda text: load(str(FOLDER.write("own.yaml", text))))


def run_hardware(path: str) -> None:
    hardware = load_hardware(path)
    assert 0 < hardware.macs_per_s(8) < float("inf") and 0 < hardware.bytes_per_s < float("inf")


def targets() -> dict[str, Target]:
    whole = checkpoint()
    return {
        "levels": Target(40_000, levels, run_levels),
        "q": Target(18_000, text_of("[2,2,2,16]", "2,2,2,16", "[16, 4, 4, 16]"), parse_q),
        "format": Target(12_000, text_of("bfp4", "bfp4/32", "fixed8", "fixed8.4", "float32"), run_format),
        "flag": Target(6_000, flag, run_flag),
        "cost": Target(200, cost, run_cost),
        "profile": yaml_target(400, "cost", load_profile),
        "hardware": yaml_target(400, "hardware", run_hardware),
        "model": yaml_target(400, "models", probe.find_model),
        "record": Target(7_000, records, lambda content: run_log(content, record.NAME)),
        "log": Target(3_000, logs, run_log),
        "score": Target(2_500, text_of(*SCORES), run_score),
        "packed": Target(2_500, packed, run_packed),
        "table": Target(2_500, table, run_table),
        "vocabulary": Target(1_000, vocabulary, run_vocabulary),
        "checkpoint": Target(300, lambda rng: mutated_bytes(rng, whole), run_checkpoint),
    }


class TooLong(Exception):
    """An input took more than LIMIT_S seconds."""


def _too_long(*_: object) -> None:
    raise TooLong(f"more than {LIMIT_S} s")


def problem(target: Target, given: Any) -> str | None:
    """What an input does that it should not; None if the property holds."""
    signal.alarm(LIMIT_S)
    try:
        target.run(given)
    except ERRORS as error:
        message = str(error)
        if "\n" in message or "\r" in message:
            return f"a message of more than one line: {message[:100]!r}"
        if len(message) > LONGEST_MESSAGE:
            return f"a message of {len(message)} characters: {message[:100]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = []
        trace = error.__traceback__
        while trace is not None:
            frames.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
            trace = trace.tb_next
        return f"{type(error).__name__}: {str(error)[:200]} ({' '.join(frames[-4:])})"
    finally:
        signal.alarm(0)
    return None


def fuzz(name: str, target: Target, seed: int, indices: range) -> tuple[int, dict[str, tuple[int, Any]]]:
    """How many inputs broke the property, and the first input (index, value) of each kind of problem."""
    count, kinds = 0, dict[str, tuple[int, Any]]()
    for index in indices:
        given = target.make(random.Random(f"{seed}/{name}/{index}"))
        found = problem(target, given)
        if found is not None:
            count += 1
            kinds.setdefault(found, (index, given))
    return count, kinds


def limit_memory() -> None:
    """More than LIMIT_BYTES on top of what is held now ends in MemoryError."""
    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + LIMIT_BYTES, resource.RLIM_INFINITY))


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz.sh", description=(__doc__ or "").partition(":")[0])
    parser.add_argument(
        "count", nargs="?", type=int, default=1_000_000, metavar="N", help="inputs (default: a million)"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="what the inputs depend on (default: 1)")
    parser.add_argument("--target", metavar="T", help="one target alone (default: all)")
    parser.add_argument("--only", type=int, metavar="I", help="the target's I-th input alone")
    args = parser.parse_args()
    faulthandler.enable()  # a crash of a kernel shows where
    signal.signal(signal.SIGALRM, _too_long)
    torch.set_num_threads(1)
    chosen = {name: target for name, target in targets().items() if args.target in (None, name)}
    if not chosen:
        parser.error(f"--target: got {args.target!r}, expected one of {', '.join(targets())}")
    limit_memory()
    shares = sum(target.share for target in chosen.values())
    total = failed = 0
    begun = time.monotonic()
    try:
        for name, target in chosen.items():
            count = -(-args.count * target.share // shares)
            indices = range(count) if args.only is None else range(args.only, args.only + 1)
            print(f"{name:12s}", end=" ", flush=True)  # before it, so that a crash is somebody's
            start = time.monotonic()
            bad, kinds = fuzz(name, target, args.seed, indices)
            print(f"{len(indices):8d} inputs {bad:6d} failures {time.monotonic() - start:7.1f} s", flush=True)
            for found, (index, given) in list(kinds.items())[:8]:
                print(f"    --target {name} --only {index}: {found}\n        {repr(given)[:120]}")
            total, failed = total + len(indices), failed + bad
    finally:
        shutil.rmtree(FOLDER.path, ignore_errors=True)
    print(f"{total} inputs, {failed} failures, seed {args.seed}, {time.monotonic() - begun:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
