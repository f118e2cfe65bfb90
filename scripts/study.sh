#!/usr/bin/env bash
# The paper's tables at the size that a CPU reaches: Table 1 on Multi30k (three seeds) and IWSLT14, then the stashing
# precisions, the gradient's precision and what the paper leaves open, on Multi30k. Half an hour a run on one core; JOBS
# (2) runs go side by side. What is done is not repeated, and a run that was stopped goes on. The corpora lie in DSQ_DATA.
# --status says how far it is, --dry-run prints the commands; what follows -- goes to fairseq-train.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
case "${1:-}" in
    "" | --) ;;
    --status | --dry-run) mode=$1; shift ;;
    *) fail "got '$*', expected --status, --dry-run or nothing, then -- FLAGS" 2 ;;
esac
[ "${1:---}" = -- ] || fail "got '$*', expected -- FLAGS" 2
for corpus in multi30k iwslt14_de-en; do
    [ -d "${DSQ_DATA:-}/$corpus" ] || fail "DSQ_DATA: got '${DSQ_DATA:-}', expected the folder that $corpus lies in"
done
use_env ""
export OMP_NUM_THREADS=1

failed=0
study() {  # CORPUS TABLES FLAGS...
    local recipe=study-$1 tables=$2; shift 2
    fairseq-dsq run "$recipe" --runs "$DSQ_ROOT/runs" --methods "$tables" --jobs "${JOBS:-2}" ${mode:+"$mode"} "$@" ||
        failed=$?
    [ "$failed" -lt 128 ] || exit "$failed"  # by a signal
}
all="table1 table4 table5 ablations"
if [ -z "${mode:-}" ]; then  # what matters most comes first
    study multi30k table1 "$@"
    study iwslt14 table1 "$@"
    study multi30k "$all" "$@"
else
    study multi30k "$all" "$@"
    study iwslt14 table1 "$@"
fi
exit "$failed"
