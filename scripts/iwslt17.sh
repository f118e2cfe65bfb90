#!/usr/bin/env bash
# IWSLT17 German-English, the paper's Table 1: every method trained, translated and scored one after the other, then the table.
# On one GPU a method is a matter of hours, on a CPU of weeks.
set -euo pipefail
usage="usage: iwslt17.sh [--methods NAMES | --format bfp|fixed|float32 [--levels LEVELS]] [--patience N] [--min-delta D]
                  [--vocab N] [--epochs N] [--seed N] [--out DIR] [-- any flag of fairseq-train]
NAMES are the table's rows (default: all): float32 fixed32 fixed16 bfp32 bfp16 stash-fixed stash-bfp dsq. --format trains one
method of one's own instead. --out is the folder of the run, or of the table's runs.
Data comes from \$DSQ_DATA/iwslt17_de-en (train, valid, test .de and .en, plain text), or from the public repository.
A table or run that was stopped goes on where it was. A folder that other settings,
data or another version of this package made is refused; --epochs may be raised."

# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=scripts/translation.sh
. "$DSQ_ROOT/scripts/translation.sh"

corpus=iwslt17 source=de target=en test=tst2010-2015
methods=$METHODS format= levels= patience=5 min_delta=0 vocab=10000 epochs=50 seed=1 out=
# As in fairseq's examples/translation (IWSLT'14 German to English).
recipe=(
    --arch transformer_dsq_iwslt_de_en --share-all-embeddings --dropout 0.3 --weight-decay 0.0001
    --lr 5e-4 --warmup-updates 4000 --max-tokens 4096
)
search=(--beam 5 --max-tokens 8192)

run_table "$@"
