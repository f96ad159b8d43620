"""Readers of CSV and Parquet: what is a row, a column and a value, and what is refused."""

from __future__ import annotations

import datetime
import decimal
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from ldm.scoring.arrays import array_source, open_array
from ldm.scoring.factors import factors_from_table
from ldm.scoring.tables import open_table
from ldm.util import UserError

GRID = np.array([[a, b, c] for a in range(4) for b in range(3) for c in range(5)])
CODES = GRID + np.random.default_rng(0).normal(scale=0.01, size=GRID.shape)
WORDS = np.array(["red", "blue", "grey", "teal"])[GRID[:, 0]]


def lines(rows, delimiter: str = ",") -> str:
    return "".join(delimiter.join(map(str, row)) + "\n" for row in rows)


def indexed(rows, start: int = 0) -> list[list]:
    return [[number, *row] for number, row in enumerate(rows, start)]


def read(folder: Path, text: str | bytes, num_images: int | None = None) -> dict[str, np.ndarray]:
    path = folder / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_table(path, "factor", num_images).values()


def codes_of(path: Path) -> np.ndarray:
    return np.array(open_array(array_source(path), path.parent / f"copy of {path.name}"))


@pytest.mark.parametrize(
    "text",
    [
        lines(CODES),
        "a,b,c\n" + lines(CODES),
        "0,1,2\n" + lines(CODES),
        "1,2,3\n" + lines(CODES),
        '"0","1","2"\n' + lines(CODES),
        "# a,b,c\n" + lines(CODES),
        ",0,1,2\n" + lines(indexed(CODES)),
        "Unnamed: 0,a,b,c\n" + lines(indexed(CODES, 1)),
        "a,index,b,c\n" + lines([row[0], number, *row[1:]] for number, row in enumerate(CODES)),
        "Unnamed: 0.1,Unnamed: 0,a,b,c\n" + lines(indexed(indexed(CODES))),
        "a;b;c\n" + lines(CODES, ";"),
        "a\tb\tc\n" + lines(CODES, "\t"),
        lines(CODES, ";").replace(".", ","),
        "a;b;c\n" + lines(CODES, ";").replace(".", ","),
        "\ufeff" + "a,b,c\n" + lines(CODES),
        "\ufeff" + lines(CODES),
        "a, b, c\r\n" + lines(CODES).replace("\n", "\r\n"),
        '"first, code",b,c\n' + lines(CODES),
        lines(CODES) + "\n\n",
    ],
)
def test_latents_are_the_same_in_every_form(tmp_path, text):
    (tmp_path / "z.csv").write_bytes(text.encode())
    assert np.array_equal(codes_of(tmp_path / "z.csv"), CODES)


@pytest.mark.parametrize("header", ["", "0,1,2\n", "1,2,3\n", "hue,shape,size\n", ",hue,shape,size\n"])
@pytest.mark.parametrize("num_images", [60, None])
def test_whole_numbers_below_any_header(tmp_path, header, num_images):
    rows = GRID[np.random.default_rng(1).permutation(60)]
    text = header + lines(indexed(rows) if header.startswith(",") else rows)
    assert np.array_equal(np.stack(list(read(tmp_path, text, num_images).values()), axis=1), rows)


def test_a_row_that_looks_like_a_header(tmp_path):
    rows = np.concatenate([[[0, 1, 2]], np.delete(GRID, 7, axis=0)])
    assert GRID[7].tolist() == [0, 1, 2]
    for num_images in (60, None):  # the whole grid is there with the line, and not without it
        assert len(read(tmp_path, lines(rows), num_images)["factor 0"]) == 60
    with pytest.raises(UserError, match=r"t.csv, line 1: 0, 1, 2 may be names of columns or a row"):
        read(tmp_path, lines([[0, 1, 2], [0, 0, 2], [1, 1, 1]]))
    assert len(read(tmp_path, lines([[0, 1, 2], [0, 0, 2], [1, 1, 1]]), 3)["factor 0"]) == 3
    assert list(read(tmp_path, lines([[0, 1, 2], [0, 0, 2], [1, 1, 1]]), 2)) == ["0", "1", "2"]


def test_words_without_a_header_are_a_row(tmp_path):
    found = read(tmp_path, lines(zip(WORDS, GRID[:, 1])))
    assert list(found) == ["factor 0", "factor 1"] and found["factor 0"].tolist() == WORDS.tolist()


def test_left_out_columns_are_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    read(tmp_path, ",a\n" + lines(indexed(CODES[:, :1])))
    read(tmp_path, "0,1,2\n" + lines(CODES))
    assert "t.csv: index column '' left out" in caplog.text and "line 1 (0, 1, 2) read as names" in caplog.text


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n   \n3,4\n", "a,b\n1,2\n\n3,4\n".encode("utf-16"), b"\xef\xbb\xbfa,b\n1,2\n3,4"]
)
def test_blank_lines_and_byte_order_marks(tmp_path, text):
    assert {name: column.tolist() for name, column in read(tmp_path, text).items()} == {"a": [1, 3], "b": [2, 4]}


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "got an empty file"),
        ("a,b\n", "expected one row per image, got none"),
        ("a,b,a\n1,2,3\n", "different names, got 'a' twice"),
        ("a, a\n1,2\n", "different names, got 'a' twice"),
        (",a\n5,1\n6,2\n", "column '': expected row numbers from 0 or 1 in order. Name"),
        ("a,b,\n1,2,\n3,4,\n", "column '': expected row numbers"),
        ("Unnamed: 0,a\nx,1\ny,2\n", "column 'Unnamed: 0': expected row numbers"),
        ("index,a\n2,1\n0,2\n1,3\n", "column 'index': expected row numbers from 0 or 1 in order"),
        ("index\n0\n1\n", "got only row numbers"),
        ("id,a\n" + lines(indexed(CODES[:, :1])), "column 'id' numbers the rows"),
        (lines(indexed(CODES, 1)), "column 'unit 0' numbers the rows"),
        ("a,b\n1,2\n3\n", "t.csv, line 3: expected 2 fields as in the first line, got 1"),
        ("a,b\n1,2\n\n3,4,5\n", "line 4: expected 2 fields .*got 3"),
        ('a,b\n1,2\n"3,4\n', "complete quotes"),
        ("a,b\n1,caf\xe9\n".encode("latin-1"), "text in UTF-8"),
        ("a\n" + "x" * 200_000, "larger than field limit"),
        ("0.1 0.2 0.3\n0.3 0.4 0.5\n", "commas, semicolons or tabs between numbers, got spaces"),
        ("a;b,c\n1;2,x\n3;4,y\n", "both divide the lines"),
        ("a\n1_000\n2_000\n", "got '1_000' in row 0"),
        ("a;b\n1,5;2\n2,5;x\n", "got 'x' in row 1, column 'b'"),
        ("a;b\n0,5;1\nx;1\n", "got 'x' in row 1, column 'a'"),
        ("a;b\n1,000;2\n1.5;3\n", "column 'a'"),  # thousands or decimals
    ],
)
def test_what_is_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        array_source(tmp_path / "t.csv")


@pytest.mark.parametrize("cell", ["", "nan", "NaN", "NA", "null", "None", "high", "1e", "1,5"])
def test_latents_without_a_number(tmp_path, cell):
    text = lines(CODES).split("\n")
    text[7] = f'0.5,"{cell}",1'
    (tmp_path / "z.csv").write_text("a,b,c\n" + "\n".join(text))
    if cell in ("high", "1e", "1,5"):
        with pytest.raises(UserError, match=rf"got '{cell}' in row 7, column 'b'"):
            array_source(tmp_path / "z.csv")
    else:
        assert np.argwhere(np.isnan(codes_of(tmp_path / "z.csv"))).tolist() == [[7, 1]]  # the metrics refuse it


def labels(path: Path, shape: tuple[int, ...] = (60, 3), **options) -> dict:
    """Return names and sizes of the factors in a file."""
    factors = factors_from_table(path, shape, path.parent / "factors.npz", **options)
    return dict(zip(factors.names, factors.sizes)) | factors.details


@pytest.mark.parametrize("cell", ["", " ", "NaN", "nan", "NA", "<NA>", "None", '""'])
@pytest.mark.parametrize("column", [0, 1])
def test_missing_labels(tmp_path, cell, column, caplog):
    rows = [[word, str(size)] for word, size in zip(WORDS, GRID[:, 2])]
    rows[9][column] = rows[30][column] = cell
    path = tmp_path / "f.csv"
    path.write_text("hue,size\n" + lines(rows))
    name = ("hue", "size")[column]
    with pytest.raises(UserError, match=rf"f.csv: .*got none for {name} in row 9 \(2 of"):
        labels(path)
    assert labels(path, missing="drop") == {"hue": 4, "size": 5, "rows_left_out": 2}
    assert "2 of 60 rows left out" in caplog.text


def test_numbers_are_not_guessed(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text("a,b\n1_2,x\n12,y\n1_2,y\n12,x\n")
    assert labels(path, (4, 3)) == {"a": 2, "b": 2}  # names of classes, not the number 12
    for word in ("n/a", "#N/A", "-nan"):
        path.write_text(f"a,b\n1,x\n{word},y\n2,y\n1,x\n")
        assert labels(path, (4, 3), missing="drop")["rows_left_out"] == 1
    long = [2**60, 2**60 + 1]
    path.write_text(f"a,b\n{long[0]},1e30\n{long[1]},2e30\n{long[0]},2e30\n{long[1]},1e30\n")
    assert labels(path, (4, 3)) == {"a": 2, "b": 2}
    np.savetxt(path, GRID)
    with pytest.raises(UserError, match="f.csv: expected commas, semicolons or tabs between numbers, got spaces"):
        labels(path)


def test_blocks_of_wide_and_long_files(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.scoring.tables.BLOCK_ROWS", 7)
    monkeypatch.setattr("ldm.scoring.tables.BLOCK_FIELDS", 10)
    (tmp_path / "z.csv").write_text("0,1,2\n" + lines(CODES))
    assert np.array_equal(codes_of(tmp_path / "z.csv"), CODES)
    found = read(tmp_path, "a,b\n" + lines(zip(CODES[:, 0], ["1"] * 50 + ["x"] * 10)))
    assert found["b"].tolist() == ["1"] * 50 + ["x"] * 10
    with pytest.raises(UserError, match="got 'x' in row 50, column 'b'"):
        array_source(tmp_path / "t.csv")


@pytest.mark.parametrize("number", ["0", "1", "5.5"])
def test_a_single_value(tmp_path, number):
    (tmp_path / "z.csv").write_text(f"{number}\n")
    assert codes_of(tmp_path / "z.csv").tolist() == [[float(number)]]


def test_bins_of_continuous_factors(tmp_path):
    sizes = np.random.default_rng(0).random(60)
    path = tmp_path / "f.csv"
    path.write_text("hue,size\n" + lines(zip(WORDS, sizes)))
    with pytest.raises(UserError, match="size has 60 values in 60 rows and looks continuous.*--bins"):
        labels(path)
    found = labels(path, bins={"size": ("equal_frequency", 5)})
    assert found == {"hue": 4, "size": 5, "bins": {"size": "5 bins of equal frequency"}}
    assert labels(path, bins={"size": ("edges", [0.2, 0.5])})["size"] == 3
    with pytest.raises(UserError, match="--bins hue: expected a column of numbers"):
        labels(path, bins={"hue": ("equal_width", 5)})
    with pytest.raises(UserError, match="expected a column of .*got 'sice'. Did you mean 'size'"):
        labels(path, bins={"sice": ("equal_width", 5)})
    path.write_text("hue,size\n" + lines(zip(WORDS, ["", "inf", *sizes[2:]])))
    with pytest.raises(UserError, match="f.csv: factors: expected finite values, got inf for size in row 1"):
        labels(path, bins={"size": ("equal_width", 4)}, missing="drop")
    with pytest.raises(UserError, match="f.csv: --bins size: .*2 to 1000 bins, got 1000000000"):
        labels(path, bins={"size": ("equal_width", 10**9)}, missing="drop")
    path.write_text("hue,size\n" + lines(zip(WORDS, ["", *sizes[1:]])))
    assert labels(path, bins={"size": ("equal_width", 4)}, missing="drop")["rows_left_out"] == 1


def test_transposed_and_missing_factors(tmp_path):
    with pytest.raises(UserError, match="f.csv: no such file"):
        labels(tmp_path / "f.csv")
    (tmp_path / "f.csv").write_text(lines(GRID.T))
    with pytest.raises(UserError, match="expected 60 rows, .* got 3. One of the files .* in its columns: transpose"):
        labels(tmp_path / "f.csv")
    (tmp_path / "f.csv").write_text(lines(GRID))
    with pytest.raises(UserError, match="expected 3 rows, .* got 60. One of the files"):
        labels(tmp_path / "f.csv", (3, 60))


@pytest.mark.parametrize("kind", ["npy", "npz", "h5"])
def test_objects_are_not_unpickled(tmp_path, kind):
    path = tmp_path / f"z.{kind}"
    if kind == "npy":
        np.save(path, GRID.astype(object), allow_pickle=True)
    elif kind == "npz":
        np.savez(path, latents=GRID.astype(object))
    else:
        import h5py

        with h5py.File(path, "w") as file:
            file.create_dataset("latents", data=[["a", "b"]], dtype=h5py.string_dtype())
    with pytest.raises(UserError, match="Python objects, which are not unpickled"):
        array_source(path)
    with pytest.raises(UserError, match="Python objects, which are not unpickled"):
        labels(path)


def test_words_of_fixed_length_in_hdf5(tmp_path, recwarn):
    import h5py

    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["labels"] = np.char.encode(np.stack([WORDS, GRID[:, 1].astype(str)], axis=1))
    assert labels(tmp_path / "f.h5") == {"factor 0": 4, "factor 1": 3}
    assert not [str(warning.message) for warning in recwarn if "metadata" in str(warning.message)]


def test_arrays_of_words_and_booleans(tmp_path):
    np.save(tmp_path / "f.npy", np.stack([WORDS, GRID[:, 1].astype(str)], axis=1))
    assert labels(tmp_path / "f.npy") == {"factor 0": 4, "factor 1": 3}
    words = np.char.encode(np.stack([WORDS, GRID[:, 1].astype(str)], axis=1))
    words[3, 1] = b""
    np.save(tmp_path / "s.npy", words)
    with pytest.raises(UserError, match="got none for factor 1 in row 3"):
        labels(tmp_path / "s.npy")
    np.save(tmp_path / "b.npy", GRID > 1)
    assert labels(tmp_path / "b.npy") == {"factor 0": 2, "factor 1": 2, "factor 2": 2}
    assert np.array_equal(codes_of(tmp_path / "b.npy"), GRID > 1)
    with pytest.raises(UserError, match="expected numbers, got values of type <U"):
        array_source(tmp_path / "f.npy")
    np.save(tmp_path / "c.npy", GRID * 1j)
    with pytest.raises(UserError, match="complex128"):
        labels(tmp_path / "c.npy")


@pytest.fixture
def parquet(tmp_path):
    """Write columns, and metadata of pandas, to a file."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(columns: dict, index: tuple = (), name: str = "t.parquet") -> Path:
        table = arrow.table({key: values for key, values in columns.items()})
        if index:
            table = table.replace_schema_metadata({"pandas": json.dumps({"index_columns": list(index)})})
        parquet.write_table(table, tmp_path / name, row_group_size=7)
        return tmp_path / name

    return write


def test_index_of_a_data_frame(parquet, caplog):
    caplog.set_level(logging.INFO)
    columns = {"a": CODES[:, 0], "b": CODES[:, 1]}
    plain = codes_of(parquet(columns))
    counter = np.arange(60)
    for number, index in enumerate(["__index_level_0__", "level_0", "index", "Unnamed: 0"]):
        assert np.array_equal(codes_of(parquet(columns | {index: counter}, (), f"{number}.parquet")), plain)
    path = parquet(columns | {"picture": WORDS}, ("picture",), "named.parquet")
    assert np.array_equal(codes_of(path), plain) and "index of a data frame left out (picture)" in caplog.text
    range_index = {"kind": "range", "start": 0, "stop": 60, "step": 1, "name": None}
    assert np.array_equal(codes_of(parquet(columns, (range_index,), "range.parquet")), plain)
    with pytest.raises(UserError, match="got the index only"):
        array_source(parquet({"a": counter}, ("a",), "only.parquet"))


def test_columns_of_parquet_are_read_by_type(parquet, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    columns = {
        "hue": arrow.array(WORDS).dictionary_encode(),
        "price": arrow.array([decimal.Decimal(int(size)) / 10 for size in GRID[:, 2]]),
        "day": arrow.array([datetime.date(2024, 1, 1 + int(day)) for day in GRID[:, 1]]),
        "flag": arrow.array([bool(size > 2) for size in GRID[:, 2]]),
        "small": arrow.array(GRID[:, 1].astype(np.uint8)),
    }
    assert labels(parquet(columns)) == {"hue": 4, "price": 5, "day": 3, "flag": 2, "small": 3}
    numbers = {name: columns[name] for name in ("price", "flag", "small")}
    expected = np.stack([GRID[:, 2] / 10, GRID[:, 2] > 2, GRID[:, 1]], axis=1)
    assert np.allclose(codes_of(parquet(numbers, name="n.parquet")), expected)
    for name in ("hue", "day"):
        with pytest.raises(UserError, match=f"expected a number in every row, got .* in row 0, column '{name}'"):
            array_source(parquet({name: columns[name]}, name="w.parquet"))
    with pytest.raises(UserError, match="expected a number or text for s, got {'x': 1} in row 0"):
        labels(parquet({"s": arrow.array([{"x": 1}] * 60)}, name="s.parquet"))
    with pytest.raises(UserError, match="expected a number in every row, got {'x': 1} in row 0, column 's'"):
        array_source(tmp_path / "s.parquet")


@pytest.mark.parametrize("values", [[3, None] * 30, [True, None] * 30, ["x", None] * 30, [0.5, float("nan")] * 30])
def test_nulls_of_parquet(parquet, tmp_path, values):
    values = [values[1 - number % 2] if number == 9 else values[0] for number in range(60)]
    values[0] = {3: 4, True: False, "x": "y", 0.5: 1.5}[values[0]]
    path = parquet({"a": GRID[:, 0], "b": values})
    values[9] = None
    with pytest.raises(UserError, match="got none for b in row 9 .1 of"):
        labels(parquet({"a": GRID[:, 0], "b": values}, name="f.parquet"))
    assert labels(tmp_path / "f.parquet", missing="drop") == {"a": 4, "b": 2, "rows_left_out": 1}
    long = [2**60, 2**60 + 1] * 29 + [None, 2**60]
    assert labels(parquet({"a": long, "b": GRID[:, 1]}, name="l.parquet"), missing="drop")["a"] == 2
    if path and isinstance(values[0], (int, bool)):
        with pytest.raises(UserError, match="in row 9, column 'b'"):
            codes_of(parquet({"a": GRID[:, 0], "b": values}, name="z.parquet"))


def test_lists_in_parquet(parquet):
    arrow = pytest.importorskip("pyarrow")
    vectors = np.stack([CODES, 2 * CODES], axis=2)  # (60, 3, 2)
    columns = {f"u{k}": list(vectors[:, k]) for k in range(3)}
    assert np.array_equal(codes_of(parquet(columns)), vectors)
    nested = arrow.array(vectors.tolist())
    assert np.array_equal(codes_of(parquet({"z": nested}, name="nested.parquet")), vectors)
    fixed = arrow.array(CODES.tolist(), arrow.list_(arrow.float64(), 3))
    assert np.array_equal(codes_of(parquet({"z": fixed}, name="fixed.parquet")), CODES)
    with pytest.raises(UserError, match="expected columns of equal numbers of values per row"):
        array_source(parquet({"z": fixed, "a": GRID[:, 0]}, name="both.parquet"))


@pytest.mark.parametrize(
    "change,message",
    [
        ({31: [1.0]}, "got 1 values in row 31"),
        ({31: None}, "got 0 values in row 31"),
        ({31: []}, "got 0 values in row 31"),
        ({31: [1.0, None]}, "got a missing value in row 31"),
        (dict.fromkeys(range(60), []), "got 0 values in row 0"),
    ],
)
def test_lists_that_do_not_fit(parquet, change, message):
    rows = [[1.0, float(number)] for number in range(60)]
    for number, values in change.items():
        rows[number] = values
    arrow = pytest.importorskip("pyarrow")
    path = parquet({"z": arrow.array(rows, arrow.list_(arrow.float64()))})
    with pytest.raises(UserError, match=rf"column 'z': expected lists of equal length in every row, {message}"):
        codes_of(path)


def test_two_columns_of_one_name_in_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.Table.from_arrays([arrow.array([1, 2]), arrow.array([3, 4])], ["a", "a"])
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match="different names, got 'a' twice"):
        array_source(tmp_path / "t.parquet")
