#!/usr/bin/env bash
# The tests that take minutes: the READMEs' commands that train, run for real (on tiny data, quickstart.sh on its own),
# and the command lines of twins, language models and coded weights. Arguments go to pytest.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
show_help "$@"
use_env dev,glue
export OMP_NUM_THREADS=1
cd "$DSQ_ROOT"
python -m pytest -m slow -o faulthandler_timeout=0 tests/e2e "$@"
