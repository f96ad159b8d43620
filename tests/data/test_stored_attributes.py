"""Attribute texts stored in LMDB and HDF5 files as a vocabulary, with the entries of every data set with words."""

from __future__ import annotations

import pickle

import h5py
import lmdb
import numpy as np
import pytest
from PIL import Image

from ldm.data.describe import describe
from ldm.data.formats.folder import ImageFolder
from ldm.data.formats.h5_text import H5TextImages
from ldm.data.formats.lmdb_text import LMDBTextImages
from ldm.data.formats.text_writers import write_text_h5, write_text_lmdb
from ldm.data.module import DataModuleFromConfig
from ldm.data.traits import missing_vocabulary_of
from ldm.data.vocabulary import UNKNOWN
from ldm.util import ConfigError, UserError

KINDS = ("lmdb", "h5")
ROWS = [(hue, shape) for hue in ("red hat", "blue hat", "") for shape in ("cube", "ball")] * 4


def write(path, rows):
    samples = [(np.full((8, 8, 3), k % 256, np.uint8), row) for k, row in enumerate(rows)]
    if path.suffix == ".h5":
        write_text_h5(path, samples, len(rows), 8)
    else:
        write_text_lmdb(path, samples, 8)
    return path


def read(path, **options):
    if path.suffix == ".h5":
        return H5TextImages(path, image_size=8, **options)
    return LMDBTextImages(path, image_size=8, original_resolution=8, **options)


@pytest.fixture(params=KINDS)
def stored(request, tmp_path):
    return write(tmp_path / f"set.{request.param}", ROWS)


def test_few_texts_are_words(stored):
    data = read(stored)
    assert data.vocabulary.factor_names == ("attribute 1", "attribute 2") and data.space is None
    assert data.vocabulary.words == [["blue hat", "red hat"], ["ball", "cube"]] and not data.missing_vocabulary
    batch = data.__getitems__([0, 3, 4])
    assert batch["text"] == [["red hat", "cube"], ["blue hat", "ball"], ["", "cube"]]
    assert batch["attributes"].tolist() == [[1, 1], [0, 0], [UNKNOWN, 1]]
    assert read(stored, names=["hat", "shape"]).vocabulary.factor_names == ("hat", "shape")
    assert describe(data, "num_attributes") == 2
    assert pickle.loads(pickle.dumps(data))[3]["text"] == ["blue hat", "ball"]
    assert "text" not in read(stored, text=None)[0]
    caption = read(stored, text="caption", caption_weights=[1, 5], single_caption_share=0).__getitems__(range(24))
    assert {"red hat, cube", "cube, red hat"} & set(caption["text"]) and "cube" in caption["text"]
    for names in (["hat"], ["hat", "hat"]):
        with pytest.raises(ConfigError, match="names: expected 2 different names"):
            read(stored, names=names)


def test_the_same_as_a_folder_with_a_table(stored, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for k in range(len(ROWS)):
        Image.fromarray(np.full((8, 8, 3), k, np.uint8)).save(folder / f"{k:02d}.png")
    lines = ["image,attribute 1,attribute 2", *(f"{k:02d}.png,{','.join(row)}" for k, row in enumerate(ROWS))]
    (folder / "t.csv").write_text("\n".join(lines))
    for split in ("train", "validation", "evaluation", "test", None):
        options = {"split": split, "holdout": 0.25, "unset_prob": 0.3}
        data, other = read(stored, **options), ImageFolder(folder, "t.csv", image_size=8, **options)
        assert data.vocabulary == other.vocabulary and data.rows.tolist() == other.rows.tolist()
        a, b = (one.__getitems__(range(len(one))) for one in (data, other))
        assert a["text"] == b["text"] and (a["unseen"] == b["unseen"]).all() and (a["image"] == b["image"]).all()
    train, unseen = (read(stored, split=split, holdout=0.25) for split in ("train", "validation"))
    assert len(unseen) == 4 and not set(train.rows) & set(unseen.rows) and len(train) == 20


def test_free_texts_have_no_words(tmp_path):
    rows = [(f"a long story {k}", "cube") for k in range(70)]
    for kind in KINDS:
        path = write(tmp_path / f"free.{kind}", rows)
        data = read(path)
        assert data.vocabulary is None and data[2]["text"] == ["a long story 2", "cube"]
        assert "'attribute 1' has 70 different entries" in missing_vocabulary_of(data)
        assert "attributes" not in data[0] and "text" not in read(path, text=None)[0]
        for option in ({"text": "caption"}, {"holdout": 0.1}, {"caption_weights": [1, 1]}):
            with pytest.raises(ConfigError, match="needs a data set with a vocabulary.*'attribute 1' has 70"):
                read(path, **option)
        assert read(path, max_words=70).vocabulary.num_units == 2


def test_damaged_texts_are_reported_when_they_are_read(tmp_path):
    path = write(tmp_path / "set.lmdb", ROWS)
    with lmdb.open(str(path), map_size=2**26) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"txt-8-0000002", b"one|two|three")
    data = read(path)
    assert data.vocabulary is None and "expected 2 attributes of image 2, got 3" in data.missing_vocabulary
    assert data[0]["text"] == ["red hat", "cube"]
    with pytest.raises(UserError, match="expected 2 attributes of image 2, got 3"):
        data.__getitems__([2])
    with pytest.raises(ConfigError, match="text: caption needs .* expected 2 attributes of image 2"):
        read(path, text="caption")
    path = write(tmp_path / "gap.lmdb", ROWS)
    with lmdb.open(str(path), map_size=2**26) as environment, environment.begin(write=True) as transaction:
        transaction.delete(b"txt-8-0000002")
    assert "no key 'txt-8-0000002'" in read(path).missing_vocabulary
    with h5py.File(write(tmp_path / "set.h5", ROWS), "r+") as file:
        file["texts"][1] = "one"
    assert "of image 1, got 1" in read(tmp_path / "set.h5").missing_vocabulary


def test_workers_read_the_same(stored):
    target = (
        "ldm.data.formats.h5_text.H5TextImages"
        if stored.suffix == ".h5"
        else "ldm.data.formats.lmdb_text.LMDBTextImages"
    )
    params = {"path": str(stored), "image_size": 8, "unset_prob": 0.4, "text": "attributes"}
    params |= {} if stored.suffix == ".h5" else {"original_resolution": 8}
    loaders = [
        DataModuleFromConfig(5, test={"target": target, "params": params}, num_workers=n).test_dataloader()
        for n in (0, 2)
    ]
    for a, b in zip(*loaders, strict=True):
        assert a["text"] == b["text"] and (a["attributes"] == b["attributes"]).all()


def test_many_texts(tmp_path):
    count = 4_000
    with lmdb.open(str(tmp_path / "many.lmdb"), map_size=2**27) as environment:
        with environment.begin(write=True) as transaction:
            for k in range(count):
                transaction.put(f"txt-8-{k:07d}".encode(), f"word {k % 9}|{'even' if k % 2 else 'odd'}".encode())
            transaction.put(b"length", str(count).encode())
    data = read(tmp_path / "many.lmdb")
    assert data.vocabulary.num_units == 2 and len(data) == count


def test_repeat_with_held_out_combinations(stored):
    once, thrice = (read(stored, split="train", holdout=0.25, repeat=n) for n in (1, 3))
    assert thrice.rows.tolist() == np.repeat(once.rows, 3).tolist()
