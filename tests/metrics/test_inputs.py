"""Values that users pass from Python: read as they are meant, or refused with row and column."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ldm.metrics import FactorTable, MetricError, evaluate
from ldm.metrics.inputs import as_latents

GRID = np.array(list(itertools.product(range(4), range(3), range(5))))
CODES = GRID.astype(float)
WORDS = np.array(["red", "blue", "grey", "teal"])[GRID[:, 0]]
MIG = evaluate(CODES, GRID, "mig")


class Frame:
    """What this package uses of a data frame; its index is not looked at."""

    def __init__(self, **columns) -> None:
        self._columns = columns
        self.columns = list(columns)

    def __getitem__(self, name):
        return self._columns[name]

    def __array__(self, dtype=None, copy=None):
        return np.stack([np.asarray(column, dtype=object) for column in self._columns.values()], axis=1)


def structured(array: np.ndarray) -> np.ndarray:
    rows = np.zeros(len(array), [(name, array.dtype) for name in "abc"])
    for name, column in zip("abc", array.T):
        rows[name] = column
    return rows


FORMS = [
    lambda array: torch.tensor(array, dtype=torch.bfloat16),
    lambda array: torch.tensor(array, dtype=torch.float32, requires_grad=True),
    lambda array: list(torch.tensor(array, dtype=torch.bfloat16, requires_grad=True)),
    lambda array: array.tolist(),
    lambda array: [tuple(row) for row in array],
    lambda array: array.astype(object),
    lambda array: np.ma.masked_less(array, -1),
    lambda array: structured(array),
    lambda array: Frame(a=array[:, 0], b=array[:, 1].tolist(), c=array[:, 2]),
    lambda array: np.asfortranarray(array)[:, ::1],
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_scores(form):
    assert evaluate(form(CODES), GRID, "mig") == MIG
    assert evaluate(CODES, form(GRID), "mig") == MIG


def test_mixed_factors_keep_their_types():
    rows = [[str(word), bool(shape), int(size)] for word, shape, size in zip(WORDS, GRID[:, 1], 9 + GRID[:, 2])]
    table = FactorTable(rows)
    assert [list(values) for values in table.factor_values] == [
        ["blue", "grey", "red", "teal"],
        [False, True],
        [9, 10, 11, 12, 13],
    ]
    frame = Frame(hue=WORDS, size=GRID[:, 2])
    assert FactorTable(frame).factor_names == ("hue", "size")
    assert FactorTable({"hue": WORDS, "size": GRID[:, 2]}).factors_num_values == (4, 5)


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan"), "", "nan", "NA", np.datetime64("NaT")])
def test_rows_without_a_value(missing):
    rows = [[str(word), int(size)] for word, size in zip(WORDS, GRID[:, 2])]
    for column in (0, 1):
        broken = [list(row) for row in rows]
        broken[7][column] = missing
        with pytest.raises(MetricError, match=f"got none for factor {column} in row 7"):
            FactorTable(broken)
        table = FactorTable(broken, missing="drop")
        assert table.num_left_out == 1 and table.factors_num_values == (4, 5)


def test_masked_entries_are_missing():
    masked = np.ma.array(GRID, mask=np.zeros_like(GRID, dtype=bool))
    masked[11, 2] = np.ma.masked
    with pytest.raises(MetricError, match="got none for factor 2 in row 11"):
        FactorTable(masked)
    assert FactorTable(masked, missing="drop").num_left_out == 1
    with pytest.raises(MetricError, match="got a masked one in row 11, column 2"):
        evaluate(masked.astype(float), GRID, "mig")


@pytest.mark.parametrize("wrong", [None, "high", "0.5", [1.0], 1j, {}])
def test_latents_that_are_no_numbers(wrong):
    rows = CODES.astype(object)
    rows[7, 1] = wrong
    for values in (rows, rows.tolist()):
        with pytest.raises(MetricError, match="row 7|real numbers"):
            evaluate(values, GRID, "mig")
    if not isinstance(wrong, (list, complex)):
        with pytest.raises(MetricError, match=r"latents: expected real numbers, got .* in row 7, column 1"):
            evaluate(rows.tolist(), GRID, "mig")


def test_rows_of_different_lengths():
    rows = CODES.tolist()
    rows[9] = rows[9][:2]
    for latents, factors in ((rows, GRID), (CODES, rows)):
        with pytest.raises(MetricError, match="got 2 values in row 9 and 3 in row 0"):
            evaluate(latents, factors, "mig")
    assert FactorTable([3, [1], 3]).factors_num_values == (2,)
    words = [["a", 1], ["b"], ["a", 2]]
    with pytest.raises(MetricError, match="got 1 values in row 1 and 2 in row 0"):
        FactorTable(words)


@pytest.mark.parametrize(
    "value,message",
    [("two", "got 'two' in row 7|row 7"), ([1], "row 7"), (2j, "row 7"), ({}, "row 7"), (object(), "row 7")],
)
def test_factors_that_are_neither_number_nor_text(value, message):
    rows = GRID.astype(object)
    rows[7, 1] = value
    with pytest.raises(MetricError, match=rf"factor 1.*{message}"):
        FactorTable(rows)


def test_other_tables_that_are_refused():
    with pytest.raises(MetricError, match="values of type complex128"):
        FactorTable(GRID * 1j)
    with pytest.raises(MetricError, match=r"expected shape \(N, F\)"):
        FactorTable({"a": [1, 2], "b": [1, 2, 3]})
    with pytest.raises(MetricError, match=r"expected shape \(N, F\)"):
        FactorTable({})
    with pytest.raises(MetricError, match=r"expected shape \(N, F\)"):
        FactorTable({"a": GRID})
    frame = Frame(a=GRID[:, 0], b=GRID[:, 1])
    frame.columns = ["a", "a"]
    with pytest.raises(MetricError, match="columns with different names, got a, a"):
        FactorTable(frame)


@pytest.mark.parametrize(
    "values,message",
    [
        (torch.tensor(GRID).to_sparse(), "expected a dense tensor"),
        (torch.tensor(GRID * 1j).conj(), "expected a dense tensor"),
        (torch.tensor(GRID * 1j), "complex128"),
        ("z.npy", r"array \(N, K\)|shape \(N, F\)"),
        (None, r"array \(N, K\)|shape \(N, F\)"),
        (GRID[:, 0], "expected shape"),
    ],
)
def test_what_is_no_table(values, message):
    with pytest.raises(MetricError, match=message):
        evaluate(values, GRID, "mig")
    with pytest.raises(MetricError, match=message):
        FactorTable(values)


def test_empty_columns():
    with pytest.raises(MetricError, match="expected values for b, but all 3 rows are empty"):
        FactorTable({"a": [1, 2, 1], "b": [None, None, None]})


def test_dates_are_labels():
    days = np.datetime64("2024-01-01") + GRID[:, 1].astype("timedelta64[D]")
    assert FactorTable({"day": days, "size": GRID[:, 2]}).factors_num_values == (3, 5)


def test_arrays_are_not_copied():
    assert np.shares_memory(as_latents(CODES), CODES)


def test_a_single_factor_of_whole_numbers_may_have_a_value_per_row():
    assert FactorTable(np.arange(20.0)[:, None]).factors_num_values == (20,)
    with pytest.raises(MetricError, match="looks continuous"):
        FactorTable(np.linspace(0, 1, 20)[:, None])


def test_standardized_units_of_metrics_that_take_whole_vectors():
    options = {"metrics": "med", "protocol": "fast"}
    scaled = evaluate(CODES * [1e-4, 1.0, 1e3], GRID, standardize=True, **options)
    assert scaled["MED"] == pytest.approx(evaluate(CODES, GRID, standardize=True, **options)["MED"], abs=1e-6)
