"""What must hold of the further metrics: order of units, perfect codes, noise, and their parts by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from ldm.data.factors import FactorSpace
from ldm.metrics import MetricError, irs, med, modularity_explicitness, sap, unsupervised
from ldm.metrics.common import histogram_codes, mutual_information, standardized
from ldm.metrics.irs import robustness
from ldm.metrics.med import information_shares, most_disentangled
from ldm.metrics.modularity_explicitness import modularity
from ldm.metrics.sap import squared_correlations
from ldm.metrics.unsupervised import gaussian_total_correlation, gaussian_wasserstein_correlation

SPACE = FactorSpace(("hue", "shape", "size"), (5, 4, 3))
FACTORS = SPACE.factors_of(np.arange(SPACE.size))
PERFECT = FACTORS.astype(np.float64)
TRAIN_TEST = {"num_train": 600, "num_test": 300}
METRICS = [
    (sap, TRAIN_TEST),
    (sap, TRAIN_TEST | {"continuous_factors": True}),
    (modularity_explicitness, TRAIN_TEST),
    (irs, {"num_train": 600}),
    (unsupervised, {"num_train": 600}),
    (med, TRAIN_TEST),
]
NAMES = ["sap", "sap-continuous", "modularity", "irs", "unsupervised", "med"]


def fresh() -> np.random.RandomState:
    return np.random.RandomState(0)


@pytest.fixture(scope="module")
def mixed() -> np.ndarray:
    rng = np.random.default_rng(3)
    return FACTORS @ rng.normal(size=(3, 5)) + rng.normal(size=(60, 5))


@pytest.mark.parametrize("metric,options", METRICS, ids=NAMES)
def test_order_and_sign_of_units_do_not_matter(mixed, metric, options):
    expected = metric(mixed, SPACE, fresh(), **options)
    turned = metric(mixed[:, [3, 0, 4, 1, 2]], SPACE, fresh(), **options)
    assert turned == pytest.approx(expected, abs=1e-3)  # the solvers' tolerance
    flipped = metric(-mixed, SPACE, fresh(), **options)
    flipped.pop("num_active_dims", None)  # the reference's sum of codes
    # a bin holds its lower edge only, so that a code on an edge changes its bin with the sign
    assert flipped == pytest.approx({name: expected[name] for name in flipped}, abs=0.05)


@pytest.mark.parametrize("metric,options", METRICS, ids=NAMES)
def test_precision_of_the_codes_hardly_matters(mixed, metric, options):
    single = metric(mixed.astype(np.float32), SPACE, fresh(), **options)
    assert single == pytest.approx(metric(mixed, SPACE, fresh(), **options), abs=0.02, rel=1e-4)


def test_perfect_codes():
    assert sap(PERFECT, SPACE, fresh(), **TRAIN_TEST, continuous_factors=True)["SAP_score"] > 0.95
    assert irs(PERFECT, SPACE, fresh(), num_train=600)["IRS"] == pytest.approx(1.0)
    assert med(PERFECT, SPACE, fresh(), **TRAIN_TEST)["disentanglement"] > 0.9
    found = modularity_explicitness(PERFECT, SPACE, fresh(), **TRAIN_TEST)
    assert min(found.values()) > 0.99
    loose = unsupervised(PERFECT, SPACE, fresh(), num_train=5000)
    assert max(loose.values()) < 0.02


def test_perfect_binary_codes_are_separated():
    space = FactorSpace(("a", "b"), (2, 2))
    codes = space.factors_of(np.arange(4)).astype(np.float64)
    found = sap(codes, space, fresh(), num_train=400, num_test=200)["SAP_score"]
    assert found == pytest.approx(0.5, abs=0.06)  # 1 for the unit that knows, chance for the other


def test_noise_scores_near_the_floor():
    noise = np.random.default_rng(1).normal(size=(4096, 6))
    space = FactorSpace(("a", "b", "c"), (16, 16, 16))
    options = {"num_train": 3000, "num_test": 1500}
    assert sap(noise, space, fresh(), **options)["SAP_score"] < 0.03
    assert med(noise, space, fresh(), **options)["disentanglement"] < 0.1
    assert modularity_explicitness(noise, space, fresh(), **options)["explicitness_score_test"] < 0.55
    assert irs(noise, space, fresh(), num_train=3000)["IRS"] < 0.5
    assert unsupervised(noise, space, fresh(), num_train=3000)["mutual_info_score"] < 0.1


def test_a_copied_unit_is_dependent_and_not_separated(mixed):
    double = np.column_stack([mixed[:, 0], mixed[:, 0] + 1e-3 * mixed[:, 1]])
    apart = unsupervised(mixed, SPACE, fresh(), num_train=600)["gaussian_total_correlation"]
    assert unsupervised(double, SPACE, fresh(), num_train=600)["gaussian_total_correlation"] > apart + 3
    copies = np.repeat(PERFECT, 2, axis=1)
    assert sap(copies, SPACE, fresh(), **TRAIN_TEST)["SAP_score"] == 0.0


def test_mutual_information_is_scikit_learns():
    rng = np.random.default_rng(0)
    codes, labels = rng.normal(size=(300, 4)), rng.integers(3, 9, size=(300, 3))
    codes[:, 1] = labels[:, 0]
    binned = histogram_codes(codes)
    expected = [[mutual_info_score(column, unit) for column in labels.T] for unit in binned.T]
    assert mutual_information(binned, labels) == pytest.approx(np.array(expected), abs=1e-12)


def test_histogram_codes_keep_whole_numbers():
    whole = np.random.default_rng(0).integers(0, 40, size=(100, 2))
    binned = histogram_codes(whole)
    assert binned.dtype == whole.dtype and (binned.min(), binned.max()) == (1, 20)


def test_modularity_by_hand():
    assert modularity(np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])) == 0.5  # a unit without information counts as 0
    assert modularity(np.array([[2.0, 1.0, 1.0]])) == pytest.approx(1 - (1 + 1) / (4 * 2))


def test_robustness_by_hand():
    labels = np.array([[0], [0], [1], [1]])
    codes = np.array([[0.0], [1.0], [4.0], [7.0]])  # mean 3; groups' deviations 0.5 and 1.5; largest 4
    assert robustness(labels, codes, diff_quantile=1.0) == pytest.approx(1 - (0.5 + 1.5) / 2 / 4)


def test_units_without_variation_have_no_robustness():
    found = irs(np.full((60, 3), 2.0), SPACE, fresh(), num_train=100)
    assert found == {"IRS": 0.0, "num_active_dims": 0.0, "num_active_true": 0}


def test_squared_correlations_are_numpys(mixed):
    codes = np.column_stack([mixed, np.ones(60)])
    found = squared_correlations(codes, FACTORS)
    assert found[:5] == pytest.approx(np.corrcoef(mixed.T, FACTORS.T)[:5, 5:] ** 2)
    assert not found[5].any()


def test_gaussian_correlations_by_hand():
    covariance = np.array([[2.0, 0.6], [0.6, 1.0]])
    assert gaussian_total_correlation(covariance) == pytest.approx(-0.5 * np.log(1 - 0.36 / 2))
    assert gaussian_total_correlation(np.diag([3.0, 0.2])) == pytest.approx(0.0)
    product = covariance * np.diag(covariance)[:, None]  # 2 x 2: the root's trace is sqrt(trace + 2 sqrt(det))
    root_trace = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    assert gaussian_wasserstein_correlation(covariance) == pytest.approx(2 * 3 - 2 * root_trace)


def test_most_disentangled_units_of_each_factor():
    shares = np.array([[0.5, 0.1], [0.4, 0.0], [0.1, 0.3], [0.0, 0.6], [0.2, 0.15]])
    assert most_disentangled(shares, 1).tolist() == [1, 3]
    assert most_disentangled(shares, 2).tolist() == [0, 1, 2, 3]
    assert most_disentangled(shares, 9).tolist() == [0, 1, 2, 3, 4]


def test_factors_nobody_knows_have_no_shares():
    assert information_shares(np.array([[0.0, 1.0], [0.0, 3.0]])).tolist() == [[0.0, 0.25], [0.0, 0.75]]


def test_med_keeps_the_best_unit_of_each_factor(mixed):
    found = med(np.hstack([PERFECT, mixed]), SPACE, fresh(), **TRAIN_TEST, topk=1)
    assert found["top1_disentanglement"] > found["disentanglement"] + 0.2
    assert "top2_disentanglement" not in found
    assert not any(name.startswith("top") for name in med(PERFECT, SPACE, fresh(), **TRAIN_TEST, topk=0))


def test_units_that_never_vary_are_standardized_to_zero():
    train, test = standardized(np.array([[0.1, 1.0], [0.1, 3.0], [0.1, 2.0]]), np.array([[0.1, 2.0], [5.0, 2.0]]))
    assert not train[:, 0].any() and not test[:, 0].any()
    assert (train[:, 1].mean(), train[:, 1].std(), test[0, 1]) == pytest.approx((0, 1, 0))


@pytest.mark.parametrize("metric", [sap, modularity_explicitness, med])
def test_a_factor_of_one_value_is_refused(metric):
    space = FactorSpace(("a", "b"), (60, 1))
    with pytest.raises(MetricError, match="factor 1 takes a single value in 50 samples"):
        metric(PERFECT, space, fresh(), num_train=50, num_test=50)
