"""UDR: models that find the same units rank above one that does not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from ldm.data.factors import FactorSpace
from ldm.metrics import MetricError, udr
from ldm.metrics.udr import rank_correlations, relative_strength

SPACE = FactorSpace(("a", "b", "c"), (6, 6, 6))
FACTORS = SPACE.factors_of(np.arange(216)).astype(np.float64)


def fresh() -> np.random.RandomState:
    return np.random.RandomState(0)


@pytest.fixture
def models() -> list[np.ndarray]:
    """Three that agree up to order, sign and scale; the fourth turns the factors into one another."""
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    return [FACTORS, -FACTORS[:, [2, 0, 1]], 3 * FACTORS[:, [1, 2, 0]], FACTORS @ turn]


@pytest.mark.parametrize("kind", ["lasso", "spearman"])
def test_the_odd_one_out_ranks_last(models, kind):
    found = udr(models, SPACE, fresh(), correlation_matrix=kind)
    assert np.argmin(found["model_scores"]) == 3
    assert min(found["model_scores"][:3]) > 0.6
    assert np.shape(found["raw_correlations"]) == (4, 4, 3, 3)
    assert np.shape(found["pairwise_disentanglement_scores"]) == (4, 4, 1)
    assert np.array(found["raw_correlations"])[0, 1].argmax(axis=1).tolist() == [1, 2, 0]


def test_median_of_the_scores_against_the_others(models):
    found = udr(models, SPACE, fresh())
    column = np.array(found["pairwise_disentanglement_scores"])[:, 3, 0]
    assert found["model_scores"][3] == pytest.approx(np.median(column[:3]))


def test_units_that_say_nothing_are_left_out(models):
    silent = [np.column_stack([codes, np.random.default_rng(n).normal(size=216)]) for n, codes in enumerate(models[:3])]
    low = [np.array([1.0, 1.0, 1.0, 0.001])] * 3
    expected = udr(models[:3], SPACE, fresh())["model_scores"]
    assert udr(silent, SPACE, fresh(), kl=low)["model_scores"] == pytest.approx(expected)
    assert udr(silent, SPACE, fresh(), kl=low, filter_low_kl=False)["model_scores"][0] < expected[0]
    constant = [np.column_stack([codes, np.ones(216)]) for codes in models[:3]]
    assert udr(constant, SPACE, fresh())["model_scores"] == pytest.approx(expected)


def test_rank_correlations_are_spearmans():
    first, second = np.random.default_rng(0).normal(size=(2, 50, 3))
    expected = [[abs(spearmanr(a, b).statistic) for b in second.T] for a in first.T]
    assert rank_correlations(first, second) == pytest.approx(np.array(expected))


def test_relative_strength_by_hand():
    assert relative_strength(np.eye(3)) == 1.0
    assert relative_strength(np.array([[0.5, 0.5], [0.0, 0.0]])) == pytest.approx((0.5 + 0.25 / 2) / 2)
    assert relative_strength(np.zeros((0, 2))) == 0.0


def test_what_cannot_be_ranked_says_why(models):
    with pytest.raises(MetricError, match="at least 2 models to compare, got 1"):
        udr(models[:1], SPACE, fresh())
    with pytest.raises(MetricError, match=r"the same number of units, got \[3, 2\]"):
        udr([FACTORS, FACTORS[:, :2]], SPACE, fresh())
    with pytest.raises(MetricError, match="multiple of batch_size"):
        udr(models, SPACE, fresh(), num_data_points=15)
    with pytest.raises(MetricError, match="divergences for each of 4 models"):
        udr(models, SPACE, fresh(), kl=[np.ones(3)])
    with pytest.raises(MetricError, match="expected one of lasso, spearman"):
        udr(models, SPACE, fresh(), correlation_matrix="pearson")
