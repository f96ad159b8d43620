"""MIG-sup, DCIMIG, JEMMIG and InfoMEC: perfect, useless and repeated units, parts by hand, bad input."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.feature_selection import _mutual_info, mutual_info_classif
from sklearn.neighbors import NearestNeighbors

from ldm.data.factors import FactorSpace
from ldm.metrics import FactorTable, MetricError, dcimig, infomec, jemmig, mcc, mig, mig_sup
from ldm.metrics.common import factor_entropies
from ldm.metrics.information.infomec import concentration, explicitness
from ldm.metrics.information.neighbors import neighbor_information

SPACE = FactorSpace(("hue", "shape", "size"), (8, 6, 5))
FACTORS = SPACE.factors_of(np.arange(SPACE.size))
PERFECT = FACTORS.astype(np.float64)
GAPS = [(mig_sup, "mig_sup"), (dcimig, "dcimig"), (jemmig, "jemmig_normalized")]
QUICK = {"num_train": 3000}


def fresh() -> np.random.RandomState:
    return np.random.RandomState(0)


@pytest.fixture(scope="module")
def mixed() -> np.ndarray:
    rng = np.random.default_rng(3)
    return FACTORS @ rng.normal(size=(3, 5)) + rng.normal(size=(SPACE.size, 5))


@pytest.mark.parametrize("metric,figure", GAPS)
def test_gaps_of_perfect_and_useless_units(metric, figure):
    assert metric(PERFECT, SPACE, fresh(), **QUICK)[figure] > 0.98
    constant = metric(np.ones_like(PERFECT), SPACE, fresh(), **QUICK)[figure]
    noise = metric(np.random.default_rng(0).uniform(size=(4096, 3)), FactorSpace("ab", (64, 64)), fresh())[figure]
    assert noise < 0.08
    assert constant == 0.0 if metric is not jemmig else 0 < constant < 1


@pytest.mark.parametrize("metric,figure", GAPS)
def test_gaps_do_not_depend_on_order_or_scale(mixed, metric, figure):
    expected = metric(mixed, SPACE, fresh(), **QUICK)[figure]
    assert metric(mixed[:, [3, 0, 4, 1, 2]], SPACE, fresh(), **QUICK)[figure] == pytest.approx(expected, abs=1e-12)
    assert metric(mixed * 4.0, SPACE, fresh(), **QUICK)[figure] == pytest.approx(expected, abs=1e-12)
    flipped = metric(-mixed, SPACE, fresh(), **QUICK)[figure]
    assert flipped == pytest.approx(expected, abs=0.02)  # a bin holds its lower edge only


def test_repeated_units_lower_jemmig_but_not_mig_sup_and_dcimig():
    copies = np.repeat(PERFECT, 2, axis=1)
    assert mig_sup(copies, SPACE, fresh(), **QUICK)["mig_sup"] > 0.98
    assert dcimig(copies, SPACE, fresh(), **QUICK)["dcimig"] > 0.98
    assert mig(copies, SPACE, fresh(), **QUICK)["discrete_mig"] == 0.0
    assert jemmig(copies, SPACE, fresh(), **QUICK)["jemmig_normalized"] < 0.7


def test_units_with_two_factors_lower_mig_sup():
    both = np.column_stack([PERFECT[:, 0] * 8 + PERFECT[:, 1], PERFECT[:, 1], PERFECT[:, 2]])
    found = mig_sup(both, SPACE, fresh(), **QUICK)["mig_sup"]
    assert found < 0.95 < mig_sup(PERFECT, SPACE, fresh(), **QUICK)["mig_sup"]


def test_a_dead_unit_changes_nothing():
    padded = np.column_stack([PERFECT, np.full(SPACE.size, 0.1)])
    for metric, figure in [*GAPS, (infomec, "infom"), (infomec, "infoc"), (infomec, "infoe")]:
        expected = metric(PERFECT, SPACE, fresh(), **QUICK)[figure]
        assert metric(padded, SPACE, fresh(), **QUICK)[figure] == pytest.approx(expected, abs=1e-6)


def test_jemmig_by_hand():
    space = FactorSpace(("a", "b"), (2, 2))
    codes = np.array([[0, 0, 0], [1, 0, 0], [2, 1, 0], [3, 1, 0]], dtype=float)  # unit 0 splits factor a further
    found = jemmig(codes, space, fresh(), num_train=20_000)
    # a: H(z, y) - I(z; y) of unit 1 = 0, and I of unit 0 = log 2; b: H = log 4, I = log 2, no other unit
    assert found["jemmig"] == pytest.approx((np.log(2) + np.log(2)) / 2, abs=0.01)
    assert found["jemmig_normalized"] == pytest.approx(1 - np.log(2) / (np.log(2) + np.log(20)), abs=0.01)


@pytest.mark.parametrize("num", [40, 700])
def test_neighbor_information_is_scikit_learns(num, monkeypatch):
    # in groups of up to twice the neighbours, scikit-learn rounds distances (brute force) and may count the k-th
    monkeypatch.setattr(_mutual_info, "NearestNeighbors", lambda: NearestNeighbors(algorithm="kd_tree"))
    rng = np.random.default_rng(num)
    labels = rng.integers(0, 7, size=(num, 2))
    labels[0] = 9  # a label of its own
    codes = np.column_stack([labels @ [1.0, 0.4] + rng.normal(size=num), labels[:, 0], 1000 + rng.normal(size=num)])
    found = neighbor_information(codes, labels, fresh())
    for unit, factor in np.ndindex(found.shape):
        args = {"discrete_features": False, "n_neighbors": 10, "random_state": fresh()}
        expected = mutual_info_classif(codes[:, [unit]], labels[:, factor], **args)[0]
        assert found[unit, factor] == pytest.approx(expected, abs=1e-12)
    for constant in (np.full((num, 1), 0.1), 1e-200 * codes):
        assert not neighbor_information(constant, labels, fresh()).any()


def test_neighbor_information_of_discrete_units_is_their_entropy():
    labels = np.random.default_rng(0).integers(0, 5, size=(4000, 1))
    found = neighbor_information(labels.astype(float), labels, fresh())
    assert found[0, 0] == pytest.approx(factor_entropies(labels)[0], abs=0.01)


def test_infomec_of_perfect_units():
    for codes in (PERFECT, FACTORS, PERFECT * [1.0, -3.0, 0.5]):
        found = infomec(codes, SPACE, fresh(), **QUICK)
        assert min(found["infom"], found["infoc"], found["infoe"]) > 0.95 and found["num_active_units"] == 3
    copies = infomec(np.repeat(PERFECT, 2, axis=1), SPACE, fresh(), **QUICK)
    assert copies["infoc"] == pytest.approx(0.4, abs=0.02) and copies["infom"] > 0.95  # (1/2 - 1/6) / (1 - 1/6)


def test_infomec_of_discrete_codes_is_given_by_their_type_or_by_name():
    folded = FACTORS[:, 0] + 8 * (FACTORS[:, 2] % 2)  # two values for each hue: no linear readout
    codes = np.column_stack([folded, FACTORS[:, 1:]])
    assert infomec(codes, SPACE, fresh(), **QUICK)["infoe"] > 0.99
    named = infomec(codes.astype(float), SPACE, fresh(), discrete_codes=True, **QUICK)
    assert named == infomec(codes, SPACE, fresh(), **QUICK)
    assert infomec(codes.astype(float), SPACE, fresh(), **QUICK)["infoe"] < 0.9


def test_random_codes_are_not_explicit_even_in_few_rows():
    rng = np.random.default_rng(0)
    table = FactorTable(rng.integers(0, 4, size=(600, 2)))
    found = infomec(rng.normal(size=(600, 8)), table, fresh(), **QUICK)
    assert found["infoe"] < 0.02


def test_copies_of_a_row_are_not_neighbors():
    rng = np.random.default_rng(1)
    table = FactorTable(rng.integers(0, 4, size=(300, 2)))
    few = infomec(rng.normal(size=(300, 6)), table, fresh(), num_train=5000)
    assert few["infom"] > 0  # estimation errors of some units
    perfect = np.array([table.factor_values[0][table._labels[:, 0]], rng.normal(size=300)]).T
    found = infomec(perfect, table, fresh(), num_train=5000)
    assert found["infoc"] > 0.4  # the unit of factor 0 leads, the other one has no information


def test_order_and_scale_of_units_do_not_matter_to_infomec(mixed):
    expected = infomec(mixed, SPACE, fresh(), **QUICK)
    turned = infomec(mixed[:, [3, 0, 4, 1, 2]], SPACE, fresh(), **QUICK)
    assert turned == pytest.approx(expected, abs=1e-3)
    assert infomec(mixed * -2.0, SPACE, fresh(), **QUICK) == pytest.approx(expected, abs=1e-3)


def test_concentration_by_hand():
    rows = np.array([[1.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    assert concentration(rows) == pytest.approx((0.5 - 1 / 3) / (2 / 3))
    assert concentration(rows, count_empty=True) == pytest.approx((0.5 - 1 / 3) / (2 / 3) / 2)
    assert concentration(rows[:, :1]) == concentration(np.zeros((2, 3))) == concentration(np.zeros((2, 0))) == 0.0


def test_explicitness_counts_known_labels_only():
    codes, labels = np.arange(20.0)[:, None] % 4, (np.arange(20)[:, None] % 4) // 2
    train, test = explicitness(codes, labels, codes[:2], np.array([[0], [7]]), 0, False)
    assert train > 0.9 and test > 0.9
    assert explicitness(codes, labels, codes[:2], np.array([[7], [8]]), 0, False)[1] == 0.0


@pytest.mark.parametrize("metric", [mig_sup, dcimig, jemmig, infomec])
def test_bad_input_gives_figures_or_one_clear_line(metric):
    rng = np.random.default_rng(0)
    for codes in (np.zeros((60, 3)), np.full((60, 3), 0.1), rng.normal(size=(60, 200)), np.zeros((60, 3), dtype=int)):
        found = metric(codes, FactorTable(rng.integers(0, 3, size=(60, 2))), fresh(), num_train=400)
        assert all(np.isfinite(value) for value in found.values())
    for codes, factors in (
        (rng.normal(size=(60, 1)), rng.integers(0, 3, size=(60, 2))),
        (rng.normal(size=(60, 3)), rng.integers(0, 3, size=(60, 1))),
        (rng.normal(size=(60, 3)), np.column_stack([np.arange(60), np.arange(60) % 2])),
    ):
        try:
            found = metric(codes, FactorTable(factors), fresh(), num_train=400)
        except MetricError as error:
            assert "\n" not in str(error) and len(str(error)) > 40
        else:
            assert all(np.isfinite(value) for value in found.values())


@pytest.mark.parametrize("metric", [infomec, mcc, jemmig])
def test_twenty_units_take_less_than_five_seconds(metric):
    space = FactorSpace("abcdef", (10, 10, 10, 8, 4, 15))
    weights = np.random.default_rng(0).normal(size=(6, 20))

    def codes(rows):
        return space.factors_of(rows) @ weights + np.sin(rows[:, None] * np.arange(1, 21))

    metric(codes, space, fresh(), num_train=200)  # imports
    start = time.process_time()
    metric(codes, space, fresh())
    assert time.process_time() - start < 5
