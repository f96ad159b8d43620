#!/usr/bin/env bash
# Creates the environment and runs the fast tests in two processes (TEST_PROCESSES). Further arguments are passed to pytest:
#   bash scripts/test.sh -m slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PY" -m pytest --numprocesses "${TEST_PROCESSES:-2}" --dist loadfile "$@"
