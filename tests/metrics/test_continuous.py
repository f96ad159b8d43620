"""Division of continuous factors into bins, and the values behind labels."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.data.factors import FactorSpace
from ldm.metrics import FactorTable, MetricError, discretize
from ldm.metrics.common import histogram_codes
from ldm.metrics.sampling.continuous import quantities, quantity_codes

COLUMN = np.random.default_rng(0).exponential(size=500)


def test_equal_width_is_disentanglement_libs():
    bins, name = discretize(COLUMN, "equal_width", 20)
    assert np.array_equal(bins + 1, histogram_codes(COLUMN[:, None], 20)[:, 0]) and name == "20 bins of equal width"
    assert bins.dtype == np.int64 and (bins.min(), bins.max()) == (0, 19)


def test_equal_frequency():
    bins, name = discretize(COLUMN, "equal_frequency", 5)
    assert np.bincount(bins).tolist() == [100] * 5 and name == "5 bins of equal frequency"
    tied = discretize([0, 0, 0, 0, 0, 0, 1, 2], "equal_frequency", 4)[0]
    assert len(set(tied[:6].tolist())) == 1 and tied[-1] > tied[0]


def test_edges():
    bins, name = discretize([-1, 0, 0.5, 3], "edges", [0, 1.5])
    assert bins.tolist() == [0, 1, 1, 2] and name == "edges 0, 1.5"


def test_a_constant_column_has_one_bin():
    for how in ("equal_width", "equal_frequency"):
        assert len(np.unique(discretize(np.full(9, 2.5), how, 4)[0])) == 1


@pytest.mark.parametrize(
    "column,how,bins,message",
    [
        (["a", "b"], "equal_width", 3, "expected .N,. numbers"),
        (np.ones((3, 2)), "equal_width", 3, "of shape .3, 2."),
        ([], "equal_width", 3, "of shape .0,."),
        ([0.0, np.nan], "equal_width", 3, "got nan in row 1"),
        ([0.0, 1.0], "equal_widht", 3, "Did you mean 'equal_width'"),
        ([0.0, 1.0], "equal_width", 1, "2 to 1000 bins, got 1"),
        ([0.0, 1.0], "equal_frequency", 2.5, "2 to 1000 bins, got 2.5"),
        ([0.0, 1.0], "edges", [], "ascending finite edges"),
        ([0.0, 1.0], "edges", [1, 1], "ascending finite edges"),
        ([0.0, 1.0], "edges", 4, "ascending finite edges"),
        ([0.0, 1.0], "edges", ["low", "high"], "ascending finite edges"),
        ([0.0, 1.0], "equal_width", 10**12, "2 to 1000 bins, got 1000000000000"),
    ],
)
def test_columns_and_bins_that_cannot_be_used(column, how, bins, message):
    with pytest.raises(MetricError, match=message):
        discretize(column, how, bins)


def test_quantities_are_the_values_where_there_are_numbers():
    table = FactorTable(np.array([["a", 0.5], ["b", 2.0], ["a", 2.0], ["b", 9.0]], dtype=object))
    labels = np.array([[0, 2], [1, 0]])
    assert quantities(table, labels).tolist() == [[0, 9.0], [1, 0.5]]
    assert quantities(FactorSpace("ab", (2, 3)), labels).tolist() == [[0, 2], [1, 0]]


def test_samples_are_scaled_by_the_training_sample():
    space = FactorSpace("ab", (9, 7))
    factors = space.factors_of(np.arange(63))
    units = np.column_stack([factors * 1e-3, np.full(63, 0.1)]).astype(np.float32)
    codes, values, test_codes, test_values = quantity_codes(units, space, 500, 300, np.random.RandomState(0), "R2")
    assert np.allclose(codes[:, :2], values, atol=1e-4) and np.allclose(test_codes[:, :2], test_values, atol=1e-4)
    assert not codes[:, 2].any() and np.allclose(values.std(axis=0), 1) and test_values.shape == (300, 2)
