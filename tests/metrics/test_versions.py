"""Scores are equal with the oldest and the newest scikit-learn, numba, numpy and scipy that setup.py allows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("scikit-learn", "numba", "numpy", "scipy", "einops")
ITERATED = ("beta_VAE", "modularity_explicitness", "MED")
SCORES = """
import json
import numpy as np
from ldm.metrics import METRICS, FactorTable, evaluate

random = np.random.default_rng(0)
grid = np.stack(np.meshgrid(*map(np.arange, (5, 4, 3)), indexing="ij"), axis=-1).reshape(-1, 3)
rows = random.integers(4, size=(400, 3))
arrays = {
    "perfect": (grid.astype(float), grid),
    "rotated": (grid @ random.normal(size=(3, 4)) + 0.2 * random.normal(size=(60, 4)), grid),
    "tied": (np.round(rows + 0.5 * random.normal(size=rows.shape)), rows),
    "noisy": (rows @ random.normal(size=(3, 6)) + random.normal(size=(400, 6)), rows),
}
print(json.dumps({name: evaluate(*pair, list(METRICS), protocol="fast") for name, pair in arrays.items()}))
"""


def oldest():
    """Return the lower bounds of setup.py as requirements of exactly these versions."""
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "setup.py").read_text()))
    return [f"{name}=={bounds[name]}" for name in PACKAGES]


def scores_with(folder, requirements):
    """Return the scores computed in an environment of its own, or skip if no package index can be reached."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", *requirements, "omegaconf"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{', '.join(requirements)} cannot be installed: {done.stderr.strip()[-300:]}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(folder / "numba")}
    done = subprocess.run([python, "-W", "ignore", "-c", SCORES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_oldest_and_newest_packages_give_equal_scores(tmp_path):
    old, new = scores_with(tmp_path / "old", oldest()), scores_with(tmp_path / "new", PACKAGES)
    for name, expected in new.items():
        for key, result in expected.items():
            # logistic regressions stop after 100 iterations, where versions differ: a few of 1,000 points
            tolerance = 3e-3 if key in ITERATED else 1e-11
            assert old[name][key] == pytest.approx(result, abs=tolerance, rel=1e-12), (name, key)
