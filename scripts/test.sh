#!/usr/bin/env bash
# Runs the whole test suite. Arguments go to pytest: `bash scripts/test.sh tests/unit -x`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env test
cd "$ROOT"
exec "$VENV/bin/python" -m pytest "$@"
