#!/usr/bin/env bash
# Multi30k German-English: configs/recipes/multi30k.yaml; --help lists the flags.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_env ""
exec fairseq-dsq run multi30k --runs "$DSQ_ROOT/runs" "$@"
