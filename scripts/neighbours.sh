#!/usr/bin/env bash
# Float32, DSQ and the systems it is compared with on one language model and one translator: every row of
# configs/methods/neighbours.yaml with the same updates, five of them with a second seed. Hours on two cores; JOBS (2) runs
# go side by side, and what is done is not repeated. The corpora lie in DSQ_DATA. --status says how far it is, --dry-run
# prints the commands; what follows -- goes to fairseq-train.
set -euo pipefail
# shellcheck source=scripts/table.sh
. "$(dirname "${BASH_SOURCE[0]}")/table.sh"
use_tables "multi30k iwslt14_de-en wmt" "$@"
text=$runs/english.txt
english=(multi30k/train iwslt14_de-en/train_subset wmt/newstest2013 wmt/train_10k/train)
if [ ${#mode[@]} = 0 ]; then
    mkdir -p "$runs"
    (cd "$DSQ_DATA" && cat "${english[@]/%/.en}") > "$text.part"  # in its place when it is whole
    mv "$text.part" "$text"
fi
train neighbours-lm neighbours 1 "$text"
train neighbours-lm "float32 dsq w8a8 bitnet direct-eco" 2 "$text"
train neighbours-mt neighbours 1
train neighbours-mt "float32 dsq w8a8 bitnet direct-eco" 2
exit "$failed"
