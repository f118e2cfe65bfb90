#!/usr/bin/env bash
# The AVX-512 kernels, and AMX's packing and blocking over emulated tiles, on a CPU without AVX-512: built with SIMDe's
# emulation of it and run through their tests, once as on a CPU with AVX512-BF16 and once as on one without. Slow, and says nothing of speed. Arguments go to pytest.
# Needs g++ and SIMDe's headers (Debian: libsimde-dev), a CPU with AVX2 and FMA.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
show_help "$@"
use_env dev
export OMP_NUM_THREADS=1
[ $# -gt 0 ] || set -- tests/kernels/test_gemm.py tests/kernels/test_native.py tests/kernels/test_rows.py \
    tests/kernels/test_adam.py

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp -r "$DSQ_ROOT/fairseq_dsq" "$DSQ_ROOT/tests" "$DSQ_ROOT/configs" "$DSQ_ROOT/.pytest.ini" "$folder"
cd "$folder"
native=fairseq_dsq/kernels/native
source_number=$(python -c 'from fairseq_dsq.kernels import native; print(native.source_number())')
for lacks in nothing avx512bf16; do
    objects=()
    for source in cpu quantize rows adam masks gemm gemm_amx; do
        g++ -std=c++17 -O2 -mavx2 -mfma -ffp-contract=off -fPIC -fopenmp -Wno-psabi -include tests/kernels/emulated_avx512.h \
            "-DEMULATED_WITHOUT=\"$lacks\"" -DDSQ_ISA=avx512 "-DDSQ_SOURCE=${source_number}u" -c $native/$source.cpp -o $source.o
        objects+=("$source.o")
    done
    g++ -shared -fopenmp "${objects[@]}" -o $native/_kernels.so
    echo "emulated: AVX-512, of AVX512-VNNI and AVX512-BF16 lacks $lacks"
    FAIRSEQ_DSQ_ISA=avx512 PYTHONPATH=$folder python -m pytest -q -c .pytest.ini "$@"
done
