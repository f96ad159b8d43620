"""DCI: rows read, threads, and codes that cannot be scored."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from ldm.data.factors import FactorSpace
from ldm.metrics import FactorTable, MetricError, dci
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


def tied(seed: int) -> tuple[np.ndarray, FactorTable]:
    """Rounded codes with copies, for which many splits are equally good."""
    random = np.random.default_rng(seed)
    factors = random.integers(4, size=(300, 3))
    codes = np.round(factors + 0.5 * random.normal(size=(300, 3)))
    return np.column_stack([codes, codes[:, 0], codes[:, 1] ** 3, -codes[:, 2]]), FactorTable(factors)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_do_not_depend_on_the_order_of_the_units(seed):
    codes, table = tied(seed)
    expected = dci(codes, table, fresh(), **FEW)
    for order in ([5, 4, 3, 2, 1, 0], [3, 1, 2, 0, 4, 5], [4, 0, 5, 1, 3, 2]):
        found = dci(codes[:, order], table, fresh(), **FEW)
        assert found == pytest.approx(expected, abs=1e-12)


COLD = """
import json, numpy as np
from ldm.metrics import FactorTable, dci
random = np.random.default_rng(0)
factors = random.integers(5, size=(500, 3))
codes = np.round(factors @ random.normal(size=(3, 6)) + 0.3 * random.normal(size=(500, 6)), 1)
print(json.dumps(dci(codes, FactorTable(factors), np.random.RandomState(0), num_train=1500, num_test=500)))
"""


@pytest.mark.slow
def test_compiled_code_and_cached_code_give_the_same_bits(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    found = [
        subprocess.run([sys.executable, "-c", COLD], env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert list(tmp_path.rglob("*.nbi")) and found[0] == found[1]
