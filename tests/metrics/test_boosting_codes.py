"""Sorted codes: buckets end where a threshold may lie."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.metrics import MetricError
from ldm.metrics.boosting.codes import bucket_starts, sort_codes
from ldm.metrics.boosting.trees import MIN_GAP


def test_buckets_of_distinct_values_have_the_size_asked_for():
    assert bucket_starts(np.arange(10, dtype=np.float32), 4).tolist() == [0, 4, 8, 10]


def test_equal_values_are_never_parted():
    values = np.array([0, 1, 1, 1, 1, 1, 2, 3, 4, 4], dtype=np.float32)
    assert bucket_starts(values, 3).tolist() == [0, 1, 6, 8, 10]


def test_neighbours_nearer_than_the_gap_stay_together():
    chain = np.arange(6, dtype=np.float32) * np.float32(5e-8)
    assert bucket_starts(np.append(chain, np.float32(1.0)), 2).tolist() == [0, 6, 7]


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-9])
def test_buckets_cover_the_samples_in_order(scale):
    codes = scale * np.round(np.random.default_rng(0).normal(size=(1000, 5)), 2)
    found = sort_codes(codes)
    for unit in range(5):
        num = found.num_buckets[unit]
        starts = found.starts[unit].astype(int)
        assert starts[0] == 0 and starts[num] == 1000
        assert np.array_equal(found.values[unit], np.sort(codes[:, unit].astype(np.float32)))
        ranks = np.argsort(found.order[unit])
        assert np.array_equal(found.bucket[unit], np.searchsorted(starts[: num + 1], ranks, side="right"))
        firsts = starts[1:num]
        assert (found.values[unit, firsts] > found.values[unit, firsts - 1] + MIN_GAP).all()


def test_only_buckets_with_a_gap_can_be_split():
    codes = np.array([[0.0], [0.0], [1.0], [2.0]] + [[5.0]] * 60)
    found = sort_codes(codes)
    assert found.splittable[0, : found.num_buckets[0]].tolist() == [True, False]


def test_many_samples_keep_bucket_numbers_in_16_bits():
    found = sort_codes(np.arange(1_500_000, dtype=np.float64)[:, None])
    assert found.num_buckets[0] <= 60_000
    assert found.bucket.max() == found.num_buckets[0]


@pytest.mark.parametrize("value,name", [(np.nan, "nan"), (np.inf, "inf"), (1e39, r"1e\+39")])
def test_values_that_float32_cannot_hold_are_named(value, name):
    codes = np.zeros((30, 4))
    codes[20:, 2] = value
    codes[25, 1] = value
    with pytest.raises(MetricError, match=f"got {name} in unit 1, first in sample 25"):
        sort_codes(codes)


@pytest.mark.parametrize("shape", [(5,), (0, 3), (4, 0), (2, 2, 2)])
def test_shapes_that_are_no_codes(shape):
    with pytest.raises(MetricError, match="shape"):
        sort_codes(np.zeros(shape))
