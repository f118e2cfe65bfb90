#!/usr/bin/env bash
# IWSLT14 German-English by fairseq's preprocessing, the methods of Table 1: configs/recipes/iwslt14.yaml; --help lists the flags.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_env translation
exec fairseq-dsq run iwslt14 --runs "$DSQ_ROOT/runs" "$@"
