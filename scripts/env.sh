# Sourced by the other scripts: their flags and errors, their environment, and fairseq's commands as they call them.

DSQ_ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
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
    fail "unknown argument $1 (--help lists the flags)" 2
}

# check_integers LEAST NAMES...: the values of these flags
check_integers() {
    local least=$1 name value
    shift
    for name in "$@"; do
        value=${name//-/_} value=${!value}
        [[ $value =~ ^[0-9]{1,9}$ ]] && [ "$((10#$value))" -ge "$least" ] \
            || fail "--$name: got '$value', expected an integer >= $least" 2
    done
}

# slug TEXT: TEXT as a part of a file's name; fairseq's options would split paths at colons and commas
slug() {
    printf %s "$1" | LC_ALL=C sed -E 's/\] *\[/_/g; s/[^A-Za-z0-9._]+/-/g; s/^-+|-+$//g'
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

# train FOLDER DATA FLAGS...: fairseq-train in FOLDER, unless it is done; its output is added to FOLDER/train.log
train() {
    local folder=$1 code=0
    shift
    fairseq-dsq run-train "$folder" -- "$@" || code=$?
    [ "$code" -ne 1 ] || fail "training failed, see $folder/train.log"
    return "$code"
}

# translate FOLDER REFERENCE DIGITS DATA FLAGS...: prints sacreBLEU of FOLDER's best checkpoint; the translations are in
# FOLDER/hypotheses.*, the score where fairseq-dsq report finds it
translate() {
    local folder=$1 reference=$2 digits=$3 code=0
    shift 3
    fairseq-dsq run-translate --digits "$digits" "$folder" "$reference" -- "$@" --required-batch-size-multiple 1 || code=$?
    [ "$code" -ne 1 ] || fail "generation failed, see $folder/generate.out"
    return "$code"
}

# use_env EXTRAS: makes .venv where it is missing, installs the package with these extras, activates. PYTHON names the
# interpreter to make it with; DSQ_ENV an environment (a folder with bin/) to use as it is instead.
use_env() {
    local extras=$1 venv=$DSQ_ROOT/.venv python stamp lock
    if [ -n "${DSQ_ENV:-}" ]; then
        PATH=$DSQ_ENV/bin:$PATH
        return
    fi
    # Installed already for this setup.py and these extras?
    stamp=$venv/.installed-$extras-$(cksum < "$DSQ_ROOT/setup.py" | cut -d' ' -f1)
    if [ ! -e "$stamp" ]; then
        mkdir -p "$venv"
        exec {lock}< "$venv"
        flock "$lock"  # two scripts at once: the second waits
    fi
    if [ ! -e "$stamp" ]; then
        if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
            python=$(find_python)
            "$python" -m venv --clear "$venv"
        fi
        echo "installing into $venv (once)"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$TORCH_PIN"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$TORCH_PIN" -e "$DSQ_ROOT${extras:+[$extras]}"
        touch "$stamp"
    fi
    [ -z "${lock:-}" ] || exec {lock}<&-
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
}
