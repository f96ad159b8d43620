"""Scoring anyone's codes in one call, and what it says about bad ones."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from ldm.data.factors import FactorSpace
from ldm.metrics import METRICS, FactorTable, MetricError, evaluate, modularity_explicitness, score, select_metrics
from ldm.metrics.protocols import PROTOCOLS, Protocol
from ldm.metrics.representation import scalar_units
from ldm.util import ConfigError

SPACE = FactorSpace(("hue", "shape", "size"), (5, 4, 3))
FACTORS = SPACE.factors_of(np.arange(SPACE.size))
PERFECT = FACTORS.astype(np.float64)
QUICK = ["mig", "irs", "unsupervised"]


@pytest.fixture(autouse=True)
def tiny_protocol(monkeypatch):
    """A protocol whose sample counts suit 60 images."""
    settings = {
        name: {key: 1000 for key in metric.protocol if key.startswith("num_") and key != "num_bins"}
        for name, metric in METRICS.items()
    }
    monkeypatch.setitem(PROTOCOLS, "tiny", Protocol("for tests", tuple(METRICS), settings))


def test_every_metric_in_one_call():
    found = evaluate(PERFECT, FACTORS, metrics="all", protocol="tiny")
    assert list(found) == [metric.key for metric in METRICS.values()]
    json.dumps(found, allow_nan=False)
    for metric in METRICS.values():
        assert isinstance(found[metric.key][metric.figure], float)
    perfect = ("beta_VAE", "factor_VAE", "MIG", "dci", "modularity_explicitness", "MED")
    assert all(value > 0.9 for key in perfect for name, value in found[key].items() if not name.startswith("num"))


def test_tables_and_spaces_score_alike():
    assert evaluate(PERFECT, SPACE, QUICK) == evaluate(PERFECT, FACTORS, QUICK)


def test_samplers_of_other_libraries():
    other = SimpleNamespace(
        num_factors=3,
        factors_num_values=[5, 4, 3],
        sample_factors=SPACE.sample_factors,
        sample_observations_from_factors=SPACE.sample_observations_from_factors,
    )
    assert evaluate(PERFECT, other, QUICK) == evaluate(PERFECT, SPACE, QUICK)


def test_vectors_are_reduced_except_for_med():
    vectors = np.stack([PERFECT, -2 * PERFECT, np.zeros_like(PERFECT)], axis=2)
    found = evaluate(vectors, SPACE, ["mig", "med"], protocol="tiny")
    metrics = select_metrics("tiny", ["mig", "med"])
    assert found["MIG"] == score(scalar_units(vectors), SPACE, {"mig": metrics["mig"]})["MIG"]
    assert found["MED"] == score(vectors.reshape(60, 9), SPACE, {"med": metrics["med"]})["MED"]


def test_seeds_draw_differently():
    noise = np.random.default_rng(0).normal(size=(60, 4))
    assert (
        evaluate(noise, SPACE, "mig") == evaluate(noise, SPACE, "mig", seed=0) != evaluate(noise, SPACE, "mig", seed=1)
    )


def test_whole_numbers_are_codes_too():
    whole, floats = evaluate(FACTORS, SPACE, QUICK), evaluate(PERFECT, SPACE, QUICK)
    assert whole == {key: pytest.approx(result) for key, result in floats.items()}
    evaluate(FACTORS.astype(np.uint8), SPACE, ["beta_vae"], protocol="tiny")


def test_a_single_unit_is_scored_where_that_is_possible(caplog):
    found = evaluate(PERFECT[:, :1], SPACE, ["irs", "factor_vae", "mig", "sap", "unsupervised"], protocol="tiny")
    assert "error" not in found["IRS"] and "error" not in found["factor_VAE"]
    for key in ("MIG", "SAP", "unsupervised"):
        assert "at least 2 units to compare, got 1" in found[key]["error"]
    assert "MIG was not computed" in caplog.text
    with pytest.raises(MetricError, match="at least 2"):
        evaluate(PERFECT[:, :1], SPACE, "mig")
    with pytest.raises(MetricError, match="MIG: .*SAP: "):
        evaluate(PERFECT[:, :1], SPACE, ["mig", "sap"], protocol="tiny")


def test_a_unit_that_never_varies_leaves_the_others_their_scores():
    padded = np.column_stack([PERFECT, np.full(60, 3.0)])
    found = evaluate(padded, SPACE, "all", protocol="tiny")
    assert "unit 3 (1 of 4) has one value" in found["unsupervised"].pop("error")
    assert not any("error" in result for result in found.values())
    assert found["modularity_explicitness"]["explicitness_score_test"] > 0.9
    assert (found["IRS"]["num_active_true"], found["factor_VAE"]["num_active_true"]) == (3, 3)


def test_a_class_missing_in_a_split():
    rare = np.repeat(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), 30, axis=0)
    rare = np.vstack([rare, [[2, 0]]])  # drawn in one of 121 rows
    with pytest.raises(MetricError, match="value 2 of factor 0 is in none of the 200 (training|test) codes. Draw more"):
        modularity_explicitness(
            rare.astype(float), FactorTable(rare), np.random.RandomState(4), num_train=200, num_test=200
        )


@pytest.mark.parametrize(
    "latents,factors,message",
    [
        (np.full((60, 2), np.nan), SPACE, "nan in unit 0, first in row 0"),
        (np.where(PERFECT == 4, np.inf, PERFECT), FACTORS, "inf in unit 0, first in row 48"),
        (np.ones((60, 2)), SPACE, "no unit varies"),
        (np.ones((60, 2, 5)), SPACE, "no unit varies"),
        (PERFECT[:-1], SPACE, "59 rows, but the factors 60. Encode every image"),
        (PERFECT.T, FACTORS, "looks like \\(K, N\\).*latents.T"),
        (np.tile(PERFECT, (10, 1)), SPACE, "Every image seems to be there 10 times"),
        (np.zeros((60, 1_000_000), dtype=np.int8), SPACE, "got 1000000 for 60 images.*latents.T"),
        (np.zeros(60), SPACE, "expected shape"),
        (np.full((60, 2), "a"), SPACE, "real numbers"),
        (PERFECT, "shapes3d", r'factor_space\("shapes3d"\)'),
    ],
)
def test_bad_input_is_refused(latents, factors, message):
    with pytest.raises(MetricError, match=message):
        evaluate(latents, factors, QUICK)


def test_names_are_checked_first():
    with pytest.raises(ConfigError, match="Did you mean 'mig'"):
        evaluate(np.zeros((1, 1)), SPACE, ["migg"])


@pytest.mark.parametrize(("scale", "active"), [(0.03, "0 of 3"), (0.001, "0 of 3"), (1.0, None)])
def test_small_scales_are_announced(caplog, scale, active):
    codes = scale * np.array(list(itertools.product(range(5), range(4), range(3))))
    factors = np.array(list(itertools.product(range(5), range(4), range(3))))
    scores = evaluate(codes, factors, ["factor_vae", "beta_vae"], protocol="fast")
    assert (f"{active} units are active" in caplog.text and "--standardize" in caplog.text) == (active is not None)
    assert scores["factor_VAE"]["eval_accuracy"] == (1.0 if active is None else 0.0)
    found = evaluate(codes, factors, ["factor_vae", "beta_vae"], protocol="fast", standardize=True)
    assert found["factor_VAE"]["eval_accuracy"] == 1.0 and found["beta_VAE"]["eval_accuracy"] > 0.95


def test_constant_factors_of_a_space_are_left_out(caplog):
    space = FactorSpace(("hue", "floor", "shape"), (5, 1, 4))
    codes = space.factors_of(np.arange(space.size)).astype(float)
    found = evaluate(codes, space, "factor_vae", protocol="fast")
    assert found == evaluate(codes, FactorSpace(("hue", "shape"), (5, 4)), "factor_vae", protocol="fast")
    assert "floor left out" in caplog.text


def test_irs_of_a_set_with_a_dead_unit_equals_that_without_it():
    codes = PERFECT + 0.2 * np.random.default_rng(0).normal(size=PERFECT.shape)
    dead = np.column_stack([codes, np.full(len(codes), 0.1), np.zeros(len(codes))])
    found, expected = evaluate(dead, SPACE, "irs")["IRS"], evaluate(codes, SPACE, "irs")["IRS"]
    assert found == expected and found["num_active_true"] == 3


@pytest.mark.parametrize(("units", "is_announced"), [(3, False), (4, True)])
def test_few_rows_are_announced(caplog, units, is_announced):
    evaluate(np.random.default_rng(0).normal(size=(60, units)), SPACE, "mig")
    assert ("60 rows are few for 4 units" in caplog.text) == is_announced


@pytest.mark.parametrize("name", ["FactorVAE", "factor-vae", "factor_VAE", "factor vae"])
def test_metrics_are_named_by_their_letters(name):
    assert list(select_metrics(names=name)) == ["factor_vae"]
