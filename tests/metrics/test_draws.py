"""Draws made at once are the draws made one by one, and leave the generator at the same place."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.data.factors import FactorSpace, factor_space
from ldm.metrics import beta_vae, factor_vae
from ldm.metrics.sampling import draws


def one_by_one(space, rs, num_points, num_sets, batch_size):
    """What disentanglement_lib does for a point: which factor, then the values of its batches."""
    points = [
        (rs.randint(space.num_factors), [space.sample_factors(batch_size, rs) for _ in range(num_sets)])
        for _ in range(num_points)
    ]
    return np.array([point[0] for point in points]), np.array([point[1] for point in points])


@pytest.mark.parametrize("sizes", [(10, 10, 10, 8, 4, 15), (1, 2, 1, 300), (5,)])
@pytest.mark.parametrize("num_sets,batch_size", [(1, 16), (2, 5)])
def test_same_draws_and_same_generator_afterwards(sizes, num_sets, batch_size):
    space = FactorSpace([f"factor {number}" for number in range(len(sizes))], sizes)
    single, bulk = np.random.RandomState(3), np.random.RandomState(3)
    single.normal()  # leaves a second normal number waiting, which must not be lost
    bulk.normal()
    expected = one_by_one(space, single, 40, num_sets, batch_size)
    found = draws.draw_points(sizes, bulk, 40, num_sets, batch_size)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected))
    assert (single.normal(), single.randint(1 << 30)) == (bulk.normal(), bulk.randint(1 << 30))


def test_too_few_words_are_not_the_end(monkeypatch):
    expected = draws.draw_points((9, 9), np.random.RandomState(0), 30, 1, 8)
    monkeypatch.setattr(draws, "SPARE_WORDS", -600)  # fewer than are needed at the first attempts
    found = draws.draw_points((9, 9), np.random.RandomState(0), 30, 1, 8)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("metric", [factor_vae, beta_vae])
def test_metrics_score_alike_either_way(metric, monkeypatch):
    space = FactorSpace(("hue", "shape", "size"), (5, 4, 3))
    codes = space.factors_of(np.arange(60)) @ np.random.default_rng(1).normal(size=(3, 4))
    scores = []
    for many in (10**9, 0):
        monkeypatch.setattr("ldm.metrics.common.MANY_DRAWS", many)
        scores.append(metric(codes, space, np.random.RandomState(0), num_train=200, num_eval=100, batch_size=8))
    assert scores[0] == scores[1]


def test_spaces_that_draw_while_looking_up_are_sampled_point_by_point():
    assert factor_space("smallnorb").product_sizes is None
    assert factor_space("cars3d").product_sizes == (4, 24, 183)
    assert FactorSpace(("one", "two"), (1, 2), latent=(1,)).product_sizes == (2,)
