#!/usr/bin/env bash
# Float32, DSQ and the systems it is compared with on one language model and one translator: every row of
# configs/methods/neighbours.yaml with the same updates, five of them with a second seed. Hours on two cores; what is
# done is not repeated, and --dry-run shows what there is. The text is the English sides in $DSQ_DATA.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_env ""
data=${DSQ_DATA:-} runs=$DSQ_ROOT/runs text=$DSQ_ROOT/runs/english.txt
twice=(float32 dsq w8a8 bitnet direct-eco)
[ $# -le 1 ] && [ "${1:---dry-run}" = --dry-run ] || fail "got $*, expected --dry-run or nothing" 2
[ -d "$data" ] || fail "DSQ_DATA: got '$data', expected the folder that the corpora lie in"
mapfile -t methods < <(grep -oP '^[a-z][\w-]*(?=:)' "$DSQ_ROOT/configs/methods/neighbours.yaml")

one() {  # RECIPE METHOD SEED
    local recipe=$1; shift
    [ "$recipe" != lm ] || set -- "$@" "$text"
    fairseq-dsq run "neighbours-$recipe" ${3:+"$3"} --runs "$runs" --methods "$1" --seed "$2" ${dry:+--dry-run}
}
export -f one
export runs text dry=${1:-} OMP_NUM_THREADS=1

if [ -z "$dry" ]; then
    mkdir -p "$runs"
    (cd "$data" && cat multi30k/train.en iwslt14_de-en/train_subset.en wmt/newstest2013.en wmt/train_10k/train.en) > "$text"
    fairseq-dsq lm-prepare "$text" "$runs/neighbours-lm/english/data-4000" --vocab 4000 --held-out 0.01
    fairseq-dsq translation-prepare multi30k "$runs/neighbours-mt/data-4000" --vocab 4000
fi
{
    for recipe in lm mt; do
        printf "$recipe %s 1\n" "${methods[@]}"
        printf "$recipe %s 2\n" "${twice[@]}"
    done
} | xargs -P "${JOBS:-2}" -L 1 bash -c 'one "$@" || echo "failed: $*" >&2' one
