"""Where a task's files are found, and what a download is turned into; files stand in for the public addresses."""

import dataclasses
import hashlib
import tarfile
import zipfile

import pytest

from fairseq_dsq.glue import TASKS, encoder, files, find_task
from fairseq_dsq.glue.tasks import Archive


def published(path):
    return Archive(path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("DSQ_DATA", raising=False)


def test_train_or_its_subset_and_the_development_sets_that_are_there(tmp_path):
    for name in ("train_subset.tsv", "dev_matched.tsv"):
        (tmp_path / name).touch()
    task = TASKS["MNLI"]
    found = files.find(task, tmp_path, tmp_path)
    assert (found.train, found.dev) == (tmp_path / "train_subset.tsv", {"": tmp_path / "dev_matched.tsv"})
    for name in ("train.tsv", "dev_mismatched.tsv"):
        (tmp_path / name).touch()
    found = files.find(task, tmp_path, tmp_path)
    assert found.train == tmp_path / "train.tsv"
    assert found.dev == {"": tmp_path / "dev_matched.tsv", "_mismatched": tmp_path / "dev_mismatched.tsv"}


def test_dsq_data_is_looked_at_first(tmp_path, monkeypatch):
    folder = tmp_path / "glue/RTE"
    folder.mkdir(parents=True)
    monkeypatch.setenv("DSQ_DATA", str(tmp_path))
    with pytest.raises(OSError, match=r"DSQ_DATA: .*glue/MRPC does not exist, expected MRPC's TSV files; unset"):
        files.find(TASKS["MRPC"], None, tmp_path)
    with pytest.raises(OSError, match=r"glue/RTE: has no train\.tsv or train_subset\.tsv, expected RTE's training set"):
        files.find(TASKS["RTE"], None, tmp_path)
    (folder / "train.tsv").touch()
    with pytest.raises(OSError, match=r"glue/RTE: has no dev\.tsv, expected RTE's development set"):
        files.find(TASKS["RTE"], None, tmp_path)


def test_a_zip_is_fetched_once_and_only_what_is_needed_kept(tmp_path):
    archive = tmp_path / "QQP-clean.zip"
    with zipfile.ZipFile(archive, "w") as content:
        for name in ("train.tsv", "dev.tsv", "test.tsv", "original/all.tsv"):
            content.writestr(f"QQP/{name}", name)
    task = dataclasses.replace(TASKS["QQP"], archive=published(archive))
    downloads = tmp_path / "downloads"
    found = files.find(task, None, downloads)
    archive.unlink()
    assert files.find(task, None, downloads) == found
    assert {path.relative_to(downloads).as_posix() for path in downloads.rglob("*.*")} == {
        "QQP/train.tsv",
        "QQP/dev.tsv",
    }
    assert found.dev[""].read_text() == "dev.tsv"


def test_mrpc_is_split_by_the_published_ids(tmp_path, monkeypatch):
    header, rows = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n", ["1\t7\t8\ta\tb\n", "0\t8\t7\tc\td\n"]
    corpus, ids = tmp_path / "msr_paraphrase_train.txt", tmp_path / "ids.tsv"
    corpus.write_text(header + "".join(rows))
    ids.write_text("8\t7\n")
    monkeypatch.setattr(files, "MRPC_DEV_IDS", published(ids))
    task = dataclasses.replace(TASKS["MRPC"], archive=published(corpus))
    found = files.find(task, None, tmp_path / "downloads")
    assert found.train.read_text() == header + rows[0]
    assert found.dev[""].read_text() == header + rows[1]


def test_a_download_that_fails_says_what_to_do(tmp_path):
    task = dataclasses.replace(TASKS["RTE"], archive=Archive((tmp_path / "RTE.zip").as_uri(), "0"))
    with pytest.raises(OSError, match=r"RTE\.zip: .*give its folder by --data, or set DSQ_DATA to .* holds glue/RTE"):
        files.find(task, None, tmp_path / "downloads")


def test_a_task_is_named_in_any_case_and_an_unknown_one_refused():
    assert find_task("sst-2") is TASKS["SST-2"]
    with pytest.raises(ValueError, match="got 'SNLI', expected one of CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE"):
        find_task("SNLI")


def test_a_published_encoder_is_fetched_once(tmp_path, monkeypatch):
    source = tmp_path / "roberta.base"
    source.mkdir()
    for name in ("model.pt", "dict.txt"):
        (source / name).touch()
    with tarfile.open(tmp_path / "roberta.base.tar.gz", "w:gz") as content:
        content.add(source, "roberta.base")
    monkeypatch.setattr(encoder, "_MODELS_URL", tmp_path.as_uri() + "/")
    found = encoder.find("roberta.base", tmp_path / "downloads")
    assert found.folder == tmp_path / "downloads/roberta.base"
    assert found.arch_flags() == ["--arch", "roberta_dsq"]
    (tmp_path / "roberta.base.tar.gz").unlink()
    assert encoder.find("roberta.base", tmp_path / "downloads") == found
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["roberta.base"]


def test_a_download_that_is_no_archive_is_named(tmp_path, monkeypatch):
    (tmp_path / "roberta.base.tar.gz").write_text("<html>")
    monkeypatch.setattr(encoder, "_MODELS_URL", tmp_path.as_uri() + "/")
    with pytest.raises(ValueError, match=r"roberta\.base\.tar\.gz: .*expected a \.tar\.gz archive of the folder"):
        encoder.find("roberta.base", tmp_path / "downloads")
    assert not list((tmp_path / "downloads").iterdir())
