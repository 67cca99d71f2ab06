# Sourced by test.sh and demo.sh. Changes to the top of the clone and gives `ensure_env EXTRAS`, which
# creates .venv there and installs the package into it once for each set of extras and dependencies.
# Set PYTHON to choose the interpreter that .venv is made with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ensure_env() {
    local extras=$1 base=${PYTHON:-python3} log=.venv/install.log stamp wanted
    if [ ! -x .venv/bin/python ]; then
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "expected Python 3.10 or newer, got $("$base" --version); set PYTHON" >&2
            return 1
        }
        "$base" -m venv .venv
    fi
    stamp=.venv/installed-${extras//,/-}
    wanted=$(cat setup.py constraints.txt | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing the package and its dependencies into .venv (log: $log)"
        .venv/bin/python -m pip install -c constraints.txt -e ".[$extras]" >"$log" 2>&1 || {
            tail -n 20 "$log" >&2
            return 1
        }
        echo "$wanted" >"$stamp"
    fi
}
