# Sourced by the scripts of the parallel corpora, which set: corpus, source, target, test (what the test set is called), recipe
# (flags of fairseq-train), search (flags of fairseq-generate) and the defaults of $TRANSLATION_FLAGS.

TRANSLATION_FLAGS="format levels patience min-delta vocab epochs seed out"
# The rows of the paper's Table 1, and float32 before them.
METHODS="float32 fixed32 fixed16 bfp32 bfp16 stash-fixed stash-bfp dsq"

# find_method NAME: sets $format and $levels (none: the default levels)
find_method() {
    case $1 in
        float32) format=float32 levels= ;;
        fixed32) format=fixed levels='[32,32,32,32]' ;;
        fixed16) format=fixed levels='[16,16,16,16]' ;;
        bfp32) format=bfp levels='[32,32,32,32]' ;;
        bfp16) format=bfp levels='[16,16,16,16]' ;;
        stash-fixed) format=fixed levels='[16,4,4,16]' ;;
        stash-bfp) format=bfp levels='[16,4,4,16]' ;;
        dsq) format=bfp levels= ;;
        *) fail "--methods: got '$1', expected some of $METHODS" 2 ;;
    esac
}

prepare_corpus() {
    prepared=$DSQ_ROOT/runs/$corpus/data-$vocab
    fairseq-dsq translation-prepare "$corpus" "$prepared" --vocab "$vocab" \
        --downloads "$DSQ_ROOT/runs/$corpus/downloads"
}

# train_method FORMAT LEVELS FOLDER: train, translate the test set, score; what FOLDER has already is not repeated
train_method() {
    local format=$1 levels=$2 folder=$3 bleu
    train "$folder" "$prepared/bin" "${recipe[@]}" \
        --dsq-format "$format" ${levels:+--dsq-levels "$levels"} --dsq-patience "$patience" --dsq-min-delta "$min_delta" \
        --criterion dsq_label_smoothed_cross_entropy --label-smoothing 0.1 --optimizer adam --adam-betas '(0.9, 0.98)' \
        --lr-scheduler inverse_sqrt --max-epoch "$epochs" --seed "$seed" --no-epoch-checkpoints \
        --log-format json --log-interval 100 --no-progress-bar "${rest[@]}"
    echo "format $format, levels ${levels:-default}, seed $seed"
    fairseq-dsq epochs "$folder"
    bleu=$(translate "$folder" "$prepared/raw.test.$target" 2 "$prepared/bin" --remove-bpe sentencepiece "${search[@]}")
    echo "$test sacreBLEU: $bleu"
}

# begin "OWN_FLAGS" "OWN_INTEGERS" ARGUMENTS...: what comes first in each of these scripts
begin() {
    local own=$1 own_integers=$2
    shift 2
    parse_flags "$TRANSLATION_FLAGS $own $own_integers" "" "$@"
    [ -z "$argument" ] || reject "$argument"
    # shellcheck disable=SC2086
    check_integers 1 epochs vocab patience $own_integers
    check_integers 0 seed
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
}

# train_one: the method that --format and --levels name
train_one() {
    train_method "$format" "$levels" "${out:-$DSQ_ROOT/runs/$corpus/$(slug "$format-${levels:-default}-seed$seed")}"
}

# run_table ARGUMENTS...: what iwslt17.sh and wmt14.sh do
run_table() {
    local method folders=()
    begin methods "" "$@"
    [ -n "$format" ] || [ -z "$levels" ] || fail "--levels: got '$levels' without --format" 2
    for method in $methods; do
        (find_method "$method")  # all are known before the first is trained
    done
    use_env ""
    prepare_corpus
    if [ -n "$format" ]; then
        train_one
        return
    fi
    for method in $methods; do
        find_method "$method"
        folders+=("${out:-$DSQ_ROOT/runs/$corpus}/$method-seed$seed")
        train_method "$format" "$levels" "${folders[-1]}"
        echo
    done
    fairseq-dsq report "${folders[@]}"
}
