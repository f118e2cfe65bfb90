#!/usr/bin/env bash
# Multi30k German-English: fetch, sentencepiece, fairseq-preprocess, fairseq-train, fairseq-generate, sacreBLEU.
set -euo pipefail
usage="usage: multi30k.sh [--format bfp|fixed|float32] [--levels LEVELS] [--patience N] [--min-delta D]
                   [--layers N] [--dim N] [--ffn N] [--heads N] [--vocab N] [--epochs N] [--seed N] [--out DIR]
                   [-- any flag of fairseq-train]
Data comes from \$DSQ_DATA/multi30k, or from the public repository. A run that was stopped goes on where it was."

format=bfp levels= patience=1 min_delta=1.0
layers=2 dim=128 ffn=512 heads=4 vocab=4000 epochs=8 seed=1 out=
while [ $# -gt 0 ]; do
    case $1 in
        --format | --levels | --patience | --min-delta | --layers | --dim | --ffn | --heads | --vocab | --epochs | --seed | --out)
            [ $# -ge 2 ] || { echo "multi30k.sh: error: $1 needs a value" >&2; exit 2; }
            name=${1#--}
            declare "${name//-/_}=$2"
            shift 2 ;;
        -h | --help) echo "$usage"; exit 0 ;;
        --) shift; break ;;
        *) echo "multi30k.sh: error: unknown argument $1" >&2; echo "$usage" >&2; exit 2 ;;
    esac
done

# fairseq reads 0 as no limit.
[[ $epochs =~ ^[1-9][0-9]*$ ]] || { echo "multi30k.sh: error: --epochs: got '$epochs', expected an integer >= 1" >&2; exit 2; }

# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_env dev
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
data=$DSQ_ROOT/runs/multi30k/data-$vocab
out=${out:-$DSQ_ROOT/runs/multi30k/$format-${levels:-default}-seed$seed}
mkdir -p "$out"

if [ ! -e "$data/done" ]; then
    fairseq-dsq multi30k "$data" --vocab "$vocab"
    fairseq-preprocess --source-lang de --target-lang en --joined-dictionary --srcdict "$data/dict.txt" \
        --trainpref "$data/train" --validpref "$data/valid" --testpref "$data/test" --destdir "$data/bin" > "$data/preprocess.out" 2>&1
    touch "$data/done"
fi

fairseq-train "$data/bin" --user-dir "$DSQ_ROOT/fairseq_dsq" --arch transformer_dsq --share-all-embeddings \
    --encoder-layers "$layers" --decoder-layers "$layers" --encoder-embed-dim "$dim" --encoder-ffn-embed-dim "$ffn" \
    --encoder-attention-heads "$heads" --decoder-attention-heads "$heads" --dropout 0.1 \
    --dsq-format "$format" ${levels:+--dsq-levels "$levels"} --dsq-patience "$patience" --dsq-min-delta "$min_delta" \
    --criterion dsq_label_smoothed_cross_entropy --label-smoothing 0.1 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr 2e-3 --lr-scheduler inverse_sqrt --warmup-updates 400 \
    --max-tokens 2048 --max-epoch "$epochs" --seed "$seed" --no-epoch-checkpoints --save-dir "$out" \
    --log-format json --log-interval 100 --no-progress-bar "$@" >> "$out/train.log" 2>&1 \
    || { grep -E 'error' "$out/train.log" | tail -n 1 >&2; echo "multi30k.sh: error: training failed, see $out/train.log" >&2; exit 1; }

fairseq-generate "$data/bin" --user-dir "$DSQ_ROOT/fairseq_dsq" --path "$out/checkpoint_best.pt" \
    --beam 4 --max-tokens 4096 --required-batch-size-multiple 1 --remove-bpe sentencepiece > "$out/generate.out" 2> "$out/generate.err"
grep '^D-' "$out/generate.out" | LC_ALL=C sort -V | cut -f3 > "$out/hypotheses.en"
echo "format $format, levels ${levels:-default}, seed $seed"
fairseq-dsq epochs "$out/train.log"
bleu=$(score "$data/raw.test.en" "$out" 2)
echo "test_2016_flickr sacreBLEU: $bleu"
