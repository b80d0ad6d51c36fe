#!/usr/bin/env bash
# Finds the circuits of numerals, number words and months in an embedded model, and what they share.
# Arguments are passed on: `bash scripts/demo.sh model=gpt2 dir=runs/gpt2`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env
exec "$VENV/bin/circuitkit" job=demo "$@"
