"""Sampling from tables of factor values: complete ones as disentanglement_lib does, others row by row."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.data.factors import FactorSpace
from ldm.metrics import FactorTable, MetricError, beta_vae, dci, factor_vae, mig
from ldm.metrics.common import factor_codes, hold_fixed

SPACE = FactorSpace(("hue", "shape", "size"), (5, 4, 3))
FACTORS = SPACE.factors_of(np.arange(SPACE.size))
SMALL = {"num_train": 200, "num_eval": 100, "batch_size": 16}


def fresh() -> np.random.RandomState:
    return np.random.RandomState(0)


@pytest.mark.parametrize("metric,options", [(factor_vae, SMALL), (beta_vae, SMALL), (mig, {"num_train": 500})])
@pytest.mark.parametrize("many", [0, 10**9])
def test_a_complete_table_is_a_factor_space_draw_for_draw(metric, options, many, monkeypatch):
    monkeypatch.setattr("ldm.metrics.common.MANY_DRAWS", many)
    codes = FACTORS @ np.random.default_rng(1).normal(size=(3, 4))
    order = np.random.default_rng(2).permutation(len(codes))  # rows of a table stand in any order
    expected = metric(codes, SPACE, fresh(), **options)
    assert metric(codes[order], FactorTable(FACTORS[order]), fresh(), **options) == expected


def test_values_of_any_kind_are_numbered_in_their_order():
    table = FactorTable([["red", "0.5"], ["blue", "0.25"], ["red", "0.25"]])
    assert [list(values) for values in table.factor_values] == [["blue", "red"], ["0.25", "0.5"]]
    mixed = FactorTable(np.array([["red", 10], ["blue", 9], ["red", 9]], dtype=object))
    assert list(mixed.factor_values[1]) == [9, 10]
    assert mixed.sample_observations_from_factors(np.array([[1, 0], [0, 0], [1, 1]]), fresh()).tolist() == [2, 1, 0]


def test_copies_are_picked_evenly():
    table = FactorTable(np.tile(FACTORS, (10, 1)))
    assert table.is_complete and table.has_copies and table.product_sizes is None
    factors = table.sample_factors(6000, fresh())
    rows = table.sample_observations_from_factors(factors, fresh())
    assert np.array_equal(FACTORS[rows % 60], factors)
    counts = np.bincount(rows // 60, minlength=10)
    assert counts.min() > 500 and counts.max() < 700


def test_copies_score_as_one_row_would():
    codes = FACTORS.astype(float)
    copies = factor_vae(np.tile(codes, (10, 1)), FactorTable(np.tile(FACTORS, (10, 1))), fresh(), **SMALL)
    assert copies["eval_accuracy"] == 1.0


@pytest.fixture
def gaps() -> FactorTable:
    """Only rows whose factors do not sum to a multiple of three."""
    return FactorTable(FACTORS[FACTORS.sum(axis=1) % 3 != 0])


def test_rows_of_an_incomplete_table_are_drawn_evenly(gaps):
    assert not gaps.is_complete and gaps.product_sizes is None
    rows = gaps.sample_observations_from_factors(gaps.sample_factors(8000, fresh()), fresh())
    counts = np.bincount(rows, minlength=gaps.size)
    assert counts.min() > 0.7 * 8000 / gaps.size and counts.max() < 1.3 * 8000 / gaps.size


def test_held_factors_are_drawn_from_the_rows_that_share_the_value(gaps):
    drawn = gaps.sample_factors(500, fresh())
    values = drawn[::-1, 1]
    held = hold_fixed(gaps, drawn, 1, values, fresh())
    assert np.array_equal(held[:, 1], values)
    gaps.sample_observations_from_factors(held, fresh())  # every combination exists
    others = {tuple(row) for row in hold_fixed(gaps, drawn, 0, 2, fresh())}
    assert others == {tuple(row) for row in gaps.sample_factors(5000, fresh()) if row[0] == 2}


def test_a_perfect_representation_of_an_incomplete_table_scores_one(gaps):
    codes = FACTORS[FACTORS.sum(axis=1) % 3 != 0].astype(float)
    assert factor_vae(codes, gaps, fresh(), **SMALL)["eval_accuracy"] == 1.0
    assert beta_vae(codes, gaps, fresh(), **SMALL)["eval_accuracy"] > 0.95
    codes, labels = factor_codes(codes, gaps, 50, fresh())
    assert np.array_equal(codes, labels)


def test_combinations_that_are_missing_are_named(gaps):
    with pytest.raises(MetricError, match=r"no row with the value indices \[1, 1, 1\]"):
        gaps.sample_observations_from_factors(np.array([[1, 1, 1]]), fresh())


@pytest.mark.parametrize("missing", [None, ""])
def test_tables_travel_to_other_processes(tmp_path, missing):
    words = np.array([["a", 0.5], ["b", 1.5], ["b", 0.5], [missing, 1.5]], dtype=object)
    table = FactorTable(words, ("letter", "size"), missing="drop")
    table.save(tmp_path / "table.npz")
    again = FactorTable.load(tmp_path / "table.npz")
    assert (again.size, again.num_left_out, again.factor_names) == (4, 1, ("letter", "size"))
    assert [values.tolist() for values in again.factor_values] == [["a", "b"], [0.5, 1.5]]
    assert np.array_equal(again.sample_factors(9, fresh()), table.sample_factors(9, fresh()))
    assert again.sample_observations_from_factors(np.array([[1, 0]]), fresh()).tolist() == [2]


@pytest.mark.parametrize(
    "factors,message",
    [
        (np.zeros(5), r"shape \(N, F\).*got \(5,\)"),
        (np.zeros((0, 2)), "got"),
        (np.zeros((3, 5000)), "pass factors.T"),
        (np.array([[0.0, 1.0], [np.nan, 1.0]]), "got none for factor 0 in row 1"),
        (np.random.default_rng(0).normal(size=(50, 2)), "looks continuous"),
        (np.arange(20_000).reshape(-1, 1) * np.ones((1, 5), dtype=int), "number or name of each image"),
        (np.ones((20, 2)), "factor 0, factor 1 has a single value"),
    ],
)
def test_tables_that_cannot_be_sampled(factors, message):
    with pytest.raises(MetricError, match=message):
        FactorTable(factors)


def test_names():
    with pytest.raises(MetricError, match="names: expected 3, one per factor"):
        FactorTable(FACTORS, names=["hue"])
    assert FactorTable(FACTORS, names=SPACE.factor_names).factor_names == ("hue", "shape", "size")


BINARY = np.random.default_rng(3).integers(2, size=(400, 312))


def test_hundreds_of_binary_attributes_are_discrete():
    table = FactorTable(BINARY)
    drawn = table.sample_factors(50, fresh())
    rows = table.sample_observations_from_factors(drawn, fresh())
    assert np.array_equal(BINARY[rows], drawn) and not table.is_complete
    train, test = table.split(fresh())
    assert test.sample_factors(9, fresh()).shape == (9, 312)
    assert factor_codes(BINARY, train, 20, fresh())[0].shape == (20, 312)


def test_rows_without_a_value_are_left_out_by_option():
    factors = np.array([["a", "x"], ["a", ""], ["b", "x"], [None, "y"], ["b", "y"], ["a", "y"]], dtype=object)
    with pytest.raises(MetricError, match="got none for factor 1 in row 1 .2 of 6 rows"):
        FactorTable(factors)
    table = FactorTable(factors, missing="drop")
    assert table.size == 6 and table.num_left_out == 2 and table.is_complete
    rows = table.sample_observations_from_factors(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), fresh())
    assert rows.tolist() == [0, 5, 2, 4]


def test_a_constant_factor_is_left_out_with_a_warning(caplog):
    codes = FACTORS.astype(float)
    constant = np.insert(FACTORS, 1, 7, axis=1)
    table = FactorTable(constant, names=["hue", "floor", "shape", "size"])
    assert "floor left out" in caplog.text and table.factor_names == ("hue", "shape", "size")
    expected = factor_vae(codes, FactorTable(FACTORS), fresh(), **SMALL)
    assert factor_vae(codes, table, fresh(), **SMALL) == expected


@pytest.mark.parametrize("factors", [np.tile(FACTORS, (4, 1)), FACTORS[FACTORS.sum(axis=1) % 3 != 0], BINARY[:, :20]])
def test_training_and_test_rows_are_disjoint_halves(factors):
    table = FactorTable(factors)
    seen = []
    for side in table.split(fresh()):
        drawn = side.sample_factors(4000, fresh())
        rows = side.sample_observations_from_factors(drawn, fresh())
        assert np.array_equal(factors[rows], drawn)
        held = hold_fixed(side, drawn, 0, drawn[::-1, 0], fresh())
        assert set(side.sample_observations_from_factors(held, fresh())) <= set(rows)
        seen.append(set(rows))
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == len(factors)


def test_both_halves_have_all_values():
    grid = np.stack(np.meshgrid(range(6), range(5), range(4), indexing="ij"), axis=-1).reshape(-1, 3)
    table = FactorTable(grid[np.abs(grid[:, 0] - grid[:, 1]) <= 1])  # one row of each combination
    for side in table.split(fresh()):
        drawn = side.sample_factors(2000, fresh())
        assert [len(np.unique(column)) for column in drawn.T] == [6, 5, 4]


def test_a_complete_set_with_one_row_each_is_not_split():
    table = FactorTable(FACTORS)
    assert table.split(fresh()) == (table, table)


@pytest.mark.parametrize("values", [2, 4])
def test_random_codes_predict_nothing(values):
    random = np.random.default_rng(5)
    factors, codes = random.integers(values, size=(1000, 3)), random.normal(size=(1000, 4))
    found = dci(codes, FactorTable(factors), fresh(), num_train=2000, num_test=2000)["informativeness_test"]
    assert abs(found - 1 / values) < 0.04


@pytest.mark.parametrize(
    "column",
    [np.arange(500), np.array([f"{number}.png" for number in range(500)]), np.append(np.linspace(0, 1, 498), [0, 0])],
)
def test_ids_and_quantities_are_refused(column):
    factors = np.stack([np.arange(500) % 5, column.astype(object)], axis=1)
    with pytest.raises(MetricError, match="looks (like a number or name of each image|continuous)"):
        FactorTable(factors)
