#!/usr/bin/env bash
# The checks: ruff, mypy, pytest (which also holds the import arrows). Arguments go to pytest.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
show_help "$@"
use_env dev,glue
export OMP_NUM_THREADS=1
cd "$DSQ_ROOT"
ruff check .
ruff format --check .
mypy
# A file stays in one process: its fixtures train models. By name, or files of few and long tests come last.
# One that dies is not replaced: its file would wait for ever (pytest-xdist issue 1323).
python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0 "$@"
