#!/usr/bin/env bash
# The commands of the READMEs that train for minutes, run for real: on tiny data,
# quickstart.sh on its own. Arguments go to pytest.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_env dev,glue
export OMP_NUM_THREADS=1
cd "$DSQ_ROOT"
python -m pytest -m slow tests/e2e/test_readme.py "$@"
