#!/usr/bin/env bash
# A GLUE task: configs/recipes/glue.yaml; --help lists the flags.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_env "glue"
exec fairseq-dsq run glue --runs "$DSQ_ROOT/runs" "$@"
