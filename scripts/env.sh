# Sourced by the other scripts: their flags and errors, their environment, and fairseq's commands as they call them.

DSQ_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TORCH_PIN=torch==2.13.0

# fail MESSAGE [CODE]: one line, and out
fail() {
    echo "${0##*/}: error: $1" >&2
    exit "${2:-1}"
}

# parse_flags "VALUE_FLAGS" "SWITCHES" ARGUMENTS...: --NAME VALUE sets $NAME, a switch sets it to 1; the first argument that
# is no flag is left in $argument, what follows -- in the array $rest; --help prints $usage.
parse_flags() {
    local values=" $1 " switches=" $2 " name
    shift 2
    argument= rest=()
    while [ $# -gt 0 ]; do
        name=${1#--}
        case $1 in
            -h | --help) echo "$usage"; exit 0 ;;
            --) shift; rest=("$@"); return ;;
            --*)
                if [[ $switches == *" $name "* ]]; then
                    printf -v "${name//-/_}" 1
                    shift
                elif [[ $values == *" $name "* ]]; then
                    [ $# -ge 2 ] || fail "$1 needs a value" 2
                    printf -v "${name//-/_}" %s "$2"
                    shift 2
                else
                    reject "$1"
                fi ;;
            -*) reject "$1" ;;
            *)
                [ -z "$argument" ] || reject "$1"
                argument=$1
                shift ;;
        esac
    done
}

reject() {
    echo "$usage" >&2
    fail "unknown argument $1" 2
}

# check_epochs VALUE: fairseq reads 0 as no limit.
check_epochs() {
    [[ $1 =~ ^[1-9][0-9]*$ ]] || fail "--epochs: got '$1', expected an integer >= 1" 2
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.12 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "found no Python 3.11 or 3.12; set PYTHON to one"
}

# train LOG FLAGS...: fairseq-train with its output added to LOG; if it fails, its last error and where the log is
train() {
    local log=$1
    shift
    fairseq-train "$@" --user-dir "$DSQ_ROOT/fairseq_dsq" >> "$log" 2>&1 && return
    grep -E '[Ee]rror' "$log" | tail -n 1 >&2 || true
    fail "training failed, see $log"
}

# generate DATA FOLDER TARGET FLAGS...: FOLDER/hypotheses.TARGET from its best checkpoint
generate() {
    local data=$1 folder=$2 target=$3
    shift 3
    fairseq-generate "$data" --user-dir "$DSQ_ROOT/fairseq_dsq" --path "$folder/checkpoint_best.pt" \
        --required-batch-size-multiple 1 "$@" > "$folder/generate.out" 2> "$folder/generate.err" \
        || fail "generation failed, see $folder/generate.err"
    grep '^D-' "$folder/generate.out" | LC_ALL=C sort -V | cut -f3 > "$folder/hypotheses.part"
    mv "$folder/hypotheses.part" "$folder/hypotheses.$target"
}

# score REFERENCE FOLDER DIGITS: sacreBLEU of FOLDER/hypotheses.*; kept where fairseq-dsq report finds it
score() {
    sacrebleu "$1" -i "$2/hypotheses.${1##*.}" -m bleu -w "$3" --force > "$2/score.json"
    sed -n 's/^ *"score": \([0-9.]*\).*/\1/p' "$2/score.json"
}

# use_env EXTRAS: makes .venv where it is missing, installs the package with these extras, activates. PYTHON names the
# interpreter to make it with; DSQ_ENV an environment (a folder with bin/) to use as it is instead.
use_env() {
    local extras=$1 venv=$DSQ_ROOT/.venv python stamp
    if [ -n "${DSQ_ENV:-}" ]; then
        PATH=$DSQ_ENV/bin:$PATH
        return
    fi
    if [ ! -x "$venv/bin/python" ]; then
        python=$(find_python)
        "$python" -m venv "$venv"
    fi
    # Installed already for this setup.py and these extras?
    stamp=$venv/.installed-$extras-$(cksum < "$DSQ_ROOT/setup.py" | cut -d' ' -f1)
    if [ ! -e "$stamp" ]; then
        echo "installing into $venv (once)"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$TORCH_PIN"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$TORCH_PIN" -e "$DSQ_ROOT${extras:+[$extras]}"
        touch "$stamp"
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
}
