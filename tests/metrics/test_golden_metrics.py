"""The reference's figures on a fixed representation of Shapes3D's factor space."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ldm.data.factors import FactorSpace, factor_space
from ldm.metrics import beta_vae, dci, factor_vae, mig

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def space() -> FactorSpace:
    return factor_space("shapes3d")


@pytest.fixture(scope="module")
def representation(space) -> np.ndarray:
    """Six scaled factors, a sum of two, and a unit too small to count; a fixed sine stands in for noise."""
    rows = np.arange(space.size)
    factors = space.factors_of(rows) / np.array(space.factors_num_values)
    units = np.column_stack([factors, factors[:, 0] + factors[:, 5], np.zeros(space.size)])
    units += 0.05 * np.sin(rows[:, None] * np.arange(1, 9) * 0.7390851)
    units[:, 7] = 0.001 * np.sin(rows * 8 * 0.7390851)
    return units


def test_first_draws(space):
    assert space.sample_factors(3, np.random.RandomState(0)).tolist() == GOLDEN["first_factors"]
    factors, rows = space.sample(4, np.random.RandomState(0))
    assert [factors.tolist(), rows.tolist()] == GOLDEN["first_sample"]


def test_index_rule():
    cars, mpi = factor_space("cars3d"), factor_space("mpi3d")
    assert cars.index_of(np.array([[1, 2, 3], [3, 23, 182]])).tolist() == GOLDEN["cars_index"]
    assert mpi.index_of(np.array([[1, 2, 1, 0, 2, 3, 4]])).tolist() == GOLDEN["mpi_index"]


def test_factor_vae(representation, space):
    found = factor_vae(
        representation, space, np.random.RandomState(0), num_train=1000, num_eval=500, num_variance_estimate=1000
    )
    assert found == GOLDEN["factor_vae"] | {"num_active_true": 7}


def test_beta_vae(representation, space):
    found = beta_vae(representation, space, np.random.RandomState(0), num_train=1000, num_eval=500)
    assert found == GOLDEN["beta_vae"]


def test_mig(representation, space):
    found = mig(representation, space, np.random.RandomState(0), num_train=1000)
    assert found == pytest.approx(GOLDEN["mig"], abs=1e-12)


def test_dci(representation, space):
    found = dci(representation, space, np.random.RandomState(0), num_train=500, num_test=250)
    assert found == pytest.approx(GOLDEN["dci"], abs=0.02)
