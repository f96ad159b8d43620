#!/usr/bin/env bash
# From nothing to scores and pictures: makes the environment, then runs the quickstart recipe. Run it again to go on
# where it stopped. Further arguments go to main.py, e.g.  bash scripts/quickstart.sh -l /data/logs/quickstart
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PY" main.py --recipe configs/quickstart/recipe.yaml "$@"
