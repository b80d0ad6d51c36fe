# Sourced by demo.sh and test.sh: makes .venv and installs circuitkit into it with exact versions. Fast when that was done before.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Expected Python 3.10 or newer with the venv module; none was found. Install python3 and python3-venv, or set PYTHON." >&2
    return 1
}

# setup_env [EXTRAS]: for example `setup_env test`.
setup_env() {
    local extras="${1:-}" python stamp
    if [ ! -x "$VENV/bin/python" ]; then
        python="$(find_python)" || return 1
        echo "Making $VENV" >&2
        "$python" -m venv "$VENV"
    fi
    stamp="$VENV/.installed-${extras:-base}-$(cat "$ROOT/constraints.txt" "$ROOT/setup.cfg" "$ROOT/pyproject.toml" | cksum | tr -d ' ')"
    [ -e "$stamp" ] && return
    echo "Installing circuitkit into $VENV (a few minutes the first time)" >&2
    # torch first and alone, so that no other build of it is pulled in.
    "$VENV/bin/python" -m pip install -qq torch==2.13.0 -c "$ROOT/constraints.txt"
    "$VENV/bin/python" -m pip install -qq -e "$ROOT${extras:+[$extras]}" -c "$ROOT/constraints.txt"
    touch "$stamp"
}
