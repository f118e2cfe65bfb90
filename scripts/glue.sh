#!/usr/bin/env bash
# A GLUE task: tokenise, binarise, fine-tune with fairseq-train, score on the development sets.
set -euo pipefail
usage="usage: glue.sh TASK [--encoder DIR] [--data DIR] [--format bfp|fixed|float32] [--levels LEVELS] [--patience N]
               [--min-delta D] [--epochs N] [--lr LR] [--seed N] [--train-rows N] [--group-by-length]
               [--prepared DIR] [--out DIR]
               [-- any flag of fairseq-train]
TASK is CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE or WNLI. Its TSV files come from --data, \$DSQ_DATA/glue/TASK or
the public address; the encoder is a folder (see fairseq_dsq/glue/encoder.py) or roberta.base, which is downloaded.
Runs can share one --prepared folder (default: OUT/data). A run that was stopped goes on where it was.
A folder that other settings, files or another version of this package made is refused; --epochs too stands, as the
learning rate's decay depends on it."

encoder=roberta.base data= format=bfp levels= patience=5 min_delta=0 epochs=10 lr=1e-5 seed=1 train_rows=0 group_by_length= prepared= out=

# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
parse_flags "encoder data format levels patience min-delta epochs lr seed train-rows prepared out" "group-by-length" "$@"
task=$argument
[ -n "$task" ] || fail "TASK is missing (--help lists the flags)" 2
check_integers 1 epochs patience
check_integers 0 seed train-rows
use_env glue
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
downloads=$DSQ_ROOT/runs/glue/downloads
out=${out:-$DSQ_ROOT/runs/glue/$(slug "$task")/$(slug "$(basename -- "$encoder")-$format-${levels:-default}-seed$seed")}
prepared=${prepared:-$out/data}

fairseq-dsq glue-prepare "$task" "$prepared" --encoder "$encoder" --downloads "$downloads" ${data:+--data "$data"} \
    --train-rows "$train_rows" ${group_by_length:+--group-by-length}

# Dropout, Adam, decay and batches as in fairseq's examples/roberta/README.glue.md.
flags=$(fairseq-dsq glue-flags --encoder "$encoder" --downloads "$downloads" "$prepared" -- \
    --criterion dsq_sentence_prediction --dropout 0.1 --attention-dropout 0.1 --shorten-method truncate \
    --batch-size 32 --max-tokens 4400 --required-batch-size-multiple 1 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --adam-eps 1e-6 --weight-decay 0.1 --clip-norm 0.0 \
    --lr "$lr" --lr-scheduler polynomial_decay --max-epoch "$epochs" --seed "$seed" \
    --dsq-format "$format" ${levels:+--dsq-levels "$levels"} --dsq-patience "$patience" --dsq-min-delta "$min_delta" \
    --no-epoch-checkpoints --log-format json --log-interval 100 --no-progress-bar "${rest[@]}")
mapfile -t flags <<< "$flags"
train "$out" "${flags[@]}"

echo "format $format, levels ${levels:-default}, seed $seed"
fairseq-dsq epochs "$out"
fairseq-dsq glue-evaluate "$prepared" "$out/checkpoint_best.pt" --out "$out/glue.json"
