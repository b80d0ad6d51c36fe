#!/usr/bin/env bash
# Runs the whole test suite. Arguments go to pytest: `bash scripts/test.sh tests/unit -x`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env test
cd "$ROOT"
# A process a core; the tests of a file stay together, because they share what is costly to make. WORKERS=0 runs them in one process.
exec "$VENV/bin/python" -m pytest -n "${WORKERS:-auto}" --dist loadfile --durations=15 "$@"
