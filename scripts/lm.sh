#!/usr/bin/env bash
# A language model of a text: configs/recipes/lm.yaml; --help lists the flags.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_env ""
exec fairseq-dsq run lm --runs "$DSQ_ROOT/runs" "$@"
