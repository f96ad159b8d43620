#!/usr/bin/env bash
# Trains and scores the quickstart recipe: creates the environment, then runs all stages. The same command continues an
# interrupted run. Further arguments are passed to main.py: bash scripts/quickstart.sh -l /data/logs/quickstart
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PY" main.py --recipe configs/quickstart/recipe.yaml "$@"
