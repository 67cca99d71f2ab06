#!/usr/bin/env bash
# Everything that CI checks: lint, format, types, tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ensure_env dev
export OMP_NUM_THREADS=1
.venv/bin/python -m ruff check --quiet .
.venv/bin/python -m ruff format --check --quiet .
.venv/bin/python -m mypy --no-error-summary
.venv/bin/python -m pytest -q -n "${TEST_WORKERS:-2}" "$@"
