"""DCI: rows read, threads, and codes that cannot be scored."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.data.factors import FactorSpace
from ldm.metrics import MetricError, dci
from ldm.metrics.boosting.classifier import sort_codes
from ldm.metrics.dci import dci_factor, factor_importance

FEW = {"num_train": 200, "num_test": 100}


@pytest.fixture(scope="module")
def space() -> FactorSpace:
    return FactorSpace(("hue", "shape", "size"), (5, 4, 3))


@pytest.fixture(scope="module")
def codes(space) -> np.ndarray:
    rng = np.random.default_rng(2)
    factors = space.factors_of(np.arange(space.size))
    return factors @ rng.normal(size=(3, 4)) + 0.3 * rng.normal(size=(space.size, 4))


def fresh() -> np.random.RandomState:
    return np.random.RandomState(0)


def test_only_the_rows_drawn_are_read(codes, space):
    read = []

    def representation(rows: np.ndarray) -> np.ndarray:
        read.extend(rows)
        return codes[rows]

    found = dci(representation, space, fresh(), **FEW)
    assert len(read) == 300
    assert found == dci(codes, space, fresh(), **FEW)


def test_threads_change_nothing(codes, space):
    assert dci(codes, space, fresh(), **FEW, num_threads=2) == dci(codes, space, fresh(), **FEW)
    assert dci_factor(codes, space, fresh(), 1, **FEW, num_threads=2) == dci_factor(codes, space, fresh(), 1, **FEW)


def test_whole_numbers_are_codes_too(space):
    factors = space.factors_of(np.arange(space.size))
    assert min(dci(factors, space, fresh(), **FEW).values()) > 0.99


def test_a_value_that_only_the_test_sample_shows_counts_as_wrong():
    codes = np.arange(40.0)[:, None] % 2 * [1.0, 0.5]
    labels = (np.arange(40) % 2)[:, None]
    test_labels = np.where(np.arange(40)[:, None] < 10, 7, labels)
    found = factor_importance(sort_codes(codes), labels, codes, test_labels, 0)
    assert (found["train_accuracy"], found["test_accuracy"]) == (1.0, 0.75)
    assert sum(found["importance"]) == pytest.approx(1.0)


def test_codes_that_are_not_finite_are_named(codes, space):
    broken = codes.copy()
    broken[:, 2] = np.nan
    with pytest.raises(MetricError, match="got nan in unit 2"):
        dci(broken, space, fresh(), **FEW)
