#!/usr/bin/env bash
# WMT14 English-German, the paper's Table 1: every method trained, translated and scored one after the other, then the table.
# The updates are those of eight GPUs: on one GPU a method takes days; on N, give -- --update-freq 8/N.
set -euo pipefail
usage="usage: wmt14.sh [--methods NAMES | --format bfp|fixed|float32 [--levels LEVELS]] [--patience N] [--min-delta D]
                [--vocab N] [--epochs N] [--seed N] [--out DIR] [-- any flag of fairseq-train]
NAMES are the table's rows (default: all): float32 fixed32 fixed16 bfp32 bfp16 stash-fixed stash-bfp dsq. --format trains one
method of one's own instead. --out is the folder of the run, or of the table's runs.
Data comes from \$DSQ_DATA/wmt14_en-de (train, valid, test .en and .de, plain text), or from statmt.org.
A table or run that was stopped goes on where it was. A folder that other settings,
data or another version of this package made is refused; --epochs may be raised."

# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=scripts/translation.sh
. "$DSQ_ROOT/scripts/translation.sh"

corpus=wmt14 source=en target=de test=newstest2014
methods=$METHODS format= levels= patience=5 min_delta=0 vocab=32000 epochs=20 seed=1 out=
# As in fairseq's examples/scaling_nmt, for the base model: 100,000 updates are about 20 epochs.
recipe=(
    --arch transformer_dsq_wmt_en_de --share-all-embeddings --dropout 0.1
    --lr 7e-4 --warmup-updates 4000 --warmup-init-lr 1e-7 --max-tokens 3584 --update-freq 8
)
search=(--beam 4 --lenpen 0.6 --max-tokens 8192)

run_table "$@"
