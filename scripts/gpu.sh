#!/usr/bin/env bash
# Checks and times the CUDA path on one GPU, in at most 8 minutes; the exit code is 1 where something differed:
# DSQ_ENV=.venv scripts/gpu.sh [--device cuda|cpu] [--out runs/gpu] [--minutes 8] [--sections NAME ...]
# DSQ_ENV names an environment with this package, torch for CUDA and Triton; without one, python3's own torch and fairseq
# are taken, or what is missing on a machine without a network from WHEELS, a folder of wheels. --device cpu goes the
# same way in small: a rehearsal. Writes OUT/gpu.json, and OUT/gpu.md, a table.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
show_help "$@"
if [ -n "${WHEELS:-}" ]; then
    [ -d "$WHEELS" ] || fail "WHEELS: got $WHEELS, expected a folder of wheels"
    python=$(find_python)
    target=$(mktemp -d)
    trap 'rm -rf "$target"' EXIT
    # Beside torch, which stays the machine's own: nothing is resolved, every wheel of the folder is put in a folder.
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$target" "$WHEELS"/*.whl
    export PYTHONPATH=$DSQ_ROOT:$target${PYTHONPATH:+:$PYTHONPATH}
elif [ -n "${DSQ_ENV:-}" ]; then
    use_env ""
    python=python
else
    python=$(find_python)
    "$python" -c 'import torch, fairseq' 2> /dev/null || fail "no torch or fairseq here: set WHEELS to a folder of wheels, or DSQ_ENV"
    export PYTHONPATH=$DSQ_ROOT${PYTHONPATH:+:$PYTHONPATH}
fi
"$python" "$DSQ_ROOT/scripts/gpu.py" "$@"
