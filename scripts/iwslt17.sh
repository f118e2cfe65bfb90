#!/usr/bin/env bash
# IWSLT17 German-English, the paper's Table 1: configs/recipes/iwslt17.yaml; --help lists the flags.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_env ""
exec fairseq-dsq run iwslt17 --runs "$DSQ_ROOT/runs" "$@"
