#!/usr/bin/env bash
# From a clone to a DSQ-trained translator: a small German-English corpus, two fairseq-train runs (DSQ beside float32),
# fairseq-generate, sacreBLEU. A run that finished is not repeated; --fresh starts over.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_env ""
export OMP_NUM_THREADS=1
run=$DSQ_ROOT/runs/quickstart
case ${1:-} in
    "") ;;
    --fresh) rm -rf "$run" ;;
    *) fail "unknown argument $1, expected --fresh or nothing" 2 ;;
esac
mkdir -p "$run"

if [ ! -e "$run/data.done" ]; then
    fairseq-dsq corpus "$run/text" --train 6000 --valid 304 --test 304
    fairseq-preprocess --source-lang de --target-lang en --trainpref "$run/text/train" --validpref "$run/text/valid" \
        --testpref "$run/text/test" --destdir "$run/data" > "$run/preprocess.log" 2>&1
    touch "$run/data.done"
fi

# train_and_translate NAME FLAGS...: a run of its own, unless it is there
train_and_translate() {
    local name=$1
    shift
    [ ! -e "$run/$name/hypotheses.en" ] || return 0
    mkdir -p "$run/$name"
    train "$run/$name/train.log" "$run/data" --arch transformer_dsq "$@" \
        --encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 96 --encoder-ffn-embed-dim 256 \
        --encoder-attention-heads 4 --decoder-attention-heads 4 --dropout 0.1 --share-decoder-input-output-embed \
        --criterion dsq_label_smoothed_cross_entropy --label-smoothing 0.1 --optimizer adam --adam-betas '(0.9, 0.98)' \
        --lr 4e-3 --lr-scheduler inverse_sqrt --warmup-updates 150 --max-tokens 1500 --max-epoch 6 --seed 1 \
        --no-epoch-checkpoints --save-dir "$run/$name" --log-format json --log-interval 1000 --no-progress-bar
    generate "$run/data" "$run/$name" en --beam 4 --max-tokens 6000
}

echo "training transformer_dsq at [2,2,2,16] [16,4,4,16] and, beside it, float32 (about two minutes)"
train_and_translate dsq --dsq-format bfp --dsq-levels '[2,2,2,16] [16,4,4,16]' --dsq-patience 1 --dsq-min-delta 1.0 &
train_and_translate float32 --dsq-format float32
wait $!

echo
fairseq-dsq epochs "$run/dsq/train.log"
echo
dsq_bleu=$(score "$run/text/test.en" "$run/dsq" 1) float32_bleu=$(score "$run/text/test.en" "$run/float32" 1)
echo "test sacreBLEU: DSQ $dsq_bleu, float32 $float32_bleu"
echo
echo "five translations (source, DSQ, reference):"
paste -d '\n' "$run/text/test.de" "$run/dsq/hypotheses.en" "$run/text/test.en" /dev/null | head -n 20
