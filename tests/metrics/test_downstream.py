"""Downstream tasks: keys and draws of the reference, what perfect, blind and unfair codes score."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.data.factors import FactorSpace
from ldm.metrics import FactorTable, MetricError, downstream_task, fairness, reduced_downstream_task
from ldm.metrics.downstream import group_distances

SPACE = FactorSpace(("hue", "shape"), (4, 3))
FACTORS = SPACE.factors_of(np.arange(12))
PERFECT = FACTORS.astype(np.float64)
TREES = {"predictor": "gradient_boosting_classifier"}


def fresh() -> np.random.RandomState:
    return np.random.RandomState(0)


@pytest.mark.parametrize("predictor", ["logistic_regression_cv", "gradient_boosting_classifier"])
def test_perfect_codes_are_predicted(predictor):
    found = downstream_task(PERFECT, SPACE, fresh(), num_train=(40, 120), num_test=50, predictor=predictor)
    assert found["120:mean_test_accuracy"] == found["40:train_accuracy_factor_1"] == 1.0
    assert set(found) == {
        f"{size}:{name}"
        for size in (40, 120)
        for name in (
            *(f"{kind}_{side}_accuracy" for kind in ("mean", "min") for side in ("train", "test")),
            *(f"{side}_accuracy_factor_{factor}" for side in ("train", "test") for factor in (0, 1)),
        )
    }


def test_means_and_minima_are_over_factors():
    blind_to_shape = PERFECT * [1, 0]
    found = downstream_task(blind_to_shape, SPACE, fresh(), num_train=(200,), num_test=200, **TREES)
    shape = found["200:test_accuracy_factor_1"]
    assert found["200:test_accuracy_factor_0"] == 1.0 and shape < 0.5
    assert found["200:min_test_accuracy"] == shape
    assert found["200:mean_test_accuracy"] == pytest.approx((1 + shape) / 2)


def test_a_sample_of_one_label_is_answered_with_it():
    rare = FactorTable(np.vstack([np.zeros((40, 2), dtype=int), [[1, 1]]]))
    found = downstream_task(np.arange(41.0)[:, None], rare, fresh(), num_train=(5,), num_test=40, **TREES)
    assert found["5:train_accuracy_factor_0"] == 1.0


def test_without_its_unit_a_factor_is_lost_and_the_others_stay():
    found = reduced_downstream_task(PERFECT, SPACE, fresh(), num_train=(200,), num_test=200, **TREES)
    assert found["200:mean_test_accuracy_other_factors"] == 1.0
    assert found["200:mean_test_accuracy_reduced_factor"] < 0.5
    assert found["200:reduced_factor_1:mean_test_accuracy_factor_0"] == 1.0
    assert found["200:reduced_factor_0:mean_test_accuracy_reduced_factor"] < 0.5
    assert found["200:reduced_factor_0:mean_train_accuracy_non_reduced_factor"] == 1.0
    doubled = np.hstack([PERFECT, PERFECT])
    options = {"num_train": (200,), "num_test": 200, **TREES}
    assert reduced_downstream_task(doubled, SPACE, fresh(), **options)["200:mean_test_accuracy_reduced_factor"] == 1.0
    both = reduced_downstream_task(doubled, SPACE, fresh(), num_factors_to_remove=2, **options)
    assert both["200:mean_test_accuracy_reduced_factor"] < 0.5


def test_predictions_of_perfect_codes_are_fair():
    found = fairness(PERFECT, SPACE, fresh(), num_train=200, num_test_points_per_class=30)
    assert set(found.values()) == {0.0}
    assert len(found) == 2 * (2 + 4 + 4 + 8)


def test_unfair_predictions_are_told_apart():
    mixed = np.column_stack([FACTORS[:, 0] + 4 * (FACTORS[:, 1] > 1), FACTORS[:, 1]]).astype(float)
    blind = mixed[:, :1] % 4 * (mixed[:, :1] < 4)  # the hue is lost where the shape is 2
    found = fairness(blind, SPACE, fresh(), num_train=300, num_test_points_per_class=60)
    assert found["mean_fairness:pred0:sens1"] > 0.2
    assert found["max_fairness:pred0:sens1"] > found["mean_fairness:pred0:sens1"]
    assert found["mean_fairness:pred0:mean_sens"] == found["mean_fairness:sens1:max_pred"]
    assert found["mean_fairness:max_pred:mean_sens"] >= found["mean_fairness:mean_pred:mean_sens"]


def test_group_distances_by_hand():
    mean, largest = group_distances(np.array([[3, 1], [1, 7]]))  # 4 and 8 images; 1/3 of all are of class 0
    assert largest == pytest.approx(3 / 4 - 1 / 3)
    assert mean == pytest.approx((4 * (3 / 4 - 1 / 3) + 8 * (1 / 3 - 1 / 8)) / 12)


def test_what_cannot_be_done_says_why():
    with pytest.raises(MetricError, match="Did you mean 'gradient_boosting_classifier'"):
        downstream_task(PERFECT, SPACE, fresh(), predictor="gradient_boosting")
    with pytest.raises(MetricError, match="at least 5 examples"):
        downstream_task(PERFECT, SPACE, fresh(), num_train=(2,))
    with pytest.raises(MetricError, match="more than 2 units to remove from, got 2"):
        reduced_downstream_task(PERFECT, SPACE, fresh(), num_factors_to_remove=2, num_train=(20,), num_test=9)
