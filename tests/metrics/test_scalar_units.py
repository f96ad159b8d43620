"""Latents to scalar units: equal to scikit-learn's exact PCA, frugal, and clear about bad values."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from sklearn.decomposition import PCA

from ldm.metrics import MetricError, representation
from ldm.metrics.representation import scalar_units, scale_note, standardize


@pytest.fixture
def latents() -> np.ndarray:
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.2, 3, size=(4, 10))
    return (rng.normal(size=(500, 4, 10)) * scales + rng.normal(size=(4, 10))).astype(np.float32)


def test_equals_exact_pca(latents):
    expected = [PCA(1, svd_solver="full").fit_transform(latents[:, unit].astype(np.float64)) for unit in range(4)]
    expected = np.column_stack(expected)
    found = scalar_units(latents)
    signs = np.sign((found * expected).sum(axis=0))
    assert np.abs(found - signs * expected).max() < 1e-5


def test_largest_loading_is_positive(latents):
    latents[:, 0] = 0.1 * latents[:, 0]
    latents[:, 0, 3] = -np.linspace(0, 5, 500)
    assert np.corrcoef(scalar_units(latents)[:, 0], latents[:, 0, 3])[0, 1] > 0.99
    assert np.allclose(scalar_units(-latents), -scalar_units(latents))


def test_blocks_change_nothing(latents, monkeypatch):
    whole = scalar_units(latents)
    monkeypatch.setattr("ldm.metrics.representation.BLOCK_VALUES", 40 * 7)
    assert np.allclose(scalar_units(latents), whole, atol=1e-10)


def test_memory_mapped_latents(latents, tmp_path):
    np.save(tmp_path / "latents.npy", latents)
    assert np.array_equal(scalar_units(np.load(tmp_path / "latents.npy", mmap_mode="r")), scalar_units(latents))


def test_scalars_are_used_as_they_are(latents):
    scalars = latents[:, :, 0]
    assert scalar_units(scalars) is scalars


def test_one_value_per_unit_is_only_centred(latents):
    column = latents[:, :, :1]
    assert np.allclose(scalar_units(column), column[:, :, 0] - column[:, :, 0].mean(axis=0), atol=1e-6)


def test_unit_that_never_varies_gives_zeros(latents):
    latents[:, 2] = 0.1
    found = scalar_units(latents)
    assert not found[:, 2].any()
    assert (found[:, [0, 1, 3]].std(axis=0) > 0.1).all()


@pytest.mark.parametrize("shape", [(500, 4, 10), (500, 4)])
@pytest.mark.parametrize("value,name", [(np.nan, "nan"), (-np.inf, "-inf")])
def test_values_that_are_not_finite_are_named(shape, value, name, monkeypatch):
    monkeypatch.setattr("ldm.metrics.representation.BLOCK_VALUES", 1000)
    latents = np.ones(shape, dtype=np.float32)
    latents[412:, 3] = value
    latents[430, 1] = value
    with pytest.raises(MetricError, match=f"{name} in unit 3, first in row 412"):
        scalar_units(latents)


@pytest.mark.parametrize("shape", [(5,), (5, 2, 3, 1), (0, 2), (4, 0, 2)])
def test_shapes_that_are_no_representation(shape):
    with pytest.raises(MetricError, match="expected shape"):
        scalar_units(np.zeros(shape))


def test_metrics_never_import_torch():
    code = "import ldm.metrics, ldm.metrics.representation, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_scale_is_found_and_changed_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(representation, "BLOCK_VALUES", 10_000)
    units = np.random.default_rng(0).normal(3.0, [[0.01] * 63 + [0.0]], size=(5000, 64)).astype(np.float32)
    np.save(tmp_path / "units.npy", units)
    mapped = np.load(tmp_path / "units.npy", mmap_mode="r")
    out = np.lib.format.open_memmap(tmp_path / "out.npy", "w+", np.float64, units.shape)
    tracemalloc.start()
    note, found = scale_note(mapped), standardize(mapped, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < units.nbytes / 2 and "0 of 64 units are active" in note and found is out
    wide = units[:, :63].astype(np.float64)
    assert np.allclose(found[:, :63], (wide - wide.mean(axis=0)) / wide.std(axis=0)) and not found[:, 63].any()
    assert np.array_equal(standardize(units), found)
