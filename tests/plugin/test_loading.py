"""A checkpoint runs nothing, and one that cannot be read is named in one line with the newest sound one beside it."""

import argparse
import ast
import os
from pathlib import Path

import fairseq
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.criterions import CRITERION_REGISTRY
from omegaconf import OmegaConf

from fairseq_dsq.errors import DSQError
from fairseq_dsq.plugin.loading import FREE_TEXT, ModelState, check_checkpoint, is_plain

RUNS = "__import__('os').system('touch ran') or [10,20]"


def write(path, model=None, **changes):
    """A checkpoint as fairseq writes it, with fields of the model's configuration."""
    config = {"model": argparse.Namespace(arch="transformer_dsq", data="bin (1)", lr=[0.1]), "task": {"data": "bin"}}
    for name, value in (model or {}).items():
        setattr(config["model"], name, value)
    state = {
        "args": None, "cfg": config, "model": {"weight": torch.arange(5000.0)}, "extra_state": {"train_iterator": {}},
        "optimizer_history": [{"optimizer_name": "A", "lr_scheduler_state": {}, "num_updates": 1}],
    }  # fmt: skip
    torch.save({**state, **changes}, path)
    return path


def refusal(path):
    with pytest.raises(DSQError) as stop:
        check_checkpoint(str(path))
    assert "\n" not in str(stop.value)
    assert str(stop.value).startswith(f"{path}: ")
    return str(stop.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    "text",
    [
        RUNS, f" \t{RUNS}", f"\n{RUNS}", "exit()", "[x for x in ()]", "lambda: 0", "f'{1}'", "a[0]", "(y := 1)",
        "9**9**9", "1 << 99", "[*x]", "${oc.env:HOME}", "'%s' % exit()", "-" * 10000 + "1",
    ],
)  # fmt: skip
def test_text_that_could_run_is_told_from_plain_values(text):
    assert not is_plain(text)


@pytest.mark.parametrize(
    "text",
    [
        "10000,20000", "(0.9, 0.98)", "[(512, 3)] * 4 + [(768, 3)]", "{'beam': 4}", '{"beam": 4, "lenpen": true}',
        "-1", "adam", "checkpoint_last.pt", "label_smoothed_cross_entropy", "True", "", "iwslt/bin:more", "@@ ",
        "en-de", "a b",
    ],
)  # fmt: skip
def test_plain_values_are_let_through(text):
    assert is_plain(text)


PLACES = {
    "cfg.model.adaptive_softmax_cutoff": lambda path: write(path, {"adaptive_softmax_cutoff": RUNS}),
    "cfg.model.nested.deep": lambda path: write(path, {"nested": {"deep": [("a", RUNS)]}}),
    "cfg.task.left_pad_source": lambda path: write(path, cfg={"model": {}, "task": {"left_pad_source": RUNS}}),
    "cfg.optimizer.adam_betas": lambda path: write(path, cfg=OmegaConf.create({"optimizer": {"adam_betas": RUNS}})),
    "args.decoder_attention": lambda path: write(path, cfg=None, args=argparse.Namespace(decoder_attention=RUNS)),
    "cfg.model.bytes": lambda path: write(path, {"bytes": RUNS.encode()}),
    "cfg.model.mixed": lambda path: write(path, {"mixed": "${cfg.task.data}"}),
    "cfg.task.dataset_impl": lambda path: write(path, cfg={"task": {"dataset_impl": "fasta", "data": "x; touch ran"}}),
    "cfg.task.post_save_script": lambda path: write(path, cfg={"task": {"post_save_script": "touch ran"}}),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_would_run_is_refused_wherever_it_stands(tmp_path, place):
    assert f"{place}: got " in refusal(PLACES[place](tmp_path / "c.pt"))


def test_paths_and_flags_of_this_package_may_look_like_anything(tmp_path):
    check_checkpoint(str(write(tmp_path / "c.pt", {"save_dir": "runs/a(1)", "dsq_levels": "[2,2,2,16] [16,4,4,16]"})))


def test_no_free_text_is_evaluated_by_fairseq():
    for path in Path(fairseq.__file__).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if "examples" in path.parts or "eval" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            name = getattr(getattr(node, "func", None), "id", getattr(getattr(node, "func", None), "attr", ""))
            if name in ("eval", "eval_str_list", "eval_str_dict", "eval_bool"):
                fields = {part.attr for argument in node.args for part in ast.walk(argument) if hasattr(part, "attr")}
                assert not fields & FREE_TEXT, f"{path}:{node.lineno}"


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_file_that_is_no_sound_checkpoint_is_named_with_the_newest_sound_one_beside_it(tmp_path):
    def damaged(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    whole = write(tmp_path / "whole.pt").read_bytes()
    write(tmp_path / "crash.pt", extra_state={"metrics": {}})  # newer, and nothing goes on from it
    write(tmp_path / "older.pt")
    os.utime(tmp_path / "older.pt", (1, 1))
    assert refusal(damaged("cut.pt", whole[:-3000])).startswith("is cut")
    flipped = damaged("flipped.pt", whole)
    flip(flipped, len(whole) // 2)
    assert refusal(flipped).startswith("is corrupt")
    assert refusal(damaged("empty.pt", b"")).startswith("is empty")
    assert refusal(damaged("text.pt", b"hello, world\n" * 9)).startswith("is cut or no checkpoint")
    torch.save({"embeddings.weight": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert refusal(tmp_path / "pytorch_model.bin").startswith("is no checkpoint of fairseq: it has no 'model'")
    torch.save([1], tmp_path / "list.pt")
    assert refusal(tmp_path / "list.pt").startswith("is no checkpoint of fairseq")
    assert refusal(write(tmp_path / "bare.pt", cfg=None)).startswith(
        "is no checkpoint of fairseq: it has neither 'cfg'"
    )
    for name in ("cut.pt", "flipped.pt", "empty.pt", "text.pt", "pytorch_model.bin", "list.pt", "bare.pt"):
        assert refusal(tmp_path / name).endswith(f"; the newest sound checkpoint beside it is {tmp_path / 'whole.pt'}")
    (tmp_path / "folder.pt").mkdir()
    assert refusal(tmp_path / "folder.pt") == "is a folder, expected a checkpoint"
    assert refusal(tmp_path / "missing.pt") == "No such file or directory"


def test_a_file_of_the_old_format_is_read_and_a_cut_one_named(tmp_path):
    state = torch.load(write(tmp_path / "c.pt"), weights_only=True)
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    check_checkpoint(str(tmp_path / "old.pt"))
    content = (tmp_path / "old.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    assert refusal(tmp_path / "cut.pt").startswith("is cut or no checkpoint")


@pytest.mark.parametrize("zipped", [True, False])
def test_of_any_damage_only_one_line_is_said(tmp_path, zipped):
    state = torch.load(write(tmp_path / "c.pt"), weights_only=True)
    state["model"] = {"weight": torch.arange(9.0)}
    (tmp_path / "damaged").mkdir()
    path = tmp_path / "damaged/c.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    random = torch.Generator().manual_seed(0)
    for _ in range(150):
        at = int(torch.randint(len(whole), (), generator=random))
        path.write_bytes(whole[:at])
        refusal(path)
        path.write_bytes(whole)
        flip(path, at)
        try:
            check_checkpoint(str(path))
        except DSQError as error:
            assert "\n" not in str(error)
    path.write_bytes(b"hello\n" * 9)
    refusal(path)


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_pickled_code_is_refused(tmp_path):
    assert "system, refused: a checkpoint must run no code" in refusal(write(tmp_path / "c.pt", extra_state=Code()))


def test_fairseq_reads_checkpoints_through_the_check(tmp_path):
    with pytest.raises(DSQError, match="adaptive_softmax_cutoff"):
        checkpoint_utils.load_model_ensemble_and_task(
            [str(write(tmp_path / "c.pt", {"adaptive_softmax_cutoff": RUNS}))]
        )
    with pytest.raises(DSQError, match="dsq_patince: no such flag"):
        checkpoint_utils.load_checkpoint_to_cpu(str(write(tmp_path / "d.pt")), {"model": {"dsq_patince": 3}})


def test_tensors_know_their_file_and_are_saved_without_it(tmp_path):
    state = checkpoint_utils.load_checkpoint_to_cpu(str(write(tmp_path / "c.pt")))
    assert isinstance(state["model"], ModelState)
    assert state["model"].file == str(tmp_path / "c.pt")
    torch.save(state["model"], tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    assert torch.equal(saved["weight"], torch.arange(5000.0))
    assert not hasattr(saved, "file")


@pytest.mark.parametrize("saved", ["DSQLabelSmoothedCrossEntropyCriterion", "LabelSmoothedCrossEntropyCriterion"])
def test_a_criterion_and_its_twin_have_one_name(tmp_path, saved):
    history = [{"criterion_name": saved, "optimizer_name": "A", "lr_scheduler_state": {}, "num_updates": 1}]
    state = checkpoint_utils.load_checkpoint_to_cpu(str(write(tmp_path / "c.pt", optimizer_history=history)))
    names = {CRITERION_REGISTRY[f"{prefix}label_smoothed_cross_entropy"].__name__ for prefix in ("", "dsq_")}
    assert {state["optimizer_history"][-1]["criterion_name"]} == names
