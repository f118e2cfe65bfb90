"""Where data comes from: below $DSQ_DATA, or from its public address, whole and verified or not at all."""

from __future__ import annotations

import http.client
import os
import shutil
import urllib.request
from pathlib import Path

from fairseq_dsq.artefact import atomic, checksum

TIMEOUT_S = 60


def data_root(below: str, expected: str) -> Path | None:
    """A file or folder below $DSQ_DATA; None where that is not set and it has to be downloaded.

    Args:
        expected: what is there, for the error.

    Raises:
        OSError: $DSQ_DATA is set and does not hold it.
    """
    root = os.environ.get("DSQ_DATA")
    if not root:
        return None
    path = Path(root, below)
    if not path.exists():
        raise OSError(f"DSQ_DATA: {path} does not exist, expected {expected}; unset DSQ_DATA to download it")
    return path


def download(url: str, path: Path, sha256: str | None = None, hint: str = "") -> Path:
    """Fetch ``url`` to ``path`` unless that is there already.

    Args:
        sha256: the checksum that the file must have, in hexadecimal digits; None where none is published.
        hint: what to do if the address cannot be reached, for the error.

    Returns:
        ``path``.

    Raises:
        OSError: it cannot be fetched or written, or ends early.
        ValueError: its checksum, or that of what is there already, differs. Nothing is left at ``path`` by a failure.
    """
    if path.exists():
        if sha256 is not None and (digest := checksum(path)) != sha256:
            raise ValueError(f"{path}: got sha256 {digest}, expected {sha256} as {url} has; remove it")
        return path
    with atomic(path) as partial:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, open(partial, "wb") as file:
                shutil.copyfileobj(response, file)
            expected = response.headers.get("Content-Length")
            got = partial.stat().st_size
            if expected is not None and got != int(expected):  # read() does not say so
                raise OSError(f"got {got} bytes, expected {expected}")
        except (OSError, http.client.HTTPException) as error:  # the latter of an answer that is cut or is none
            line = " ".join(str(error).split())
            raise OSError(f"{url}: {line}" + (f" ({hint})" if hint else "")) from None
        if sha256 is not None and (digest := checksum(partial)) != sha256:
            raise ValueError(f"{url}: got sha256 {digest}, expected {sha256}")
    return path
