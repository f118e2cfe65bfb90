#!/usr/bin/env bash
# From a clone to a DSQ-trained translator: a small German-English corpus, two fairseq-train runs (DSQ beside float32),
# fairseq-generate, sacreBLEU. A run that finished is not repeated; --fresh starts over.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
show_help "$@"
run=$DSQ_ROOT/runs/quickstart
case "$*" in
    "") ;;
    --fresh)
        for folder in "$run/dsq" "$run/float32"; do
            [ ! -d "$folder" ] || flock -n "$folder" true || fail "$folder: another command is at work there"
        done
        rm -rf "$run" ;;
    *) fail "unknown argument $*, expected --fresh or nothing" 2 ;;
esac
use_env ""
export OMP_NUM_THREADS=1
mkdir -p "$run"
fairseq-dsq corpus "$run/data" --train 6000 --valid 304 --test 304 --binarise > /dev/null

# train_and_translate NAME FLAGS...: a run of its own, unless it is there; its BLEU in $run/NAME.bleu
train_and_translate() {
    local name=$1
    shift
    fairseq-dsq run-train "$run/$name" -- "$run/data/bin" --arch transformer_dsq "$@" \
        --encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 96 --encoder-ffn-embed-dim 256 \
        --encoder-attention-heads 4 --decoder-attention-heads 4 --dropout 0.1 --share-decoder-input-output-embed \
        --criterion dsq_label_smoothed_cross_entropy --label-smoothing 0.1 --optimizer adam --adam-betas '(0.9, 0.98)' \
        --lr 4e-3 --lr-scheduler inverse_sqrt --warmup-updates 150 --max-tokens 1500 --max-epoch 6 --seed 1 \
        --no-epoch-checkpoints --log-format json --log-interval 1000 --no-progress-bar \
        || fail "training failed, see $run/$name/train.log"
    fairseq-dsq run-translate --digits 1 "$run/$name" "$run/data/test.en" -- "$run/data/bin" --beam 4 --max-tokens 6000 \
        --required-batch-size-multiple 1 > "$run/$name.bleu" || fail "translating failed, see $run/$name/generate.out"
}

echo "training transformer_dsq at [2,2,2,16] [16,4,4,16] and, beside it, float32 (about two minutes)"
trap 'trap "" TERM; kill 0' INT  # what runs in the background ignores Ctrl-C
train_and_translate dsq --dsq-format bfp --dsq-levels '[2,2,2,16] [16,4,4,16]' --dsq-patience 1 --dsq-min-delta 1.0 &
dsq=$!
train_and_translate float32 --dsq-format float32 &
failed=
wait "$dsq" || failed=1
wait "$!" || failed=1
[ -z "$failed" ] || exit 1

echo
fairseq-dsq epochs "$run/dsq"
echo
echo "test sacreBLEU: DSQ $(< "$run/dsq.bleu"), float32 $(< "$run/float32.bleu")"
echo
echo "five translations (source, DSQ, reference):"
# A pipe into head would end what fills it, and with pipefail the script, by a signal.
paste -d '\n' <(head -n 5 "$run/data/test.de") <(head -n 5 "$run/dsq/hypotheses.en") <(head -n 5 "$run/data/test.en") \
    /dev/null
