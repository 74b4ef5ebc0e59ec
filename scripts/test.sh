#!/usr/bin/env bash
# All checks, in a virtual environment of their own: linters, types, import layers, tests.
#
#   bash scripts/test.sh [pytest arguments]        e.g. bash scripts/test.sh tests/graph -x
#
# TEST_WORKERS sets the number of test processes (default: one for each core, four at most).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
make_venv .venv-test test

bin="$(dirname "$PYTHON")"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports"

cores="$("$PYTHON" -c 'import os; print(min(4, os.cpu_count() or 1))')"
# One thread for each worker: tiny models gain nothing from more, and the workers share the cores.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$PYTHON" -m pytest -n "${TEST_WORKERS:-$cores}" --dist worksteal "$@"
