"""How fairseq's commands refuse a flag."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def flag_error(flag: str, message: str) -> NoReturn:
    """Stop with one line that names the flag.

    Raises:
        SystemExit: always; its text goes to standard error and the exit code is 1.
    """
    sys.exit(f"{os.path.basename(sys.argv[0])}: error: argument {flag}: {message}")
