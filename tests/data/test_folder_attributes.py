"""Attributes of folders of images: free text, chosen columns, bins, several labels, splits of tables, holdout."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.describe import describe
from ldm.data.formats.attribute_tables import held_out_combinations
from ldm.data.formats.folder import ImageFolder
from ldm.data.traits import missing_vocabulary_of
from ldm.data.vocabulary import UNKNOWN
from ldm.util import ConfigError, UserError

HUES, SHAPES, SIZES = ("red", "green", "blue"), ("ball", "cube"), ("big", "small")
GRID = list(itertools.product(HUES, SHAPES, SIZES))


def write(folder, rows, header=("image", "hue", "shape", "size"), name="table.csv"):
    """Write a table of rows without file names, and one picture for each row."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [",".join(header)]
    for number, row in enumerate(rows):
        picture = folder / f"{number:03d}.png"
        if not picture.exists():
            Image.fromarray(np.full((4, 4, 3), number % 256, np.uint8)).save(picture)
        lines.append(",".join(map(str, (picture.name, *row))))
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def words_of(data, name):
    return data.vocabulary.words[data.vocabulary.factor_names.index(name)]


def texts_of(data, rows):
    return data.vocabulary.texts(data.attribute_values(np.asarray(rows)))


def test_free_text_is_reported(tmp_path, caplog):
    folder = write(tmp_path, [(f"note {k}", k % 2) for k in range(90)], ("image", "note", "kind"))
    data = ImageFolder(folder, "table.csv", image_size=4)
    for part in ("table.csv", "'note' has 90 different entries", "more than the 64", "columns: [kind]", "max_words"):
        assert part in caplog.text and part in data.missing_vocabulary
    assert "bin its numbers" not in caplog.text and missing_vocabulary_of(data) == data.missing_vocabulary
    assert data.vocabulary is None and data[3]["text"] == ["note 3", "1"]
    assert "text" not in ImageFolder(folder, "table.csv", image_size=4, text=None)[0]
    for option in ({"text": "caption"}, {"holdout": 0.2}, {"caption_weights": [1, 2]}):
        with pytest.raises(ConfigError, match="needs a data set with a vocabulary.*'note' has 90 different entries"):
            ImageFolder(folder, "table.csv", **option)
    with pytest.raises(ConfigError, match="expected a data set with a vocabulary.*'note' has 90"):
        describe(data, "vocabulary")
    caplog.clear()
    assert ImageFolder(folder, "table.csv", columns=["kind"]).vocabulary.num_units == 1
    assert ImageFolder(folder, "table.csv", max_words=90, text="caption").vocabulary.num_units == 2
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_numbers_as_free_text_are_to_be_binned(tmp_path, caplog):
    folder = write(tmp_path, [(k, "x") for k in range(70)] + [("", "y")], ("image", "id", "kind"))
    assert ImageFolder(folder, "table.csv").vocabulary is None
    assert "bin its numbers (bins: {id: 4})" in caplog.text
    empty = write(tmp_path / "e", [("", "x"), ("", "y")], ("image", "none", "kind"))
    assert ImageFolder(empty, "table.csv").vocabulary is None and "'none' has no entries" in caplog.text


def test_chosen_columns(tmp_path):
    folder = write(tmp_path, [(k, *row) for k, row in enumerate(GRID)], ("image", "id", "hue", "shape", "size"))
    data = ImageFolder(folder, "table.csv", columns=["size", "hue"], label="id", templates={"hue": ["a {} one", "{}"]})
    assert data.vocabulary.factor_names == ("size", "hue") and data.space.all_names == ("size", "hue", "instance")
    assert texts_of(data, [0]) == [["big", "a blue one"]]
    by_picture = {f"{k:03d}.png": k for k in range(12)}
    assert [data[k]["class_label"].item() for k in range(12)] == [by_picture[name] for name in data.pictures]
    for wrong, message in {
        "columns": "got 'hues'. Did you mean 'hue'",
        "bins": "got 'shape'",
        "several": "got 'id'",
    }.items():
        options = {
            "columns": ["hue"],
            wrong: {"columns": ["hues"], "bins": {"shape": 2}, "several": {"id": ";"}}[wrong],
        }
        with pytest.raises(ConfigError, match=f"{wrong}: .*{message}"):
            ImageFolder(folder, "table.csv", **options)
    with pytest.raises(ConfigError, match="expected different columns"):
        ImageFolder(folder, "table.csv", columns=[])
    with pytest.raises(ConfigError, match="templates: .* got 'id'"):
        ImageFolder(folder, "table.csv", columns=["hue"], templates={"id": "{}"})
    with pytest.raises(ConfigError, match="columns, bins: expected a table of attributes"):
        ImageFolder(folder, columns=["hue"], bins={"id": 2})


def test_bins_of_equal_frequency_and_edges(tmp_path):
    ages = [5, 12, 17.5, 18, 30, 40, "", 70]
    folder = write(tmp_path, [(age,) for age in ages], ("image", "age"))
    data = ImageFolder(folder, "table.csv", bins={"age": [18, 40, 65]})
    assert words_of(data, "age") == ["below 18", "18 to 40", "40 to 65", "65 or more"]
    values = [0, 0, 0, 1, 1, 2, UNKNOWN, 3]
    assert data.attribute_values(np.arange(8))[:, 0].tolist() == values and texts_of(data, [6]) == [[""]]
    shown = ImageFolder(folder, "table.csv", bins={"age": [0, 17.5]}, templates={"age": "aged {}"})
    assert words_of(shown, "age") == ["0 to 17.5", "17.5 or more"] and texts_of(shown, [1]) == [["aged 0 to 17.5"]]
    equal = write(tmp_path / "equal", [(k,) for k in range(1, 9)], ("image", "n"))
    data = ImageFolder(equal, "table.csv", bins={"n": 4})
    assert words_of(data, "n") == ["below 3", "3 to 5", "5 to 7", "7 or more"]
    assert np.bincount(data.attribute_values(np.arange(8))[:, 0]).tolist() == [2, 2, 2, 2]


def test_bins_of_many_equal_numbers(tmp_path, caplog):
    folder = write(tmp_path, [(k,) for k in [0] * 8 + [1, 2]], ("image", "n"))
    assert words_of(ImageFolder(folder, "table.csv", bins={"n": 5}), "n") == ["below 1", "1 or more"]
    assert "2 bins instead of 5" in caplog.text
    same = write(tmp_path / "same", [(3,), (3,)], ("image", "n"))
    with pytest.raises(UserError, match="expected different numbers in the column 'n'"):
        ImageFolder(same, "table.csv", bins={"n": 2})


@pytest.mark.parametrize("entry", ["old", "inf", "1;2"])
def test_entries_that_are_no_numbers(tmp_path, entry):
    folder = write(tmp_path, [(1,), (2,), (entry,)], ("image", "age"))
    with pytest.raises(UserError, match=rf"row 3 \(002.png\): expected a number in the column 'age', got '{entry}'"):
        ImageFolder(folder, "table.csv", bins={"age": [2]})


@pytest.mark.parametrize("bins", [1, True, [], "2", [3, 2], [2, 2], [1, "x"], [float("nan")], None])
def test_bad_bins(tmp_path, bins):
    folder = write(tmp_path, [(1,), (2,)], ("image", "age"))
    with pytest.raises(ConfigError, match="bins.age: expected"):
        ImageFolder(folder, "table.csv", bins={"age": bins})


def test_several_labels(tmp_path):
    rows = [("hat; glasses", "a"), ("hat", "b"), (";", "a"), ("", "b"), ("glasses;glasses", "a")]
    folder = write(tmp_path, rows, ("image", "wears", "kind"))
    data = ImageFolder(folder, "table.csv", several={"wears": ";"}, templates={"wears": ["with {}", "wearing {}"]})
    assert data.vocabulary.factor_names == ("wears glasses", "wears hat", "kind")
    assert words_of(data, "wears hat") == ["no hat", "hat"] and data.vocabulary.phrases(1, 1) == [
        "with hat",
        "wearing hat",
    ]
    assert data.attribute_values(np.arange(5)).tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0], [-1, -1, 1], [1, 0, 0]]
    assert texts_of(data, [1, 3]) == [["with no glasses", "with hat", "b"], ["", "", "b"]]
    own = ImageFolder(folder, "table.csv", several={"wears": ";"}, templates={"wears hat": "{} on"})
    assert own.vocabulary.phrases(1, 0) == ["no hat on"] and own.vocabulary.phrases(0, 0) == ["no glasses"]
    with pytest.raises(ConfigError, match="several.wears: expected the separator"):
        ImageFolder(folder, "table.csv", several={"wears": " "})
    with pytest.raises(ConfigError, match="each in bins or in several"):
        ImageFolder(folder, "table.csv", several={"wears": ";"}, bins={"wears": 2})
    with pytest.raises(UserError, match="expected labels in the column 'wears', got none"):
        ImageFolder(
            write(tmp_path / "none", [("", "a")], ("image", "wears", "kind")), "table.csv", several={"wears": ";"}
        )
    clash = write(tmp_path / "clash", [("hat", "x")], ("image", "wears", "wears hat"))
    with pytest.raises(ConfigError, match="attributes with different names"):
        ImageFolder(clash, "table.csv", several={"wears": ";"})


def test_labels_of_a_full_product_are_factors(tmp_path):
    rows = [(";".join(labels) or ";", kind) for labels in ((), ("a",), ("b",), ("a", "b")) for kind in "xy"]
    data = ImageFolder(write(tmp_path, rows, ("image", "has", "kind")), "table.csv", several={"has": ";"})
    assert data.space.factor_names == ("has a", "has b", "kind") and data.space.factors_num_values == (2, 2, 2)


def test_a_column_of_splits_keeps_words_and_factors(tmp_path):
    splits = ["train"] * 8 + ["val", "Validation", "test", ""]
    folder = write(tmp_path, [(*row, s) for row, s in zip(GRID, splits)], ("image", "hue", "shape", "size", "part"))
    found = {
        split: ImageFolder(folder, "table.csv", split_column="part", split=split)
        for split in (None, "train", "val", "validation", "evaluation", "test")
    }
    assert {split: len(data) for split, data in found.items()} == {
        None: 12, "train": 8, "val": 1, "validation": 1, "evaluation": 1, "test": 1,
    }  # fmt: skip
    whole = found[None]
    for data in found.values():
        assert data.vocabulary == whole.vocabulary and data.space.to_dict() == whole.space.to_dict()
        assert data.space.factors_num_values == (3, 2, 2)
        for position in range(len(data)):
            row = int(data.rows[position])
            assert (data[position]["attributes"] == whole[row]["attributes"]).all()
            assert (data[position]["factors"] == whole[row]["factors"]).all()
    assert not set(found["train"].rows) & set(found["test"].rows)
    limited = ImageFolder(folder, "table.csv", split_column="part", split="train", limit=3)
    assert len(limited) == 3 and set(limited.rows) < set(found["train"].rows)
    for options, message in {
        "split_column": ({"split_column": "prat"}, "split_column: .*Did you mean 'part'"),
        "entries": ({"split_column": "hue"}, r"row 1 \(000.png\): expected one of .*train.* got 'red'"),
        "holdout": ({"split_column": "part", "holdout": 0.1}, "holdout: expected splits made by it"),
    }.values():
        with pytest.raises((ConfigError, UserError), match=message):
            ImageFolder(folder, "table.csv", **options)
    only = write(tmp_path / "only", [("a", "train"), ("b", "train")], ("image", "k", "part"))
    with pytest.raises(ConfigError, match="split: test needs one of test, val"):
        ImageFolder(only, "table.csv", split_column="part", split="test")


def test_two_tables_share_their_words(tmp_path):
    folder = write(tmp_path, [*GRID[:6]], name="train.csv")
    write(folder, [*GRID[4:]], name="test.csv")  # other hues
    both = ["train.csv", "test.csv"]
    train, test = (ImageFolder(folder, table, words_from=both) for table in both)
    assert train.vocabulary == test.vocabulary and words_of(train, "hue") == ["blue", "green", "red"]
    alone = ImageFolder(folder, "train.csv")
    assert words_of(alone, "hue") == ["green", "red"]
    with pytest.raises(UserError, match="test.csv: expected the words of .*train.csv in the column 'hue' .*got 'blue'"):
        ImageFolder(folder, "test.csv", words_from="train.csv")
    write(folder, [("red",)], ("image", "hue"), "narrow.csv")
    with pytest.raises(UserError, match="narrow.csv: expected the columns of .*'shape'"):
        ImageFolder(folder, "test.csv", words_from="narrow.csv")


def test_two_tables_share_their_bins(tmp_path):
    folder = write(tmp_path, [(k,) for k in range(12)], ("image", "n"), "train.csv")
    write(folder, [(k,) for k in (100, 3)], ("image", "n"), "test.csv")
    train, test = (ImageFolder(folder, t, words_from="train.csv", bins={"n": 3}) for t in ("train.csv", "test.csv"))
    assert train.vocabulary == test.vocabulary and words_of(test, "n") == ["below 4", "4 to 8", "8 or more"]
    assert test.attribute_values(np.arange(2)).tolist() == [[2], [0]]
    write(folder, [("x",)], ("image", "n"), "wrong.csv")
    with pytest.raises(UserError, match=r"wrong.csv, row 1 \(000.png\): expected a number"):
        ImageFolder(folder, "wrong.csv", words_from="train.csv", bins={"n": 3})


def test_words_do_not_depend_on_the_split(tmp_path):
    rows = [(f"note {k}",) for k in range(70) for _ in range(4)]
    folder = write(tmp_path, rows, ("image", "note"))
    (folder / "train").mkdir(), (folder / "val").mkdir()
    names = {f"{k:03d}.png": f"{'val' if k % 10 == 0 else 'train'}/{k:03d}.png" for k in range(280)}
    for old, new in names.items():
        (folder / old).rename(folder / new)
    table = (folder / "table.csv").read_text()
    for old, new in names.items():
        table = table.replace(old, new)
    (folder / "table.csv").write_text(table)
    train, val = (ImageFolder(folder, "table.csv", split=split) for split in ("train", "val"))
    assert len(val) == 28 and train.vocabulary == val.vocabulary is not None
    with pytest.raises(ConfigError, match="holdout: expected splits made by it, got those of train/"):
        ImageFolder(folder, "table.csv", split="train", holdout=0.1)


def ragged(seed=0):
    """Rows of an incomplete grid: missing combinations, unequal counts, missing cells."""
    draws = np.random.RandomState(seed)
    rows = [row for row in GRID[:-1] for _ in range(draws.randint(1, 5))]
    return [tuple("" if draws.rand() < 0.05 else cell for cell in row) for row in rows]


@pytest.mark.parametrize("text", ["attributes", "caption", None])
def test_ragged_tables(tmp_path, text):
    folder = write(tmp_path, ragged())
    splits = {
        split: ImageFolder(folder, "table.csv", image_size=4, holdout=0.3, split=split, text=text)
        for split in ("train", "validation", "evaluation", None)
    }
    assert splits[None].space is None and splits[None].vocabulary.num_units == 3
    train, unseen = splits["train"], splits["validation"]
    assert sorted([*train.rows, *unseen.rows]) == list(range(len(splits[None])))
    values = train.attribute_values(train.rows)
    assert [set(column) - {UNKNOWN} for column in values.T] == [{0, 1, 2}, {0, 1}, {0, 1}]
    seen = {tuple(row) for row in values}
    assert not seen & {tuple(row) for row in unseen.attribute_values(unseen.rows)} and len(unseen)
    for data in splits.values():
        batch = data.__getitems__(range(len(data)))
        is_unseen = np.isin(data.rows, unseen.rows)
        assert batch["unseen"].tolist() == is_unseen.tolist()
        assert ("text" in batch) == (text is not None) and ("caption_mask" in batch) == (text == "caption")
        if text == "caption":
            assert not (batch["caption_mask"].numpy() & (batch["attributes"].numpy() == UNKNOWN)).any()
        if text == "attributes":
            is_empty = np.array([[not one for one in strings] for strings in batch["text"]])
            assert (is_empty == (batch["attributes"].numpy() == UNKNOWN)).all()
    absent = np.array([[words_of(train, n).index(w) for n, w in zip(("hue", "shape", "size"), GRID[-1])]])
    assert train.is_unseen(absent).all() and not train.is_unseen(np.array([[UNKNOWN, 0, 0]])).any()


def test_combinations_that_cannot_be_held_out(tmp_path):
    folder = write(tmp_path, [("a", "x"), ("b", "y")], ("image", "k", "l"))
    with pytest.raises(ConfigError, match="table.csv: holdout: expected a combination of k, l"):
        ImageFolder(folder, "table.csv", holdout=0.5)


def test_held_out_combinations_of_a_large_table_are_the_same_each_time():
    values = np.random.RandomState(0).randint(0, 2, (20_000, 40))
    values[0, 0] = UNKNOWN
    drawn = held_out_combinations(values, 0.125, 13)
    assert len(drawn) == 2_500 and len(np.unique(drawn, axis=0)) == 2_500
    shuffled = values[np.random.RandomState(1).permutation(len(values))]
    assert (held_out_combinations(shuffled, 0.125, 13) == drawn).all()
    rest = {row.tobytes() for row in values} - {row.tobytes() for row in drawn}
    kept = np.array([row for row in values if row.tobytes() in rest])
    assert all(set(column) - {UNKNOWN} == {0, 1} for column in kept.T)


def test_texts_of_single_phrases_do_not_depend_on_the_phrasing(tmp_path):
    folder = write(tmp_path, GRID)
    one, other = (
        ImageFolder(folder, "table.csv", unset_prob=0.5, phrasing=phrasing).__getitems__(range(12))
        for phrasing in ("random", "canonical")
    )
    assert one["text"] == other["text"] and torch.equal(one["attributes"], other["attributes"])


def test_null_in_json_is_unknown(tmp_path):
    folder = write(tmp_path, GRID[:3])
    (folder / "t.json").write_text('{"000.png": {"hue": "red ", "n": 1}, "001.png": {"hue": null, "n": 2}}')
    data = ImageFolder(folder, "t.json")
    assert data.attribute_values(np.arange(2)).tolist() == [[0, 0], [UNKNOWN, 1]] and words_of(data, "hue") == ["red"]


def test_evaluation_of_sub_folders_is_validation(tmp_path):
    for name in ("train", "val"):
        write(tmp_path / name, GRID)
    data = ImageFolder(tmp_path, split="evaluation")
    assert len(data) == 12 and all(name.startswith("val/") for name in data.pictures)


def test_all_splits_of_a_sub_folder_are_its_images(tmp_path):
    """Scores of a small folder of test images use all of them."""
    for name, size in (("train", 12), ("test", 4)):
        write(tmp_path / name, GRID[:size])
    data = ImageFolder(tmp_path, split="test")
    assert [len(data.rows_of(split)) for split in ("validation", "evaluation", "test", None)] == [4] * 4
    with pytest.raises(ConfigError, match="split: expected one of"):
        data.rows_of("dev")


@pytest.mark.parametrize(
    "text, message",
    [
        ("image hue\n000.png red\n", "with commas, semicolons or tabs .* got 1 lines below the header 'image hue'"),
        ("image,hue\n\n\n", "got 0 lines below the header 'image, hue'"),
        ("image\n000.png\n", "got 1 lines below the header 'image' and no column of attributes"),
        ("", "got 0 lines"),
        ('image,hue\n000.png,"red\n' + 140_000 * "x", "larger than field limit"),
        ("image,hue\n\n000.png,red\n\n001.png\n", "line 5: expected 2 fields"),
    ],
)
def test_malformed_tables(tmp_path, text, message):
    folder = write(tmp_path, GRID[:2])
    (folder / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        ImageFolder(folder, "t.csv")
