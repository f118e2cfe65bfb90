# Sourced by the scripts that train the rows of a table of configs/methods/: each defines run METHODS..., and exports it.

# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# use_table [--dry-run]: refuses what it does not know; the environment, and the folder of all runs
use_table() {
    [ "${*:---dry-run}" = --dry-run ] || fail "got '$*', expected --dry-run or nothing" 2
    [ -d "${DSQ_DATA:-}/multi30k" ] ||
        fail "DSQ_DATA: got '${DSQ_DATA:-}', expected the folder that the corpora lie in"
    use_env ""
    export OMP_NUM_THREADS=1 runs=$DSQ_ROOT/runs
}

# rows TABLE: the names of its rows
rows() {
    grep -oP '^[a-z][\w-]*(?=:)' "$DSQ_ROOT/configs/methods/$1.yaml"
}

# side_by_side: run for each line of arguments, JOBS (2) at once
side_by_side() {
    xargs -P "${JOBS:-2}" -L 1 bash -c 'run "$@" || { echo "failed: $*" >&2; exit 1; }' run
}
