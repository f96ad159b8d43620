"""Small sets of images are decoded once and kept in memory; large ones and loader processes keep nothing."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from ldm.data import memory
from ldm.data.formats import encoded
from ldm.data.formats.folder import ImageFolder
from ldm.data.formats.lmdb_text import LMDBImages
from ldm.data.formats.text_writers import write_text_lmdb
from ldm.data.module import DataModuleFromConfig
from ldm.data.traits import is_in_memory
from ldm.util import UserError


@pytest.fixture
def folder(tmp_path):
    draws = np.random.RandomState(0)
    for k in range(9):
        Image.fromarray(draws.randint(0, 256, (20, 24, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
    return tmp_path


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that were decoded."""
    names, decode = [], encoded.decode_picture
    monkeypatch.setattr(encoded, "decode_picture", lambda file, *rest: names.append(file.name) or decode(file, *rest))
    return names


def test_each_image_is_decoded_once(folder, decoded, monkeypatch):
    data = ImageFolder(folder, image_size=16, repeat=2, do_augment=True)
    assert is_in_memory(data) and not decoded
    first = [data.__getitems__(part)["image"] for part in ([0, 2, 4], [4, 1, 17], [4, 1, 17])]
    assert sorted(decoded) == ["0.png", "1.png", "2.png", "8.png"]
    assert (first[1] == first[2]).all()
    monkeypatch.setattr(memory, "MAX_BYTES", 100)
    large = ImageFolder(folder, image_size=16, repeat=2, do_augment=True)
    decoded.clear()
    assert not is_in_memory(large) and (large.__getitems__([0, 2, 4])["image"] == first[0]).all()
    assert len(large.__getitems__([0, 2, 4])) and len(decoded) == 6


def test_batches_do_not_share_memory(folder):
    data = ImageFolder(folder, image_size=16)
    batch = data.__getitems__([0, 1])
    expected = batch["image"].clone()
    batch["image"].zero_()
    assert (data.__getitems__([0, 1])["image"] == expected).all()


def test_random_crops_are_not_kept(folder):
    data = ImageFolder(folder, image_size=16, fit="random_crop")
    assert not is_in_memory(data)
    assert not (data.__getitems__(range(9))["image"][:5] == data.__getitems__(range(5))["image"]).all()


def test_damaged_images_give_the_same_error(folder):
    data = ImageFolder(folder, image_size=16)
    data.__getitems__([0])
    (folder / "4.png").write_bytes(b"damaged")
    for _ in range(2):
        for positions in ([3, 4, 5], [4]):
            with pytest.raises(UserError, match="4.png: expected a complete PNG or JPEG image"):
                data.__getitems__(positions)
    assert data.__getitems__([3, 5])["image"].shape == (2, 16, 16, 3)


def test_other_processes(folder, tmp_path):
    params = {"path": str(folder), "image_size": 16}
    config = {"target": "ldm.data.formats.folder.ImageFolder", "params": params}
    module = DataModuleFromConfig(4, test=config)
    assert module.test_dataloader().num_workers == 0
    inline = list(module.test_dataloader())
    workers = list(DataModuleFromConfig(4, test=config, num_workers=2).test_dataloader())
    assert all((a["image"] == b["image"]).all() for a, b in zip(inline, workers, strict=True))
    data = ImageFolder(**params)
    data.__getitems__(range(9))
    assert len(pickle.dumps(data)) < 5_000
    assert (pickle.loads(pickle.dumps(data))[2]["image"] == data[2]["image"]).all()


def test_lmdbs(folder, monkeypatch):
    samples = [(np.full((8, 8, 3), k, np.uint8), None) for k in range(5)]
    write_text_lmdb(folder / "set.lmdb", samples, 8)
    data = LMDBImages(folder / "set.lmdb", image_size=8, original_resolution=8)
    assert is_in_memory(data)
    first = data.__getitems__(range(5))["image"]
    monkeypatch.setattr(type(data), "image", None)
    assert (data.__getitems__(range(5))["image"] == first).all() and first[3].unique().tolist() == [3]
