"""One tree: scikit-learn's exact splits on codes of every kind, and bounds that never pass over a better one."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.tree import DecisionTreeRegressor

from ldm.metrics.boosting import trees
from ldm.metrics.boosting.codes import sort_codes, workspace


def make_codes(kind: str, rng: np.random.Generator, num: int, num_units: int) -> np.ndarray:
    """Codes (num, num_units) of which some pairs, or nearly all, are equal or too near to be parted."""
    normal = rng.normal(size=(num, num_units))
    return {
        "distinct": normal,
        "rounded": np.round(2 * normal) / 2,
        "integers": rng.integers(0, 5, size=(num, num_units)),
        "mostly zero": np.where(rng.random((num, num_units)) < 0.6, 0.0, normal),
        "chained": 1e-6 * normal,  # neighbours nearer than MIN_GAP in all, further apart in small nodes
        "inseparable": 1e-9 * normal,
        "repeated rows": np.repeat(normal, 10, axis=0)[:num],
        "constant units": np.where(np.arange(num_units) % 2, normal, 1.5),
        "equal units": normal[:, :1] * rng.choice([-1.0, 1.0], size=num_units),
        "heavy tails": rng.standard_cauchy(size=(num, num_units)),
        "huge": 1e30 * normal,
    }[kind]


KINDS = (
    "distinct",
    "rounded",
    "integers",
    "mostly zero",
    "chained",
    "inseparable",
    "repeated rows",
    "constant units",
    "equal units",
    "heavy tails",
    "huge",
)


def grow(codes: np.ndarray, residuals: np.ndarray) -> dict[str, np.ndarray]:
    """One tree with rate and scale 1."""
    ordered = sort_codes(codes)
    raw = np.zeros((1, len(codes)))
    out = {
        "feature": np.full((1, trees.LEAVES), -1),
        "threshold": np.zeros((1, trees.LEAVES)),
        "value": np.zeros((1, 2 * trees.LEAVES)),
        "importance": np.zeros((1, codes.shape[1])),
    }
    trees.grow_trees(np.arange(1), ordered, workspace(ordered), residuals[None], raw, 1.0, 1.0, 0, *out.values())
    return {name: array[0] for name, array in out.items()} | {"raw": raw[0]}


def newton_steps(leaves: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """The step of each sample's leaf, by the definition: sum of g over sum of p (1 - p)."""
    steps = np.zeros(len(leaves))
    for leaf in np.unique(leaves):
        size = np.abs(residuals[leaves == leaf])
        steps[leaves == leaf] = residuals[leaves == leaf].sum() / (size * (1 - size)).sum()
    return steps


@pytest.mark.parametrize("kind", KINDS)
def test_equals_scikit_learns_tree(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    for num, num_units in ((2, 1), (5, 3), (40, 2), (100, 20), (700, 4), (2000, 7)):
        codes = make_codes(kind, rng, num, num_units)
        residuals = np.clip(rng.normal(scale=0.3, size=num), -0.99, 0.99)
        found = grow(codes, residuals)
        tree = DecisionTreeRegressor(max_depth=3, random_state=0).fit(codes.astype(np.float32), residuals)
        assert found["raw"] == pytest.approx(newton_steps(tree.apply(codes.astype(np.float32)), residuals), rel=1e-9)
        importances = tree.tree_.compute_feature_importances(normalize=False)
        assert found["importance"].sum() == pytest.approx(importances.sum(), rel=1e-9, abs=1e-15)


def test_importances_of_each_unit():
    codes = np.random.default_rng(3).normal(size=(3000, 6))
    residuals = 0.9 * np.tanh(codes @ [1.0, 0.7, 0.5, 0.3, 0.2, 0.1] + np.sin(3 * codes[:, 0]))
    tree = DecisionTreeRegressor(max_depth=3).fit(codes.astype(np.float32), residuals)
    importances = tree.tree_.compute_feature_importances(normalize=False)
    assert np.count_nonzero(importances) > 1
    found = grow(codes, residuals)
    assert found["importance"] == pytest.approx(importances, rel=1e-9)
    thresholds = found["threshold"][found["feature"] >= 0]
    assert np.array_equal(np.sort(thresholds), np.sort(tree.tree_.threshold[tree.tree_.feature >= 0]))


def test_large_child_of_small_residuals_keeps_its_precision():
    """Its sums are the parent's less the small child's, which are ten million times larger."""
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(3000, 3))
    residuals = np.where(codes[:, 0] > 0.3, 0.8, 1e-7 * (1 + rng.normal(size=3000) + 2 * np.sign(codes[:, 1])))
    found = grow(codes, residuals)
    tree = DecisionTreeRegressor(max_depth=3, random_state=0).fit(codes.astype(np.float32), residuals)
    assert found["raw"] == pytest.approx(newton_steps(tree.apply(codes.astype(np.float32)), residuals), rel=1e-7)


def test_predictions_follow_the_thresholds():
    rng = np.random.default_rng(5)
    codes = rng.normal(size=(500, 4)).astype(np.float32)
    found = grow(codes, np.tanh(codes[:, 0] * codes[:, 1]) * 0.9)
    again = np.zeros((1, 500))
    stages = [found[name][None, None] for name in ("feature", "threshold", "value")]
    trees.add_trees(codes, 1.0, *stages, again)
    assert np.array_equal(again[0], found["raw"])


@pytest.mark.parametrize("residuals", [np.zeros(50), np.full(50, 0.25)])
def test_equal_residuals_are_one_leaf(residuals):
    found = grow(np.random.default_rng(0).normal(size=(50, 3)), residuals)
    assert (found["feature"] == -1).all()
    assert not found["importance"].any()


def test_bounds_hold_for_every_threshold():
    """Every bucket with a gain above ``best`` inside is marked, up to the largest gain."""
    rng = np.random.default_rng(1)
    for trial in range(200):
        num = int(rng.integers(3, 200))
        residuals = rng.normal(size=num) * rng.choice([1.0, 1e-3], size=num)
        cuts = np.unique(np.r_[0, rng.integers(0, num, size=trial % 9), num])
        sums = [np.r_[0.0, np.cumsum(values)][cuts] for values in (np.ones(num), residuals, residuals**2)]
        mean, num_buckets = residuals.mean(), len(cuts) - 1
        left = np.arange(1, num)
        gains = (np.cumsum(residuals)[:-1] - mean * left) ** 2 / (left * (num - left))
        inside = [gains[cuts[b] : cuts[b + 1] - 1].max(initial=0.0) for b in range(num_buckets)]
        for best in np.quantile(gains, [0.5, 0.9, 1.0]):
            marked = np.zeros(num_buckets, dtype=bool)
            everywhere = np.ones(num_buckets, dtype=bool)
            trees._mark_promising(*sums, everywhere, num_buckets, mean, float(num), 0.0, best, marked)
            assert all(is_marked for is_marked, gain in zip(marked, inside) if gain >= best * (1 - trees.TIE))


def test_ties_go_to_another_unit_in_another_node():
    """Two units that part a node alike: neither is always taken."""
    taken = []
    for seed in range(40):
        best = np.full(4, -1.0)
        for unit in (3, 4):
            trees._consider(best, 0.5, unit, 10, seed, unit)
        taken.append(best[1])
    assert 10 <= taken.count(3.0) <= 30


def test_ties_of_one_unit_go_to_the_lower_threshold():
    for ranks in ((10, 20), (20, 10)):
        best = np.full(4, -1.0)
        for rank in ranks:
            trees._consider(best, 0.5, 2, rank, 7, 2)
        assert best.tolist() == [0.5, 2.0, 10.0, 2.0]
