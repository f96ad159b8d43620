#!/usr/bin/env bash
# Makes the environment, or finds the one that is there. Sourced by quickstart.sh and test.sh; afterwards $PY is its Python.
#   VENV=path   where the environment lives (default: .venv in the repository)
#   PYTHON=path the Python to make it with (default: python3.11, the tested one, or a newer one on the PATH)
# An active virtual or conda environment that already holds everything is used as it is.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
case "$VENV" in /*) ;; *) VENV="$PWD/$VENV" ;; esac
PACKAGES="torch torchvision pytorch_lightning omegaconf open_clip einops h5py scipy sklearn taming requests torchmetrics numba
          safetensors tensorboard matplotlib PIL rich lmdb distributed pyarrow torch_fidelity pytest"

has_all() {  # is every package importable by Python $1?
    "$1" - $PACKAGES <<'PY' 2>/dev/null
import importlib.util, sys
sys.exit(sys.version_info < (3, 11) or any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))
PY
}

find_python() {
    local candidate candidates=(python3.11 python3.12 python3.13 python3 python)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.11 or newer with venv and pip was found (tried: ${candidates[*]})." >&2
    echo "Install one, or name it: PYTHON=/path/to/python bash $0" >&2
    return 1
}

make_environment() {
    local base stamp
    stamp="$(cat "$ROOT/setup.py" "$ROOT/constraints.txt" | cksum)"
    PY="$VENV/bin/python"
    if [ -f "$VENV/.stamp" ] && [ "$(cat "$VENV/.stamp")" = "$stamp" ]; then
        echo "Using the environment $VENV"
        return
    fi
    if [ ! -d "$VENV" ] && [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && has_all python; then
        PY="$(command -v python)"
        echo "Using the active environment ($PY)"
        return
    fi
    base="$(find_python)" || return 1
    echo "Making the environment $VENV with $("$base" --version); this downloads PyTorch and takes some minutes"
    # Without a working pip an earlier attempt was cut off while the environment was made: make it anew.
    "$PY" -m pip --version >/dev/null 2>&1 || "$base" -m venv --clear "$VENV" || return 1
    "$PY" -m pip install --quiet --disable-pip-version-check -c "$ROOT/constraints.txt" -e "$ROOT[dev,lmdb,cluster,parquet,fid]" || {
        echo "The installation failed. Mend what pip says above and run the same command again." >&2
        return 1
    }
    echo "$stamp" > "$VENV/.stamp"
}

make_environment || exit 1
cd "$ROOT" || exit 1
