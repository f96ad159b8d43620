"""Replicates and variants of a representation: bootstrap samples, baselines, changed units, intervals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_ind

from ldm.data.factors import FactorSpace
from ldm.metrics import FactorTable, MetricError, select_metrics
from ldm.metrics.common import as_lookup
from ldm.metrics.trust import (
    PCA,
    RANDOM,
    REPLICATE,
    VARIANTS,
    difference_of_means,
    interval,
    principal_components,
    varied,
)

SPACE = FactorSpace(("hue", "shape", "size"), (4, 3, 5))
FACTORS = SPACE.factors_of(np.arange(SPACE.size))
CODES = FACTORS.astype(np.float64)


def codes_of(variant: str, codes: np.ndarray = CODES, sampler=SPACE, seed: int = 0) -> np.ndarray:
    return as_lookup(varied(variant, codes, sampler, seed)[0])(np.arange(len(codes)))


def figure(name: str, variant: str, codes: np.ndarray = CODES, sampler=SPACE, seed: int = 0) -> float:
    metric = select_metrics("fast", [name])[name]
    changed = varied(variant, codes, sampler, seed)
    return metric.function(*changed, np.random.RandomState(seed), **metric.protocol)[metric.figure]


def table(num: int = 1000, num_values: int = 4, seed: int = 0) -> FactorTable:
    return FactorTable(np.random.default_rng(seed).integers(num_values, size=(num, 6)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_variants_are_repeatable_and_finite(variant, dtype):
    codes = CODES.astype(dtype)
    changed = codes_of(variant, codes)
    assert np.isfinite(changed).all() and len(changed) == len(codes)
    np.testing.assert_array_equal(changed, codes_of(variant, codes))
    assert varied(variant, codes, SPACE, 0)[1] is SPACE


def test_variants_change_what_they_are_named_after():
    np.testing.assert_array_equal(codes_of("order"), CODES[:, ::-1])
    np.testing.assert_allclose(codes_of("scale=0.1"), CODES / 10)
    np.testing.assert_allclose(codes_of("scale=10"), CODES * 10)
    np.testing.assert_array_equal(codes_of("doubled"), np.concatenate([CODES, CODES], axis=1))
    standard = codes_of("standardized")
    np.testing.assert_allclose([standard.mean(axis=0), standard.std(axis=0)], [[0] * 3, [1] * 3], atol=1e-12)
    left = codes_of("removed")
    assert left.shape == (60, 2) and all((column == CODES.T).all(axis=1).any() for column in left.T)
    noise = codes_of(RANDOM)
    assert (
        noise.shape == CODES.shape and noise.dtype == np.float32 and not np.array_equal(noise, codes_of(RANDOM, seed=1))
    )


def test_constant_units_stay_constant_and_finite():
    codes = np.concatenate([CODES, np.full((60, 1), 0.1)], axis=1)
    for variant in ("standardized", "scale=0.1", "scale=10"):
        assert np.ptp(codes_of(variant, codes)[:, 3]) == 0


def test_random_codes_score_as_chance():
    sampler = table(num=5000)
    codes = np.zeros((5000, 10))
    assert figure("mig", RANDOM, codes, sampler) < 0.02
    assert figure("dci", RANDOM, codes, sampler) < 0.25
    assert figure("factor_vae", RANDOM, codes, sampler) < 0.35  # 1 / 6, and the luck of the majority vote
    assert figure("factor_vae", "", np.random.default_rng(0).permuted(sampler._labels.astype(float)), sampler) < 1


def test_scale_changes_factor_vae_alone():
    """FactorVAE leaves out units with a deviation below 0.05; trees and histograms do not depend on the scale."""
    codes = 0.2 * CODES / CODES.std(axis=0)
    assert figure("factor_vae", "", codes) == figure("factor_vae", "standardized", codes) == 1
    assert figure("factor_vae", "scale=0.1", codes) == 0
    for name in ("mig", "dci"):
        assert figure(name, "scale=0.1", codes) == pytest.approx(figure(name, "", codes), abs=1e-9)
        assert figure(name, "order", codes) == pytest.approx(figure(name, "", codes), abs=1e-9)


def test_doubled_units_leave_no_gap():
    """MIG compares the two best units, which are copies then."""
    assert figure("mig", "") > 0.99
    assert figure("mig", "doubled") == pytest.approx(0, abs=1e-9)


def test_components_of_all_numbers_of_the_latents():
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(500, 3, 4)) * [5, 1, 1, 1] + 7
    found = principal_components(latents, 3)
    flat = latents.reshape(500, 12) - latents.reshape(500, 12).mean(axis=0)
    values, vectors = np.linalg.eigh(flat.T @ flat)
    expected = flat @ vectors[:, ::-1][:, :3]
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-8)


def test_components_without_variance_are_zero():
    codes = np.random.default_rng(0).normal(size=(100, 2)) @ [[1.0, 2, 3, 4], [4, 3, 2, 1]]
    assert (principal_components(codes, 4)[:, 2:] == 0).all()
    assert principal_components(codes[:2], 4).shape == (2, 2)


def test_large_latents_are_read_in_blocks(monkeypatch):
    latents = np.random.default_rng(0).normal(size=(1000, 3)) * [3, 2, 1]
    whole = principal_components(latents, 3)
    monkeypatch.setattr("ldm.metrics.trust.BLOCK_VALUES", 100)
    np.testing.assert_allclose(principal_components(latents, 3), whole)
    monkeypatch.setattr("ldm.metrics.trust.MOST_VALUES", 1500)
    assert np.abs(np.corrcoef(principal_components(latents, 3).T, whole.T)[[0, 1, 2], [3, 4, 5]]).min() > 0.98


def test_a_replicate_of_all_images_changes_the_draws_alone():
    assert varied(REPLICATE, CODES, SPACE, 3) == (CODES, SPACE)
    complete = FactorTable(FACTORS)
    assert varied(REPLICATE, CODES, complete, 3)[1] is complete


def test_a_bootstrap_sample_has_as_many_rows_and_fewer_different_ones():
    sampler = table()
    sample = varied(REPLICATE, CODES, sampler, 3)[1]
    rows = sample.sample_observations_from_factors(sample._labels, np.random.RandomState(0))
    assert len(sample._labels) == 1000 and 0.58 < len(np.unique(sample._rows)) / 1000 < 0.69
    np.testing.assert_array_equal(sampler._labels[rows], sample._labels)
    again, other = (sampler.bootstrap(np.random.RandomState([seed, 1])) for seed in (3, 4))
    assert np.array_equal(again._rows, sample._rows) and not np.array_equal(other._rows, sample._rows)


def test_an_image_is_never_in_both_parts_of_a_bootstrap_sample():
    train, test = table().bootstrap(np.random.RandomState(0)).split(np.random.RandomState(1))
    assert not set(train._rows) & set(test._rows)
    assert len(train._rows) + len(test._rows) == 1000


def test_a_bootstrap_sample_of_a_complete_table_is_complete():
    sampler = FactorTable(np.repeat(FACTORS, 4, axis=0))
    sample = sampler.bootstrap(np.random.RandomState(0))
    assert sample.is_complete and not np.array_equal(sample._rows, sampler._rows)
    assert figure("mig", REPLICATE, np.repeat(CODES, 4, axis=0), sampler) > 0.99


def test_values_that_a_bootstrap_sample_lacks_are_not_drawn():
    values = np.random.default_rng(1).integers(3, size=(60, 2)) * 2
    values[0, 0] = 1  # a rare value in the middle of the others
    sampler = FactorTable(values)
    samples = [sampler.bootstrap(np.random.RandomState(seed)) for seed in range(10)]
    assert any(not (sample._labels[:, 0] == 1).any() for sample in samples)
    for seed, sample in enumerate(samples):
        held = sample.hold_fixed(sample._labels, 0, sample._labels[:, 0], np.random.RandomState(seed))
        np.testing.assert_array_equal(held[:, 0], sample._labels[:, 0])


def test_a_factor_that_one_row_shows_is_named():
    labels = np.zeros((200, 2), dtype=int)
    labels[:, 1] = np.arange(200) % 2
    labels[0, 0] = 1
    outcomes = []
    for seed in range(40):
        try:
            sample = FactorTable(labels, ("rare", "other")).bootstrap(np.random.RandomState(seed))
            assert (sample._labels != sample._labels[0]).any(axis=0).all()
        except MetricError as error:
            outcomes.append(str(error))
    assert all("rare is constant" in text for text in outcomes)


def test_interval_contains_the_expected_value_in_95_percent():
    rng = np.random.default_rng(0)
    found = [interval(rng.normal(), rng.normal(size=10)) for _ in range(2000)]
    assert np.mean([low <= 0 <= high for low, high in found]) == pytest.approx(0.95, abs=0.015)
    assert interval(1.0, [1.0, 1.0, 1.0]) == (1.0, 1.0)


def test_difference_of_means_is_that_of_scipy():
    first, second = [0.5, 0.6, 0.55], [0.4, 0.8]
    expected = ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert difference_of_means(first, second) == pytest.approx(tuple(expected))
    assert difference_of_means([0.5, 0.5], [0.25, 0.25]) == (0.25, 0.25)


def test_intervals_of_a_sample_contain_the_figure_of_all_images():
    """Intervals of 20 samples of 800 images, and the figure of 20,000."""
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=(20_000, 3))
    codes = labels + rng.normal(scale=0.6, size=labels.shape)
    truth, hits = figure("mig", "", codes, FactorTable(labels)), 0
    for _ in range(20):
        part = rng.choice(len(labels), 800, replace=False)
        sampler = FactorTable(labels[part])
        found = [figure("mig", REPLICATE, codes[part], sampler, seed) for seed in range(1, 21)]
        low, high = interval(figure("mig", "", codes[part], sampler), found)
        hits += low - 0.02 <= truth <= high + 0.02  # MIG of few images is larger
        assert 0.02 < high - low < 0.2
    assert hits >= 16


def test_pca_of_perfect_codes_mixes_them():
    """A rotation keeps the information and loses the units, if variances are equal."""
    codes = CODES / CODES.std(axis=0) + np.random.default_rng(0).normal(scale=0.05, size=CODES.shape)
    rotated = principal_components(codes, 3)
    assert figure("mig", PCA, rotated) < figure("mig", "", codes)
