#!/usr/bin/env bash
# Multi30k German-English in every number format, everywhere and for the stash alone: every row of
# configs/methods/formats.yaml with the same updates. Hours on two cores; what is done is not repeated. --dry-run prints
# the commands. JOBS (2) runs go side by side; the corpus lies in DSQ_DATA.
set -euo pipefail
# shellcheck source=scripts/table.sh
. "$(dirname "${BASH_SOURCE[0]}")/table.sh"
use_table "$@"
mapfile -t all < <(rows formats)

run() {  # METHODS MORE...
    fairseq-dsq run formats --runs "$runs" --methods "$1" --seed 1 "${@:2}"
}
export -f run

if [ $# -gt 0 ]; then
    run "${all[*]}" --dry-run
    exit
fi
# Two runs at once must not both prepare.
fairseq-dsq translation-prepare multi30k "$runs/formats/data-4000" --vocab 4000
printf '%s\n' "${all[@]}" | side_by_side
