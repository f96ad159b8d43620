"""MCC, R2, DCI of regressions and DCI-ES: perfect, turned, useless and repeated units, input that cannot be scored."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cross_decomposition import CCA

from ldm.data.factors import FactorSpace
from ldm.metrics import FactorTable, MetricError, dci_es, dci_regression, mcc, r2
from ldm.metrics.dci import scores_from_importances
from ldm.metrics.registry import ALL_METRICS
from ldm.metrics.regression.dci_es import dci_es_scores, explicitness
from ldm.metrics.regression.mcc import canonical_axes, correlations

SPACE = FactorSpace(("hue", "shape", "size"), (8, 6, 5))
FACTORS = SPACE.factors_of(np.arange(SPACE.size))
PERFECT = (FACTORS - FACTORS.mean(axis=0)) / FACTORS.std(axis=0)
TURNED = PERFECT @ np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
QUICK = {"num_train": 600, "num_test": 300}
FOREST = QUICK | {"depths": (1, 3, 8), "num_trees": 5}


def fresh() -> np.random.RandomState:
    return np.random.RandomState(0)


@pytest.fixture(scope="module")
def mixed() -> np.ndarray:
    rng = np.random.default_rng(3)
    return FACTORS @ rng.normal(size=(3, 5)) + rng.normal(size=(SPACE.size, 5))


def test_perfect_and_turned_units():
    perfect, turned = (mcc(codes, SPACE, fresh(), **QUICK) for codes in (PERFECT, TURNED))
    assert min(perfect.values()) > 0.999
    assert turned["weak_mcc"] > 0.999 and turned["mcc"] < 0.95
    for codes in (PERFECT, TURNED):
        found = r2(codes, SPACE, fresh(), **QUICK)
        assert found["r2_linear"] > 0.999 and found["r2_kernel"] > 0.98


def test_rank_correlation_and_kernel_see_what_is_not_linear():
    bent = np.exp(PERFECT * 2)
    found = mcc(bent, SPACE, fresh(), **QUICK)
    assert found["mcc_spearman"] > 0.999 and found["mcc"] < 0.9
    found = r2(bent, SPACE, fresh(), **QUICK)
    assert found["r2_linear"] < 0.8 < found["r2_kernel"]


def test_useless_units_do_not_predict():
    rng = np.random.default_rng(0)
    table = FactorTable(rng.integers(0, 4, size=(1000, 2)))
    noise = rng.normal(size=(1000, 8))
    assert max(mcc(noise, table, fresh(), **QUICK).values()) < 0.15
    assert max(r2(noise, table, fresh(), **QUICK).values()) < 0.05
    assert dci_regression(noise, table, fresh(), **QUICK)["informativeness_test"] < 0.05
    assert dci_es(noise, table, fresh(), **FOREST)["informativeness_test"] == pytest.approx(0.25, abs=0.1)


def test_order_sign_and_scale_do_not_matter(mixed):
    for metric in (mcc, r2):
        expected = metric(mixed, SPACE, fresh(), **QUICK)
        other = metric(mixed[:, [3, 0, 4, 1, 2]] * [1, -2, 3, -0.5, 1e-3], SPACE, fresh(), **QUICK)
        assert other == pytest.approx(expected, abs=1e-9)
    expected = dci_regression(mixed, SPACE, fresh(), **QUICK)
    assert dci_regression(mixed[:, [3, 0, 4, 1, 2]] * -5, SPACE, fresh(), **QUICK) == pytest.approx(expected, abs=1e-2)


def test_factors_without_a_unit_have_no_correlation():
    assert mcc(PERFECT[:, :1], SPACE, fresh(), **QUICK)["mcc"] == pytest.approx(1 / 3, abs=0.01)
    assert mcc(PERFECT[:, :1], SPACE, fresh(), **QUICK)["weak_mcc"] == pytest.approx(1 / 3, abs=0.01)


def test_factor_values_are_quantities():
    values = 2.0**FACTORS  # not equidistant: the indices of the values are not these quantities
    table = FactorTable(values)
    assert mcc(values, table, fresh(), **QUICK)["mcc"] > 0.9999
    assert r2(FACTORS.astype(float), table, fresh(), **QUICK)["r2_linear"] < 0.95
    words = FactorTable(np.array([["s", "m", "l"][i % 3] for i in range(90)])[:, None].repeat(2, axis=1))
    assert mcc(np.random.default_rng(0).normal(size=(90, 3)), words, fresh(), **QUICK)["mcc"] < 0.6


def test_canonical_axes_are_scikit_learns(mixed):
    codes, values = mixed - mixed.mean(axis=0), PERFECT
    unit_axes, factor_axes = canonical_axes(codes, values)
    found = np.diag(correlations(codes @ unit_axes, values @ factor_axes))
    left, right = CCA(n_components=3, tol=1e-12, max_iter=10_000).fit_transform(codes, values)
    expected = np.diag(correlations(left, right))
    assert found == pytest.approx(expected, abs=1e-6)
    repeated = canonical_axes(np.repeat(codes, 2, axis=1), values)
    assert np.diag(correlations(np.repeat(codes, 2, axis=1) @ repeated[0], values @ repeated[1])) == pytest.approx(
        found
    )


@pytest.mark.parametrize("regressor", ["lasso", "forest", "boosted"])
def test_dci_of_regressions(regressor):
    options = QUICK | {"regressor": regressor}
    found = dci_regression(PERFECT, SPACE, fresh(), **options)
    assert min(found.values()) > 0.95
    copies = dci_regression(np.repeat(PERFECT, 2, axis=1), SPACE, fresh(), **options)
    assert copies["disentanglement"] > 0.95
    if regressor == "forest":  # lasso and boosted trees take one of two copies
        assert copies["completeness"] < 0.9
    turned = dci_regression(TURNED, SPACE, fresh(), **options)
    assert turned["disentanglement"] < 0.8 and turned["informativeness_test"] > 0.8
    parts = [dci_regression(TURNED, SPACE, fresh(), factor, **options) for factor in range(3)]
    assert scores_from_importances(parts) == turned
    entry = ALL_METRICS[f"dci_{regressor}"]
    assert entry.function(TURNED, SPACE, fresh(), **QUICK) == turned and entry.protocol["regressor"] == regressor


def test_an_unknown_regressor_is_named():
    with pytest.raises(MetricError, match="expected one of lasso, forest, boosted; got 'ridge'"):
        dci_regression(PERFECT, SPACE, fresh(), **QUICK, regressor="ridge")


def test_dci_es_of_perfect_and_turned_units():
    perfect, turned = (dci_es(codes, SPACE, fresh(), **FOREST) for codes in (PERFECT, TURNED))
    assert perfect["informativeness_test"] > 0.95 and perfect["size"] == 1.0
    # a forest chooses from some of the units at each split, so that other units are used even if one is perfect
    assert turned["disentanglement"] + 0.15 < perfect["disentanglement"]
    assert -1 <= min(turned["explicitness"], perfect["explicitness"])
    parts = [dci_es(TURNED, SPACE, fresh(), factor, **FOREST) for factor in range(3)]
    assert dci_es_scores(parts) == turned
    assert dci_es(np.repeat(PERFECT, 2, axis=1), SPACE, fresh(), **FOREST)["size"] == 0.5


def test_factors_that_shallow_trees_read_are_explicit():
    space = FactorSpace(("a", "b"), (2, 2))
    factors = space.factors_of(np.arange(4))
    mixture = np.column_stack([factors[:, 0] ^ factors[:, 1], factors[:, 1]])  # a needs two splits
    options = QUICK | {"depths": (1, 2, 3), "num_trees": 25}
    plain, mixed = (dci_es(codes, space, fresh(), **options)["explicitness"] for codes in (factors, mixture))
    assert plain > 0.9 > mixed + 0.1


def test_explicitness_by_hand():
    assert explicitness([0, 1, 3], [0.6, 0.2, 0.2], 0.8) == pytest.approx(1 - 2 * 0.2 / (3 * 0.8))
    assert explicitness([0, 1, 3], [0.6, 0.2, 0.9], 0.8) == explicitness([0, 1, 3], [0.6, 0.2, 0.2], 0.8)
    assert explicitness([0, 1], [0.8, 0.8], 0.8) == 1.0  # a capacity that does not help


@pytest.mark.parametrize("metric,options", [(mcc, QUICK), (r2, QUICK), (dci_regression, QUICK), (dci_es, FOREST)])
def test_bad_input_gives_figures_or_one_clear_line(metric, options):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, size=(60, 2))
    for codes, factors in (
        (np.zeros((60, 3)), labels),
        (np.full((60, 3), 0.1), labels),
        (rng.normal(size=(60, 200)), labels),
        (rng.normal(size=(60, 1)), labels),
        (rng.normal(size=(60, 3)), labels[:, :1]),
        (rng.normal(size=(10, 3)), np.column_stack([np.arange(10), np.arange(10) % 2])),
    ):
        try:
            found = metric(codes, FactorTable(factors), fresh(), **options)
        except MetricError as error:
            assert "\n" not in str(error) and len(str(error)) > 40
        else:
            assert all(np.isfinite(value) for value in found.values())


def test_copies_of_a_row_are_not_in_several_folds():
    rng = np.random.default_rng(0)
    table = FactorTable(rng.integers(0, 3, size=(80, 2)))
    assert r2(rng.normal(size=(80, 3)), table, fresh(), **QUICK)["r2_kernel"] > -1.5
    with pytest.raises(MetricError, match="R2: expected at least 6 different training rows, got 2. Add images"):
        r2(rng.normal(size=(4, 3)), FactorTable([[0, 0], [0, 0], [1, 1], [1, 1]]), fresh(), **QUICK)


def test_units_that_are_too_small_to_be_squared_do_not_vary():
    tiny = PERFECT * [1e-200, 1.0, 1.0]
    padded = PERFECT * [0.0, 1.0, 1.0]
    for metric in (mcc, r2):
        assert metric(tiny, SPACE, fresh(), **QUICK) == metric(padded, SPACE, fresh(), **QUICK)
