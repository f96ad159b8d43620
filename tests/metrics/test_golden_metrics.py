"""The reference's figures on a fixed representation of Shapes3D's factor space."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ldm.data.factors import FactorSpace, factor_space
from ldm.metrics import beta_vae, dci, factor_vae, irs, med, mig, modularity_explicitness, sap, unsupervised

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


@pytest.mark.parametrize("is_continuous,key,tolerance", [(True, "sap_cont", 1e-9), (False, "sap_disc", 0.01)])
def test_sap(representation, space, is_continuous, key, tolerance):
    found = sap(
        representation, space, np.random.RandomState(0), num_train=1000, num_test=500, continuous_factors=is_continuous
    )
    assert found == pytest.approx(GOLDEN[key], abs=tolerance)


def test_modularity_explicitness(representation, space):
    found = modularity_explicitness(representation, space, np.random.RandomState(0), num_train=1000, num_test=500)
    assert found == pytest.approx(GOLDEN["modularity"], abs=0.01)
    assert found["modularity_score"] == pytest.approx(GOLDEN["modularity"]["modularity_score"], abs=1e-9)


def test_irs(representation, space):
    found = irs(representation, space, np.random.RandomState(0), num_train=1000)
    assert found.pop("num_active_true") == 8
    assert found == pytest.approx(GOLDEN["irs"], rel=1e-9)


def test_unsupervised(representation, space):
    found = unsupervised(representation, space, np.random.RandomState(0), num_train=1000)
    assert found == pytest.approx(GOLDEN["unsup"], rel=1e-9)


def test_med(representation, space):
    found = med(representation, space, np.random.RandomState(0), num_train=1000, num_test=500)
    assert found == pytest.approx(GOLDEN["med"], abs=0.01)
    exact = [name for name in found if not name.startswith("informativeness")]
    assert [found[name] for name in exact] == pytest.approx([GOLDEN["med"][name] for name in exact], abs=1e-9)
