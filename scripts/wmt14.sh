#!/usr/bin/env bash
# WMT14 English-German, the paper's Table 1: configs/recipes/wmt14.yaml; --help lists the flags.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_env ""
exec fairseq-dsq run wmt14 --runs "$DSQ_ROOT/runs" "$@"
