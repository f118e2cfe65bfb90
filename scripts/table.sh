# Sourced by the scripts that train the rows of tables of configs/methods/.

# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# use_tables CORPORA [--status|--dry-run] [-- FLAGS]: refuses what it does not know; sets mode and flags, the environment
use_tables() {
    local corpora=$1 corpus; shift
    show_help "$@"
    mode=()
    case "${1:-}" in
        "" | --) ;;
        --status | --dry-run) mode=("$1"); shift ;;
        *) fail "got '$*', expected --status, --dry-run or nothing, then -- FLAGS" 2 ;;
    esac
    [ "${1:---}" = -- ] || fail "got '$*', expected -- FLAGS" 2
    flags=("$@")
    for corpus in $corpora; do
        [ -d "${DSQ_DATA:-}/$corpus" ] ||
            fail "DSQ_DATA: got '${DSQ_DATA:-}', expected the folder that $corpus lies in"
    done
    use_env ""
    export OMP_NUM_THREADS=1 runs=$DSQ_ROOT/runs
    failed=0
}

# train RECIPE METHODS SEEDS [TEXT]: JOBS (2) runs at a time; what is done is not repeated. Its code is kept in failed,
# and ends the script where a signal made it.
train() {
    local recipe=$1 methods=$2 seeds=$3; shift 3
    fairseq-dsq run "$recipe" "$@" --runs "$runs" --methods "$methods" ${seeds:+--seed "$seeds"} \
        --jobs "${JOBS:-2}" "${mode[@]}" "${flags[@]}" || failed=$?
    [ "$failed" -le 128 ] || exit "$failed"
}
