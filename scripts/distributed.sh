#!/usr/bin/env bash
# Several workers of one fairseq-train command, on this CPU or one host of several; see --help.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
show_help_of "$DSQ_ROOT/scripts/distributed.py" "$@"
use_env ""
exec python "$DSQ_ROOT/scripts/distributed.py" "$@"
