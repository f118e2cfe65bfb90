"""What fairseq needs mended."""

import shutil

import pytest
from fairseq.file_io import PathManager

import fairseq_dsq  # noqa: F401  (mends it)


def test_a_copy_that_is_cut_short_leaves_the_checkpoint_that_was_there(tmp_path, monkeypatch):
    new, last = tmp_path / "checkpoint_1_20.pt", tmp_path / "checkpoint_last.pt"
    new.write_bytes(b"new" * 1000)
    last.write_bytes(b"old" * 1000)

    def cut_short(source, destination):
        with open(source, "rb") as whole, open(destination, "wb") as half:
            half.write(whole.read(1500))
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", cut_short)
        with pytest.raises(OSError, match="No space"):
            PathManager.copy(str(new), str(last), overwrite=True)
    assert last.read_bytes() == b"old" * 1000
    assert PathManager.copy(str(new), str(last), overwrite=True)
    assert last.read_bytes() == new.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_1_20.pt", "checkpoint_last.pt"]
