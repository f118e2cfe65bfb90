#!/usr/bin/env bash
# Multi30k German-English: fetch, sentencepiece, fairseq-preprocess, fairseq-train, fairseq-generate, sacreBLEU.
set -euo pipefail
usage="usage: multi30k.sh [--format bfp|fixed|float32] [--levels LEVELS] [--patience N] [--min-delta D]
                   [--layers N] [--dim N] [--ffn N] [--heads N] [--vocab N] [--epochs N] [--seed N] [--out DIR]
                   [-- any flag of fairseq-train]
Data comes from \$DSQ_DATA/multi30k, or from the public repository. A run that was stopped goes on where it was. A folder that other settings,
data or another version of this package made is refused; --epochs may be raised."

corpus=multi30k source=de target=en test=test_2016_flickr
format=bfp levels= patience=1 min_delta=1.0 vocab=4000 epochs=8 seed=1 out=
layers=2 dim=128 ffn=512 heads=4

# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=scripts/translation.sh
. "$DSQ_ROOT/scripts/translation.sh"
begin "" "layers dim ffn heads" "$@"
use_env dev

recipe=(
    --arch transformer_dsq --share-all-embeddings --encoder-layers "$layers" --decoder-layers "$layers"
    --encoder-embed-dim "$dim" --encoder-ffn-embed-dim "$ffn" --encoder-attention-heads "$heads"
    --decoder-attention-heads "$heads" --dropout 0.1 --lr 2e-3 --warmup-updates 400 --max-tokens 2048
)
search=(--beam 4 --max-tokens 4096)
prepare_corpus
train_one
