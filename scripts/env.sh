# Sourced by the other scripts: makes .venv where it is missing, installs the package with the named extras, activates.
# PYTHON names the interpreter to make it with; DSQ_ENV an environment (a folder with bin/) to use as it is instead.

DSQ_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TORCH_PIN=torch==2.13.0

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.12 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "${0##*/}: error: found no Python 3.11 or 3.12; set PYTHON to one" >&2
    return 1
}

# score REFERENCE FOLDER DIGITS: sacreBLEU of FOLDER/hypotheses.en; kept where fairseq-dsq report finds it
score() {
    sacrebleu "$1" -i "$2/hypotheses.en" -m bleu -w "$3" --force > "$2/score.json"
    sed -n 's/^ *"score": \([0-9.]*\).*/\1/p' "$2/score.json"
}

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
