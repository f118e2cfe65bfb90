#!/usr/bin/env bash
# Multi30k German-English in every number format, everywhere and for the stash alone: every row of
# configs/methods/formats.yaml with the same updates. Hours on two cores; JOBS (2) runs go side by side, and what is done
# is not repeated. The corpus lies in DSQ_DATA. --status says how far it is, --dry-run prints the commands; what follows
# -- goes to fairseq-train.
set -euo pipefail
# shellcheck source=scripts/table.sh
. "$(dirname "${BASH_SOURCE[0]}")/table.sh"
use_tables multi30k "$@"
train formats formats 1
exit "$failed"
