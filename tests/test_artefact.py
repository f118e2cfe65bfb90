"""What is made is whole or not there, and is used again only by who asks for just that."""

import json
import os

import pytest
from command import run

from fairseq_dsq import artefact

MADE_OF = {"--vocab": "4000", "train.de": "a" * 64}


@pytest.fixture
def made(tmp_path):
    folder = tmp_path / "data"
    with artefact.atomic(folder) as partial:
        partial.mkdir()
        (partial / "text").write_text("text")
        artefact.write(partial, MADE_OF)
    return folder


def test_the_same_is_found_and_what_is_not_there_is_not(made):
    assert artefact.check(made, MADE_OF)
    assert not artefact.check(made.with_name("other"), MADE_OF)
    made.with_name("empty").mkdir()
    assert not artefact.check(made.with_name("empty"), MADE_OF)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"--vocab": "8000", "train.de": "a" * 64}, "--vocab 4000, asked for 8000"),
        ({"--vocab": "4000", "train.de": "b" * 64}, "train.de aaaaaaaaaaaa..., asked for bbbbbbbbbbbb..."),
        ({"train.de": "a" * 64}, "--vocab 4000, asked for nothing"),
        ({**MADE_OF, "--seed": "2"}, "--seed nothing, asked for 2"),
    ],
)
def test_what_was_made_of_something_else_is_refused(made, asked, expected):
    with pytest.raises(ValueError) as stop:
        artefact.check(made, asked)
    assert str(stop.value) == f"{made}: made with {expected}; remove it or name another"


def test_what_another_version_made_is_refused(made, monkeypatch):
    before = artefact.version()
    monkeypatch.setattr(artefact, "version", lambda: "9.9")
    with pytest.raises(ValueError, match=f"made with fairseq_dsq {before}, asked for 9.9"):
        artefact.check(made, MADE_OF)


def test_what_does_not_say_what_made_it_is_refused(made):
    (made / "made.json").unlink()
    with pytest.raises(ValueError, match=r"data: does not say what made it \(no made.json\)"):
        artefact.check(made, MADE_OF)
    (made / "made.json").write_text("[")
    with pytest.raises(ValueError, match=r"made\.json: .*expected a JSON object"):
        artefact.check(made, MADE_OF)


def test_a_setting_that_grows_may_not_shrink(tmp_path):
    (tmp_path / "log").write_text("log")
    artefact.write(tmp_path / "log", {"--max-epoch": "8"})
    assert artefact.check(tmp_path / "log", {"--max-epoch": "12"}, ["--max-epoch"])
    for asked in ("7", "more"):
        with pytest.raises(ValueError, match=f"--max-epoch 8, asked for {asked}"):
            artefact.check(tmp_path / "log", {"--max-epoch": asked}, ["--max-epoch"])


def test_content_is_of_names_and_bytes_but_logs(made):
    before = artefact.content(made)
    (made / "preprocess.log").write_text("at noon")
    assert artefact.content(made) == before
    (made / "text").rename(made / "other")
    assert artefact.content(made) != before


def test_what_a_killed_command_left_is_no_artefact(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from fairseq_dsq import artefact\n"
        "with artefact.atomic(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert run(["python", "-c", code, str(tmp_path / "file")], tmp_path, os.environ)[0] == -9
    assert not (tmp_path / "file").exists()
    with artefact.atomic(tmp_path / "file") as partial:
        partial.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"


def test_a_failure_leaves_what_was_there(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(RuntimeError), artefact.atomic(tmp_path / "file") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def test_a_folder_is_for_one_command_at_a_time(tmp_path):
    refused = pytest.raises(ValueError, match="another command is at work there")
    with artefact.locked(tmp_path, wait=False), refused, artefact.locked(tmp_path, wait=False):
        pass
    with artefact.locked(tmp_path, wait=False):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a:b", "a,b", "a\\b", "a${b}", "a\nb"])
def test_a_path_that_fairseq_would_split_is_named(name):
    with pytest.raises(ValueError, match=r"--out: got .*, expected a path without"):
        artefact.check_path("--out", name)


@pytest.mark.parametrize("name", ["a b", "a[b]", "a'b", 'a"b', "a=b", "ä", "a$b", "a{b}", "(a)", "~a", "a*"])
def test_other_paths_are_taken(name):
    artefact.check_path("--out", name)


def test_a_stamp_is_json_beside_a_file_and_in_a_folder(made):
    assert json.loads((made / "made.json").read_text()) == {**MADE_OF, "fairseq_dsq": artefact.version()}
    artefact.write(made / "text", {"a": "b"})
    assert json.loads((made / "text.made.json").read_text())["a"] == "b"
