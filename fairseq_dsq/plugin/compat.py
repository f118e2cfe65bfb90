"""What fairseq needs to run with a current PyTorch and numpy, and to find this package imported.

torch >= 2.6 loads files with ``weights_only=True`` and refuses what fairseq's checkpoints hold beside tensors. The
classes below are allow-listed; the safety of ``weights_only`` stays on.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import logging
import os
import tarfile
import types
import typing
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import omegaconf
import torch
from omegaconf import base, nodes

from fairseq_dsq.errors import DSQError


def quiet_fairseq() -> None:
    """Drop what is logged whatever is run: advice to install tensorboardX (training itself says so), Hydra's steps."""
    logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)
    logging.getLogger("hydra").setLevel(logging.WARNING)  # debug lines of every configuration it composes


def allow_checkpoint_classes() -> None:
    """Let torch.load read fairseq's checkpoints: argparse and OmegaConf configurations and numpy scalars and arrays.

    And what fairseq puts in a tensor's place when the first worker sends a checkpoint to the others.
    """
    from fairseq.distributed.utils import _TensorPlaceholder  # after quiet_fairseq: importing fairseq logs

    # numpy 1 and 2 name the modules of these two functions differently.
    reconstruct_array = np.zeros(1).__reduce__()[0]
    reconstruct_scalar = np.float64(0).__reduce__()[0]
    classes: list[typing.Any] = [
        argparse.Namespace,
        collections.defaultdict,
        reconstruct_array,
        reconstruct_scalar,
        np.ndarray,
        np.dtype,
        *{type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "u8", "u4", "u1", "i1", "?")},
        omegaconf.DictConfig,
        omegaconf.ListConfig,
        base.ContainerMetadata,
        base.Metadata,
        nodes.AnyNode,
        typing.Any,
        dict,
        list,
        int,
        _TensorPlaceholder,
    ]
    torch.serialization.add_safe_globals(classes)


# The modules of fairseq that use names which numpy has dropped.
NUMPY_1_MODULES = (
    "fairseq.data.data_utils",
    "fairseq.data.language_pair_dataset",
    "fairseq.data.token_block_dataset",
    "fairseq.modules.dynamic_crf_layer",
)


class _Numpy1(types.ModuleType):
    """numpy with the names and keywords that version 1 had."""

    int, float = int, float
    compat = types.SimpleNamespace(long=int)

    @staticmethod
    def percentile(*args: typing.Any, interpolation: str = "linear", **kwargs: typing.Any) -> typing.Any:
        return np.percentile(*args, **{"method": interpolation, **kwargs})

    def __getattr__(self, name: str) -> typing.Any:
        return getattr(np, name)


def mend_numpy() -> None:
    """Give the modules of fairseq that need them numpy 1's names, and nobody else."""
    for name in NUMPY_1_MODULES:
        importlib.import_module(name).np = _Numpy1("numpy")  # type: ignore[attr-defined]


class Folders(list[str]):
    """A package's ``__path__`` that knows its folder by every path.

    fairseq asks ``path in __path__`` whether ``--user-dir`` is imported already, with a path that it puts together,
    such as site-packages/fairseq/../fairseq_dsq, and which may lead there by a link or an editable install.
    """

    def __init__(self, folders: Iterable[str]) -> None:
        super().__init__(folders)

    def __contains__(self, folder: object) -> bool:
        path = Path(os.path.realpath(str(folder)))
        own = [os.path.realpath(own) for own in self]
        # An editable install puts a package of one file in place of this one, which names its folder.
        stands_in = path / "__init__.py"
        return str(path) in own or (
            stands_in.is_file() and any(repr(folder) in stands_in.read_text(encoding="utf-8") for folder in own)
        )


def copy_checkpoints_whole() -> None:
    """Let no checkpoint be half a copy, whenever a training is killed.

    fairseq writes a checkpoint beside its place and renames it, but then copies it onto checkpoint_best.pt and
    checkpoint_last.pt, and has no hook there.
    """
    from fairseq.file_io import PathManager

    copy = PathManager.copy

    def copy_whole(src_path: str, dst_path: str, overwrite: bool = False) -> typing.Any:
        if not overwrite or not PathManager.supports_rename(dst_path):
            return copy(src_path, dst_path, overwrite)
        part = dst_path + ".tmp"
        done = copy(src_path, part, overwrite=True)
        PathManager.rename(part, dst_path)
        return done

    PathManager.copy = staticmethod(copy_whole)


class _Archive(tarfile.TarFile):
    """An archive whose members stay in the folder that they are extracted to; Python's own are trusted before 3.14."""

    extraction_filter = staticmethod(tarfile.data_filter)

    def extractall(self, *args: typing.Any, **kwargs: typing.Any) -> None:
        try:
            super().extractall(*args, **kwargs)
        except tarfile.FilterError as error:
            raise DSQError(
                f"{os.fsdecode(self.name or 'archive')}: {error}, refused: an archive must stay in its folder"
            ) from None


def keep_archives_inside() -> None:
    """Have ``from_pretrained`` extract archives so; fairseq's function for them has no hook."""
    from fairseq import file_utils

    file_utils.tarfile = types.SimpleNamespace(open=_Archive.open)
