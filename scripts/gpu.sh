#!/usr/bin/env bash
# Checks and times the CUDA path on one GPU, in at most 8 minutes; see --help. WHEELS names a folder of wheels of what is
# missing on a machine without a network (Python 3.11 or 3.12 with torch for CUDA and Triton is what must be there).
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
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
