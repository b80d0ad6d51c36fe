#!/usr/bin/env bash
# Makes .bench/transformer_lens, an environment of its own for the competitor. Run it once: bash scripts/bench/transformer_lens/setup.sh
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
VENV="$ROOT/.bench/transformer_lens"
PYTHON="${PYTHON:-$ROOT/.venv/bin/python}"

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
# torch first and alone, the build that circuitkit runs with, so that both race on the same kernels.
"$VENV/bin/python" -m pip install -q torch==2.13.0
"$VENV/bin/python" -m pip install -q torch==2.13.0 transformers==5.23.0 transformer-lens==4.3.0
"$VENV/bin/python" -c 'import importlib.metadata as m; print("transformer-lens", m.version("transformer-lens"), "torch", m.version("torch"))'
