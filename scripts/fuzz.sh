#!/usr/bin/env bash
# What reads text, files and bytes, fed with damaged input: scripts/fuzz.sh [N] [--seed S] [--target T [--only I]];
# a million inputs without N. Prints inputs and failures of each target; fails if one breaks the property (tests/fuzz).
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
show_help "$@"
use_env dev,glue
export OMP_NUM_THREADS=1
python -W ignore "$DSQ_ROOT/tests/fuzz/fuzz.py" "$@"
