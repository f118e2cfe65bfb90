#!/usr/bin/env bash
# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: built anew in a temporary folder and run through
# their tests, once for every instruction set that this CPU has. Silent memory errors end the run. Arguments go to pytest.
# Needs g++ and its libasan.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
show_help "$@"
use_env dev
export OMP_NUM_THREADS=1
[ $# -gt 0 ] || set -- tests/kernels/test_bounds.py tests/kernels/test_native.py tests/kernels/test_packing.py \
    tests/kernels/test_rows.py tests/kernels/test_adam.py tests/kernels/test_gemm.py tests/nn/test_threads.py

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp -r "$DSQ_ROOT/fairseq_dsq" "$DSQ_ROOT/tests" "$DSQ_ROOT/configs" "$DSQ_ROOT/.pytest.ini" "$DSQ_ROOT/setup.py" \
    "$DSQ_ROOT/README.md" "$folder"
cd "$folder"
rm -f fairseq_dsq/kernels/native/_kernels.so
# -O3 takes the compiler several times as long.
sanitizers="-O1 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer"
CC=g++ CXX=g++ CFLAGS="$sanitizers" CXXFLAGS="$sanitizers" LDFLAGS="$sanitizers" python setup.py --quiet build_ext --inplace
nm -D fairseq_dsq/kernels/native/_kernels.so | grep __asan_ > /dev/null || fail "the kernels were built without AddressSanitizer"

# Python and torch keep memory until the end, and threads of OpenMP too: what leaks is not looked at.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$folder
preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
for isa in avx512 avx2 baseline; do
    if ! FAIRSEQ_DSQ_ISA=$isa LD_PRELOAD=$preload python -c 'import fairseq_dsq.kernels.native' 2> import.err; then
        grep -q 'this CPU does not run it' import.err || { cat import.err >&2; fail "$isa: cannot be loaded"; }
        echo "$isa: this CPU does not run it"
        continue
    fi
    echo "$isa: under AddressSanitizer and UndefinedBehaviorSanitizer"
    # A report goes to standard error, which pytest must leave alone.
    FAIRSEQ_DSQ_ISA=$isa LD_PRELOAD=$preload python -m pytest -q --capture=no -c .pytest.ini -p no:cacheprovider \
        -p no:faulthandler "$@" || fail "$isa: see above"
done
