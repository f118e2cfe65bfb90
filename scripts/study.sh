#!/usr/bin/env bash
# The paper's tables at the size that a CPU reaches: Table 1 on Multi30k (three seeds) and IWSLT14, then the stashing
# precisions, the gradient's precision and what the paper leaves open, on Multi30k. 15 to 90 minutes a run on one core;
# JOBS (2) runs go side by side. What is done is not repeated, and a run that was stopped goes on. The corpora lie in
# DSQ_DATA. --status says how far it is, --dry-run prints the commands; what follows -- goes to fairseq-train.
set -euo pipefail
# shellcheck source=scripts/table.sh
. "$(dirname "${BASH_SOURCE[0]}")/table.sh"
use_tables "multi30k iwslt14_de-en" "$@"
all="table1 table4 table5 ablations"
if [ ${#mode[@]} = 0 ]; then  # what matters most comes first
    train study-multi30k table1 ""
    train study-iwslt14 table1 ""
    train study-multi30k "$all" ""
else
    train study-multi30k "$all" ""
    train study-iwslt14 table1 ""
fi
exit "$failed"
