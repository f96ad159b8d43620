"""The registry of metrics: names, headings and directions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ldm.metrics.registry import ALL_METRICS, METRICS, monitor_direction

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name",
    [
        "val/mig",
        "val/sap",
        "val/irs",
        "val/med",
        "val/modularity_explicitness",
        "val/dci",
        "val/dci_disentanglement",
        "val/dci_completeness_epoch",
        "val/factor_vae_score",
        "val/factor_vae",
        "val/beta_vae_sklearn",
        "val/beta_VAE",
        "mig",
        "test/fast/MIG_step",
    ],
)
def test_scores_that_improve_upwards(name):
    assert monitor_direction(name) == "max"


@pytest.mark.parametrize("name", ["val/unsupervised", "val/mutual_info_score", "val/fairness"])
def test_scores_that_improve_downwards(name):
    assert monitor_direction(name) == "min"


@pytest.mark.parametrize("name", ["val/rec_loss", "val/loss_simple_ema", "val/", "", "val/mig_loss", "epoch_num"])
def test_other_names_have_no_direction(name):
    assert monitor_direction(name) is None


def test_entries_are_complete_and_unambiguous():
    keys = [metric.key for metric in ALL_METRICS.values()]
    headings = [metric.heading for metric in ALL_METRICS.values()]
    assert len(set(keys)) == len(keys) and len(set(headings)) == len(headings)
    for name, metric in ALL_METRICS.items():
        assert monitor_direction(f"val/{metric.logged}") == ("max" if metric.higher_is_better else "min")
        assert metric.fast, f"{name} has no settings for protocol fast"
    assert METRICS.keys() < ALL_METRICS.keys()


def test_importing_the_registry_loads_neither_scikit_learn_nor_numba_nor_torch():
    code = "import ldm.metrics.registry, sys; sys.exit(bool({'sklearn', 'numba', 'torch', 'scipy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
