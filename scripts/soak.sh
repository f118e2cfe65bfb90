#!/usr/bin/env bash
# Trains for long, or kills and resumes a training many times; see --help.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
show_help_of "$DSQ_ROOT/scripts/soak.py" "$@"
use_env ""
export OMP_NUM_THREADS=1
exec python "$DSQ_ROOT/scripts/soak.py" "$@"
