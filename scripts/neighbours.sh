#!/usr/bin/env bash
# Float32, DSQ and the systems it is compared with on one language model and one translator: every row of
# configs/methods/neighbours.yaml with the same updates, five of them with a second seed. Hours on two cores; what is
# done is not repeated. --dry-run prints the commands. JOBS (2) runs go side by side; the corpora lie in DSQ_DATA.
set -euo pipefail
# shellcheck source=scripts/table.sh
. "$(dirname "${BASH_SOURCE[0]}")/table.sh"
use_table "$@"
export text=$runs/english.txt
english=(multi30k/train iwslt14_de-en/train_subset wmt/newstest2013 wmt/train_10k/train)
mapfile -t all < <(rows neighbours)
twice=(float32 dsq w8a8 bitnet direct-eco)

run() {  # lm|mt METHODS SEED MORE...
    local recipe=$1 methods=$2 seed=$3; shift 3
    [ "$recipe" != lm ] || set -- "$text" "$@"
    fairseq-dsq run "neighbours-$recipe" "$@" --runs "$runs" --methods "$methods" --seed "$seed"
}
export -f run

if [ $# -gt 0 ]; then
    for recipe in lm mt; do
        run "$recipe" "${all[*]}" 1 --dry-run
        run "$recipe" "${twice[*]}" 2 --dry-run
    done
    exit
fi
mkdir -p "$runs"
(cd "$DSQ_DATA" && cat "${english[@]/%/.en}") > "$text"
# Two runs at once must not both prepare.
fairseq-dsq lm-prepare "$text" "$runs/neighbours-lm/english/data-4000" --vocab 4000 --held-out 0.01
fairseq-dsq translation-prepare multi30k "$runs/neighbours-mt/data-4000" --vocab 4000
for recipe in lm mt; do
    printf "$recipe %s 1\n" "${all[@]}"
    printf "$recipe %s 2\n" "${twice[@]}"
done | side_by_side
