"""Image + text LMDB: written, read, in workers, and its damages named."""

from __future__ import annotations

import builtins
import pickle

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.formats.lmdb_text import LMDBImages, LMDBTextImages
from ldm.data.formats.picture_files import square
from ldm.data.formats.text_writers import write_text_lmdb
from ldm.data.module import DataModuleFromConfig
from ldm.data.world import World3D
from ldm.util import ConfigError, UserError


def samples(count: int = 6):
    world = World3D(size=64, text="attributes", phrasing="canonical")
    return [(world[i * 70_001]["image"].numpy(), world[i * 70_001]["text"]) for i in range(count)]


@pytest.fixture
def path(tmp_path):
    target = tmp_path / "some.lmdb"
    assert write_text_lmdb(target, samples(), resolution=64) == 6
    return target


def edit(path, **changes):
    """Put (bytes) or delete (None) keys of an LMDB."""
    with lmdb.open(str(path), map_size=2**27) as environment, environment.begin(write=True) as transaction:
        for key, value in changes.items():
            key = key.replace("_", "-").encode()
            transaction.delete(key) if value is None else transaction.put(key, value)


def test_round_trip(path):
    data = LMDBTextImages(path, image_size=64, original_resolution=64)
    assert len(data) == 6 and data.num_attributes == 6
    for i, (picture, texts) in enumerate(samples()):
        item = data[i]
        assert (item["image"].numpy() == picture).all() and item["text"] == texts and item["index"] == i
    plain = LMDBImages(path, original_resolution=64)[2]
    assert set(plain) == {"image", "index"} and plain["image"].shape == (64, 64, 3)
    with pytest.raises(IndexError, match="with 6 images"):
        data[6]
    assert sorted(p.name for p in path.parent.iterdir()) == ["some.lmdb"]


def test_keys_are_those_of_the_reference(path):
    with lmdb.open(str(path), readonly=True) as environment, environment.begin() as transaction:
        keys = [key.decode() for key, _ in transaction.cursor()]
        assert transaction.get(b"length") == b"6"
        assert transaction.get(b"txt-64-0000000").decode().split("|") == samples(1)[0][1]
    assert keys[:2] == ["img-64-0000000", "img-64-0000001"] and len(keys) == 13


def test_older_sets_without_prefix(path):
    with lmdb.open(str(path), map_size=2**27) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"64-0000003", transaction.get(b"img-64-0000001"))
    assert (LMDBImages(path, original_resolution=64)[3]["image"].numpy() == samples()[1][0]).all()
    assert (LMDBTextImages(path, original_resolution=64)[3]["image"].numpy() == samples()[3][0]).all()


def test_batches_keep_texts_as_lists_in_workers_too(path):
    config = {
        "target": "ldm.data.formats.lmdb_text.LMDBTextImages",
        "params": {"path": str(path), "image_size": 32, "original_resolution": 64},
    }
    for workers in (0, 2):
        data = DataModuleFromConfig(4, train=config, test=config, num_workers=workers)
        batches = list(data.test_dataloader())
        assert [len(b["text"]) for b in batches] == [4, 2] and len(batches[0]["text"][0]) == 6
        assert batches[0]["image"].shape == (4, 32, 32, 3) and batches[0]["image"].dtype == torch.uint8
        assert len(list(data.train_dataloader())) == 2
    dataset = pickle.loads(pickle.dumps(LMDBTextImages(path, original_resolution=64)))
    assert dataset[1]["text"] == samples()[1][1]


def test_units_are_unset_by_seed_and_indices_alone(path):
    def read(seed):
        data = LMDBTextImages(path, original_resolution=64, unset_prob=0.5, seed=seed)
        return data.__getitems__([0, 1, 2, 3])["text"]

    assert read(1) == read(1) != read(2)
    assert any(text == "" for texts in read(1) for text in texts)


def test_path_from_the_environment(path, monkeypatch):
    monkeypatch.setenv("DB_PATH", str(path))
    assert len(LMDBImages(original_resolution=64)) == 6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"length": None}, "no key 'length'"),
        ({"length": b"many"}, "expected a number of images at key 'length', got b'many'"),
        ({"img_64_0000001": None}, "no key 'img-64-0000001' or '64-0000001'. Check original_resolution .now 64"),
        ({"txt_64_0000001": None}, "no key 'txt-64-0000001'"),
        ({"img_64_0000001": b"\x89PNG\r\n\x1a\nrest"}, "image 'img-64-0000001': .* it is no image"),
        ({"txt_64_0000001": b"one|two"}, r"expected 6 attributes of image 1, got 2 \('one.two'\). Set num_"),
        ({"txt_64_0000001": b"\xff|"}, "UTF-8 text at key 'txt-64-0000001'"),
    ],
)
def test_damages_are_named(path, changes, message):
    edit(path, **changes)
    with pytest.raises(UserError, match=message):
        LMDBTextImages(path, original_resolution=64)[1]


def test_a_torn_picture_is_named(path):
    with lmdb.open(str(path)) as environment, environment.begin() as transaction:
        whole = transaction.get(b"img-64-0000002")
    edit(path, img_64_0000002=whole[: len(whole) // 2])
    with pytest.raises(UserError, match="'img-64-0000002': .* decoding failed"):
        LMDBTextImages(path, original_resolution=64)[2]


def test_wrong_number_of_attributes_is_told_at_once(path):
    with pytest.raises(UserError, match="expected 7 attributes of image 0, got 6"):
        LMDBTextImages(path, original_resolution=64, num_attributes=7)


def test_no_lmdb_at_the_path(tmp_path, path):
    with pytest.raises(UserError, match="LMDBImages not found .*nowhere.*dataset.py write"):
        LMDBImages(tmp_path / "nowhere")
    cut = tmp_path / "cut.lmdb"
    cut.mkdir()
    whole = (path / "data.mdb").read_bytes()
    (cut / "data.mdb").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut.lmdb: .*truncated"):
        LMDBImages(cut, original_resolution=64)


def test_without_the_package(path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "lmdb":
            raise ModuleNotFoundError("No module named 'lmdb'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install"):
        LMDBImages(path)


def test_writer_refuses_what_it_cannot_store(tmp_path, path):
    picture = np.zeros((64, 64, 3), np.uint8)
    for given, message in [
        (
            [(picture, ["a", "b"]), (picture, ["a"])],
            "image 1: expected 2 attributes, as for the images before it, got 1",
        ),
        ([(picture, ["a|b"])], "contains '|'"),
        ([], "at least one image"),
    ]:
        with pytest.raises(UserError, match=message.replace("|", r"\|")):
            write_text_lmdb(tmp_path / "new.lmdb", given)
    with pytest.raises(UserError, match="exists already"):
        write_text_lmdb(path, samples())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["some.lmdb"]


def test_the_map_grows_with_what_is_written(tmp_path, monkeypatch):
    opened = lmdb.open

    def open_small(path, **options):
        return opened(path, **(options | {"map_size": 2**16} if "map_size" in options else options))

    monkeypatch.setattr(lmdb, "open", open_small)
    noise = np.random.RandomState(0).randint(0, 256, (128, 128, 3), dtype=np.uint8)
    assert write_text_lmdb(tmp_path / "big.lmdb", [(noise, ["a"])] * 12) == 12
    assert (LMDBImages(tmp_path / "big.lmdb", image_size=128)[11]["image"].numpy() == noise).all()


def test_shapes_of_pictures(path):
    wide = Image.fromarray(np.arange(20 * 40 * 3, dtype=np.uint8).reshape(20, 40, 3))
    assert square(wide, 10).size == (10, 10)
    assert (np.array(square(wide, 20)) == np.array(wide)[:, 10:30]).all()
    with pytest.raises(UserError, match="crop_d2c expects .* got 64 x 64"):
        LMDBImages(path, original_resolution=64, crop_d2c=True)[0]
    with pytest.raises(ConfigError, match="image_size"):
        LMDBImages(path, image_size=0)


def test_face_crop(tmp_path):
    face = np.random.RandomState(0).randint(0, 256, (218, 178, 3), dtype=np.uint8)
    with lmdb.open(str(tmp_path / "faces"), map_size=2**24) as environment:
        Image.fromarray(face).save(tmp_path / "face.png")
        with environment.begin(write=True) as transaction:
            transaction.put(b"None-0000000", (tmp_path / "face.png").read_bytes())
            transaction.put(b"length", b"1")
    data = LMDBImages(tmp_path / "faces", image_size=128, original_resolution=None, crop_d2c=True)
    assert (data[0]["image"].numpy() == face[57:185, 25:153]).all()
