"""One's own pictures: folders, splits, tables of attributes, the factors and words that these make."""

from __future__ import annotations

import itertools
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from ldm.data.formats.attribute_tables import read_table
from ldm.data.formats.folder import ImageFolder
from ldm.data.formats.picture_files import square
from ldm.data.module import DataModuleFromConfig
from ldm.util import ConfigError, UserError

HUES, SHAPES = ("red", "green", "blue"), ("ball", "cube")


def write_pictures(folder, names, height=20, width=20):
    """Random pictures; the one of a name is always the same."""
    made = {}
    for number, name in enumerate(names):
        made[name] = np.random.RandomState(number).randint(0, 256, (height, width, 3), dtype=np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(made[name]).save(folder / name)
    return made


def write_table(path, rows, header=("image", "hue", "shape")):
    path.write_text("\n".join(",".join(map(str, row)) for row in (header, *rows)) + "\n", encoding="utf-8-sig")
    return path


@pytest.fixture
def labelled(tmp_path):
    """Two pictures of each of 3 x 2 combinations, in a random order; and the table."""
    rows = [(f"{hue}_{shape}_{k}.png", hue, shape) for hue, shape in itertools.product(HUES, SHAPES) for k in range(2)]
    rows = [rows[i] for i in np.random.RandomState(0).permutation(len(rows))]
    made = write_pictures(tmp_path / "photos", [row[0] for row in rows])
    return tmp_path / "photos", write_table(tmp_path / "table.csv", rows), rows, made


def test_a_folder_alone(tmp_path, monkeypatch):
    made = write_pictures(tmp_path, ["b/two.jpeg", "a.PNG", "b/c/three.webp", ".hidden/x.png"], 30, 40)
    (tmp_path / "notes.txt").write_text("no picture")
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    data = ImageFolder(image_size=16)
    assert data.pictures == ["a.PNG", "b/c/three.webp", "b/two.jpeg"] and set(data[0]) == {"image", "index"}
    assert (data[0]["image"].numpy() == np.array(square(Image.fromarray(made["a.PNG"]), 16))).all()
    stretched = ImageFolder(tmp_path, image_size=16, fit="stretch")[0]["image"].numpy()
    assert (stretched == np.array(Image.fromarray(made["a.PNG"]).resize((16, 16), Image.Resampling.BICUBIC))).all()
    assert data.space is None and data.vocabulary is None and data.position_space is None
    assert len(ImageFolder(tmp_path, repeat=4)) == 12 and len(ImageFolder(tmp_path, limit=2)) == 2


def test_folders_of_splits(tmp_path):
    """As AFHQ and the flowers are kept: train/<kind>/, val/<kind>/."""
    write_pictures(tmp_path, [f"{s}/{kind}/{k}.png" for s in ("train", "val") for kind in "ab" for k in range(3)])
    sizes = {split: len(ImageFolder(tmp_path, split=split)) for split in (None, "train", "validation", "val", "test")}
    assert sizes == {None: 12, "train": 6, "validation": 6, "val": 6, "test": 6}
    assert ImageFolder(tmp_path, split="val").pictures[0] == "val/a/0.png"
    with pytest.raises(ConfigError, match="split: .* got 'trian'. Did you mean 'train'"):
        ImageFolder(tmp_path, split="trian")


def test_splits_without_folders(tmp_path):
    write_pictures(tmp_path, [f"{k}.png" for k in range(20)], 4, 4)
    train, held = (ImageFolder(tmp_path, image_size=4, split=split) for split in ("train", "validation"))
    assert len(train) == 18 and len(held) == 2 and not set(train.rows) & set(held.rows)


def test_a_table_gives_texts_factors_and_words(labelled):
    folder, table, rows, made = labelled
    data = ImageFolder(folder, table, image_size=20, templates={"hue": "{} paint"}, num_attributes=2)
    assert data.space.factor_names == ("hue", "shape") and data.space.factors_num_values == (3, 2)
    assert data.space.all_names == ("hue", "shape", "instance") and data.space.all_sizes == (3, 2, 2)
    assert data.space.name == "photos" and ImageFolder(folder, table, name="toys").space.name == "toys"
    assert data.vocabulary.words == [["blue", "green", "red"], ["ball", "cube"]]
    assert data.vocabulary.phrases(0, 2) == ["red paint"]
    by_name = {name: (hue, shape) for name, hue, shape in rows}
    for position in range(12):
        item, name = data[position], data.pictures[position]
        assert (item["image"].numpy() == made[name]).all()
        hue, shape = by_name[name]
        assert item["text"] == [f"{hue} paint", shape]
        assert item["factors"].tolist() == [["blue", "green", "red"].index(hue), SHAPES.index(shape)]
    factors = data.space.factors_of(np.arange(12))
    assert (data.vocabulary.word_labels(factors) == factors).all()
    assert pickle.loads(pickle.dumps(data))[3]["text"] == data[3]["text"]


def test_metrics_draw_pictures_that_show_the_factors(labelled):
    folder, table, *_ = labelled
    data = ImageFolder(folder, table)
    latent, drawn = data.position_space.sample(100, np.random.RandomState(0))
    shown = data.__getitems__(drawn.tolist())
    assert (shown["factors"].numpy() == latent).all()


def test_some_columns_as_factors(labelled):
    folder, table, rows, _ = labelled
    noted = [(*row, f"no. {k}") for k, row in enumerate(rows)]
    wide = write_table(folder / "wide.csv", noted, ("path", "h", "s", "note"))
    data = ImageFolder(folder, "wide.csv", factors=["s", "h"])
    assert data.space.all_names == ("s", "h", "instance") and len(data[0]["text"]) == 3
    assert data.vocabulary.factor_names == ("h", "s", "note")
    free = ImageFolder(folder, wide)
    assert free.space is None and "factors" not in free[0] and free.pictures == [row[0] for row in rows]
    assert ImageFolder(folder, table, factors=[]).space is None
    with pytest.raises(ConfigError, match="factors: expected one of h, s, note; got 'size'"):
        ImageFolder(folder, wide, factors=["size"])


def test_a_table_of_fewer_pictures(labelled, caplog):
    folder, _, rows, _ = labelled
    less = write_table(folder / "less.csv", rows[:5])
    with caplog.at_level("INFO"):
        data = ImageFolder(folder, less)
    assert len(data) == 5 and data.space is None and "names 5 of 12 images" in caplog.text
    with pytest.raises(UserError, match=r"of 6 combinations \d have no image, such as .* \+ "):
        ImageFolder(folder, less, factors=["hue", "shape"])
    uneven = write_table(folder / "uneven.csv", sorted(rows)[:-1])
    with pytest.raises(UserError, match=r"the same number of images .* red \+ cube has 1 images, .* has 2"):
        ImageFolder(folder, uneven, factors=["hue", "shape"])


def test_unknown_entries_are_unset_units(labelled):
    folder, _, rows, _ = labelled
    table = write_table(folder / "gaps.csv", [(rows[0][0], "", rows[0][2]), *rows[1:]])
    data = ImageFolder(folder, table, templates={"hue": "a {} thing"})
    assert data[0]["text"] == ["", rows[0][2]] and data.space is None
    assert data.vocabulary.words[0] == ["blue", "green", "red"]
    with pytest.raises(UserError, match="the column 'hue' has empty entries"):
        ImageFolder(folder, table, factors=["hue", "shape"])


def test_a_constant_column_is_no_factor_to_recover(labelled):
    folder, _, rows, _ = labelled
    table = write_table(folder / "c.csv", [(*row, "indoors") for row in rows], ("image", "hue", "shape", "place"))
    data = ImageFolder(folder, table)
    assert data.space.factor_names == ("hue", "shape") and data.vocabulary.num_units == 3
    only = write_table(folder / "only.csv", [(row[0], "x") for row in rows], ("image", "a"))
    with pytest.raises(UserError, match="no column has two different entries"):
        ImageFolder(folder, only, factors=["a"])


def test_tables_in_json(labelled):
    folder, table, rows, _ = labelled
    named = {name: {"hue": hue, "shape": shape} for name, hue, shape in rows}
    (folder / "named.json").write_text(json.dumps(named))
    (folder / "listed.json").write_text(json.dumps({name: [hue, shape] for name, hue, shape in rows}))
    csv, by_name, listed = (read_table(path) for path in (table, folder / "named.json", folder / "listed.json"))
    assert by_name.columns == csv.columns == ("hue", "shape") and listed.columns == ("attribute 1", "attribute 2")
    assert csv.cells == by_name.cells == listed.cells and csv.pictures == listed.pictures


def test_numbers_are_sorted_by_size(tmp_path):
    write_pictures(tmp_path, [f"{k}.png" for k in range(12)])
    table = write_table(tmp_path / "t.csv", [(f"{k}.png", k % 12, k % 2) for k in range(12)], ("path", "angle", "b"))
    assert read_table(table).words["angle"] == [str(k) for k in range(12)]


def test_the_path_column_may_stand_anywhere(tmp_path):
    write_pictures(tmp_path, ["x.png", "y.png"])
    table = write_table(tmp_path / "t.csv", [("a", "x.png"), ("b", "y.png")], ("kind", "path"))
    assert read_table(table).pictures == ("x.png", "y.png") and read_table(table).columns == ("kind",)


def test_split_folders_share_the_words_of_the_whole_table(tmp_path):
    rows = [(f"train/{k}.png", hue, "a") for k, hue in enumerate(HUES)] + [("val/0.png", "green", "b")]
    write_pictures(tmp_path, [row[0] for row in rows])
    table = write_table(tmp_path / "t.csv", rows)
    train, held = (ImageFolder(tmp_path, table, split=split) for split in ("train", "val"))
    assert train.vocabulary == held.vocabulary and train.vocabulary.words == [["blue", "green", "red"], ["a", "b"]]
    assert len(train) == 3 and len(held) == 1


def test_in_workers(labelled):
    folder, table, *_ = labelled
    config = {
        "target": "ldm.data.formats.folder.ImageFolder",
        "params": {"path": str(folder), "attributes": str(table), "image_size": 8, "unset_prob": 0.4},
    }
    inline, workers = (list(DataModuleFromConfig(5, test=config, num_workers=n).test_dataloader()) for n in (0, 2))
    for a, b in zip(inline, workers, strict=True):
        assert (a["image"] == b["image"]).all() and a["text"] == b["text"] and (a["factors"] == b["factors"]).all()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "image,a\n1.png,x,y\n", "line 2: expected 2 fields as in the first line, got 3"),
        ("a.csv", "image\n", "expected a header"),
        ("a.csv", "image,a,a\n1.png,x,y\n", "columns with different names, got a, a"),
        ("a.csv", "image,a\n1.png,x\n1.png,y\n", "each image once, got '1.png'"),
        ("a.json", "[1]", "expected an object"),
        ("a.json", "{", "expected a complete JSON file"),
        ("a.json", '{"1.png": [["red"]]}', "expected a list of strings"),
        ("a.json", '{"1.png": {"a": "x"}, "2.png": {"b": "x"}}', "expected an object with the keys a"),
        ("a.json", '{"1.png": ["x"], "2.png": ["x", "y"]}', "expected 1 attributes for '2.png', .* got 2"),
        ("a.txt", "", "expected a .csv, .tsv or .json"),
    ],
)
def test_malformed_tables_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / name)
    with pytest.raises(UserError, match="missing.csv: expected a UTF-8 file, got no such file"):
        read_table(tmp_path / "missing.csv")


def test_messages(labelled):
    folder, table, rows, _ = labelled
    with pytest.raises(UserError, match=r"expected 7 attributes, got 2 \(hue, shape\). Set num_attributes and"):
        ImageFolder(folder, table, num_attributes=7)
    with pytest.raises(ConfigError, match="templates: .* got 'hues'. Did you mean 'hue'"):
        ImageFolder(folder, table, templates={"hues": "{}"})
    with pytest.raises(ConfigError, match="templates.hue: expected exactly one '{}'"):
        ImageFolder(folder, table, templates={"hue": "paint"})
    with pytest.raises(ConfigError, match="Set attributes: to its path"):
        ImageFolder(folder, factors=["hue"])
    with pytest.raises(ConfigError, match="fit: .* got 'pad'"):
        ImageFolder(folder, fit="pad")
    with pytest.raises(UserError, match="nowhere: expected a folder of images, got nothing. Set path"):
        ImageFolder(folder / "nowhere")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="expected images .* got none"):
        ImageFolder(folder / "empty")
    (folder / rows[0][0]).write_bytes(b"\x89PNG\r\n\x1a\nrest")
    with pytest.raises(UserError, match=f"{rows[0][0]}: .* it is no image"):
        ImageFolder(folder).__getitems__(range(12))
    (folder / rows[0][0]).unlink()
    with pytest.raises(UserError, match=f"table.csv: .* do not exist, such as {rows[0][0]}"):
        ImageFolder(folder, table)
