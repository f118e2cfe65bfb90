# Sourced by the other scripts: their errors and their environment.

DSQ_ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
TORCH_PIN=torch==2.13.0

# fail MESSAGE [CODE]: one line, and out
fail() {
    echo "${0##*/}: error: $1" >&2
    exit "${2:-1}"
}

# show_help "$@": with -h or --help, what the script says of itself in its first lines, and out; nothing is installed
show_help() {
    case "${1:-}" in
        -h | --help) sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//; p}' "$0"; exit ;;
    esac
}

# show_help_of PROGRAM "$@": the same, of a Python program that imports nothing but Python's own
show_help_of() {
    case "${2:-}" in
        -h | --help) exec "$(find_python)" "$1" --help ;;
    esac
}

find_python() {
    local candidate
    local -a candidates=(python3.11 python3.12 python3)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    [ -z "${PYTHON:-}" ] || fail "PYTHON: got $PYTHON, and no Python 3.11 or 3.12 by it; expected the path of one"
    fail "found no Python 3.11 or 3.12; set PYTHON to one"
}

# use_env EXTRAS: makes .venv where it is missing, installs the package with these extras, activates. PYTHON names the
# interpreter to make it with; DSQ_ENV an environment (a folder with bin/) to use as it is instead.
use_env() {
    local extras=$1 venv=$DSQ_ROOT/.venv sum python stamp lock
    if [ -n "${DSQ_ENV:-}" ]; then
        [ -d "$DSQ_ENV/bin" ] || fail "DSQ_ENV: got $DSQ_ENV, expected the folder of an environment, with bin/"
        PATH=$(CDPATH='' cd -- "$DSQ_ENV" && pwd)/bin:$PATH
        return
    fi
    # Installed already of these sources and for these extras, or all of them?
    sum=$({ echo "$TORCH_PIN"; cat "$DSQ_ROOT"/setup.py "$DSQ_ROOT"/fairseq_dsq/kernels/native/*.{cpp,h}; } | cksum)
    sum=${sum%% *}
    stamp=$venv/.installed-$extras-$sum
    [ -e "$stamp" ] || [ ! -e "$venv/.installed-dev,glue-$sum" ] || stamp=$venv/.installed-dev,glue-$sum
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
