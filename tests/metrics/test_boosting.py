"""Boosted trees: scikit-learn's importances and predictions, whatever the codes and however many classes."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.ensemble import GradientBoostingClassifier

from ldm.metrics import MetricError
from ldm.metrics.boosting.classifier import default_threads, fit_boosted_trees, sort_codes
from ldm.scoring import engine


def on_levels(num: int, num_units: int, num_classes: int, num_levels: int, seed: int = 0) -> tuple:
    """Codes on few levels with every class at each: large groups of samples, so that no two splits are equally good."""
    rng = np.random.default_rng(seed)
    levels = np.sort(rng.normal(size=(num_units, num_levels)), axis=1)
    cells = rng.integers(0, num_levels, size=(num, num_units))
    logits = (cells / num_levels) @ rng.normal(scale=2, size=(num_units, num_classes))
    labels = np.argmax(logits + rng.gumbel(size=(num, num_classes)), axis=1)
    return levels[np.arange(num_units), cells], labels


def blurred(num: int, num_units: int, num_classes: int) -> tuple:
    """Distinct float codes; small nodes have splits that are equally good."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, num_classes, size=num)
    return np.cos(labels[:, None] * (1 + np.arange(num_units))) + rng.normal(size=(num, num_units)), labels


@pytest.mark.parametrize("shape", [(1200, 3, 2, 4), (1500, 3, 3, 5), (1500, 5, 4, 3), (1500, 2, 8, 5)])
def test_equals_scikit_learn_without_ties(shape):
    codes, labels = on_levels(*shape)
    reference = GradientBoostingClassifier(random_state=1).fit(codes, labels)
    found = fit_boosted_trees(sort_codes(codes), labels)
    assert found.importances == pytest.approx(reference.feature_importances_, abs=1e-6)
    assert np.array_equal(found.fitted, reference.predict(codes))
    fresh, _ = on_levels(*shape, seed=3)
    assert np.array_equal(found.predict(fresh), reference.predict(fresh))
    assert np.array_equal(found.predict(codes), found.fitted)


def test_equals_scikit_learn_on_a_single_unit_of_floats():
    codes, labels = blurred(300, 1, 15)
    reference = GradientBoostingClassifier().fit(codes, labels)
    found = fit_boosted_trees(sort_codes(codes), labels)
    assert found.importances.tolist() == [1.0]
    fresh = np.linspace(-3, 3, 500)[:, None]
    assert np.mean(found.predict(fresh) == reference.predict(fresh)) > 0.99  # thresholds of one unit may tie


@pytest.mark.parametrize("digits", [0, 1, 9])
def test_ties_move_importances_little(digits):
    codes, labels = blurred(1200, 4, 3)
    codes = np.round(codes, digits)
    reference = GradientBoostingClassifier(random_state=0).fit(codes, labels)
    found = fit_boosted_trees(sort_codes(codes), labels)
    assert found.importances == pytest.approx(reference.feature_importances_, abs=5e-3)
    assert np.mean(found.fitted == reference.predict(codes)) > 0.97


@pytest.mark.slow
def test_scores_of_the_full_protocol_are_within_a_thousandth():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, size=10_000)
    codes = 0.3 * labels[:, None] * rng.normal(size=6) + 0.2 * rng.normal(size=(10_000, 6))
    reference = GradientBoostingClassifier(random_state=0).fit(codes, labels)
    found = fit_boosted_trees(sort_codes(codes), labels)
    assert found.importances == pytest.approx(reference.feature_importances_, abs=1e-3)


def test_order_of_units_moves_importances_along():
    codes, labels = on_levels(1500, 5, 4, 3)
    order = np.array([3, 0, 4, 1, 2])
    found = fit_boosted_trees(sort_codes(codes), labels)
    moved = fit_boosted_trees(sort_codes(codes[:, order]), labels)
    assert moved.importances == pytest.approx(found.importances[order], abs=1e-12)
    assert np.array_equal(moved.fitted, found.fitted)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_threads_change_nothing(num_classes):
    codes, labels = blurred(500, 4, num_classes)
    alone = fit_boosted_trees(sort_codes(codes), labels)
    shared = fit_boosted_trees(sort_codes(codes), labels, num_threads=3)
    assert np.array_equal(alone.importances, shared.importances)
    assert np.array_equal(alone.value, shared.value)


@pytest.mark.parametrize(
    ("openmp", "of_numba", "expected"), [("1", "8", 1), ("4", "8", 4), ("8", "1", 1), ("2,1", "", 8)]
)
def test_threads_are_limited_as_those_of_other_libraries(openmp, of_numba, expected, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", openmp)
    monkeypatch.setenv("NUMBA_NUM_THREADS", of_numba)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert default_threads() == expected


def test_workers_of_scores_use_one_thread(monkeypatch):
    for name, value in engine._SETTINGS["distributed.nanny.pre-spawn-environ"].items():
        monkeypatch.setenv(name, value)
    assert default_threads() == 1


def test_one_sorting_serves_many_labels():
    codes, labels = blurred(300, 3, 4)
    ordered = sort_codes(codes)
    first = fit_boosted_trees(ordered, labels)
    fit_boosted_trees(ordered, labels % 2)
    assert np.array_equal(fit_boosted_trees(ordered, labels).value, first.value)


def test_codes_that_tell_all_are_learnt_without_overflow():
    """Probabilities reach 0 and 1, where Newton steps divide by almost nothing."""
    labels = np.repeat(np.arange(6), 200)
    codes = np.column_stack([labels, np.random.default_rng(0).normal(size=1200)])
    with np.errstate(all="raise", under="ignore"):
        found = fit_boosted_trees(sort_codes(codes), labels)
    assert np.array_equal(found.fitted, labels)
    assert found.importances[0] > 0.999
    two = fit_boosted_trees(sort_codes(codes), labels > 2)
    assert np.array_equal(two.fitted, labels > 2)


def test_splits_without_gain_are_made_for_the_sake_of_those_below():
    """The parity of three units: only the third split gains anything."""
    bits = np.array([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)] * 10)
    labels = bits.sum(axis=1) % 2
    assert np.array_equal(GradientBoostingClassifier().fit(bits, labels).predict(bits), labels)
    assert np.array_equal(fit_boosted_trees(sort_codes(bits), labels).fitted, labels)


def test_units_that_never_vary_have_no_share():
    codes, labels = on_levels(400, 2, 3, 4)
    padded = np.column_stack([np.full(400, 7.0), codes])
    found = fit_boosted_trees(sort_codes(padded), labels)
    assert found.importances[0] == 0.0
    assert found.importances.sum() == pytest.approx(1.0)


def test_codes_that_tell_nothing_name_the_commonest_label():
    found = fit_boosted_trees(sort_codes(np.ones((10, 3))), np.array([4] * 6 + [-1] * 4))
    assert not found.importances.any()
    assert found.predict(np.zeros((2, 3))).tolist() == [4, 4]


def test_labels_may_be_any_values():
    codes, labels = on_levels(400, 3, 3, 4)
    names = np.array(["hue", "shape", "size"])[labels]
    found = fit_boosted_trees(sort_codes(codes), names)
    expected = fit_boosted_trees(sort_codes(codes), labels)
    assert np.array_equal(found.fitted, np.array(["hue", "shape", "size"])[expected.fitted])


def test_what_cannot_be_fitted_says_why():
    codes, labels = blurred(50, 3, 3)
    ordered = sort_codes(codes)
    with pytest.raises(MetricError, match="all 50 labels are 1"):
        fit_boosted_trees(ordered, np.ones(50, dtype=int))
    with pytest.raises(MetricError, match=r"labels of shape \(50,\), got \(49,\)"):
        fit_boosted_trees(ordered, labels[1:])
    found = fit_boosted_trees(ordered, labels)
    with pytest.raises(MetricError, match="expected 3 units"):
        found.predict(codes[:, :2])
    with pytest.raises(MetricError, match="got nan in unit 0, first in sample 3"):
        found.predict(np.where(np.arange(50)[:, None] == 3, np.nan, codes))
