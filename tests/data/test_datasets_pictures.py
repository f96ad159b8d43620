"""CelebA, FFHQ and LSUN from LMDBs, arrays of pictures, and the HDF5 twin of the text LMDB."""

from __future__ import annotations

import io
import os
import pickle

import h5py
import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.formats.celeba import CelebA
from ldm.data.formats.h5_text import ArrayImages, H5TextImages
from ldm.data.formats.lmdb_sets import FFHQ, LSUN
from ldm.data.formats.lmdb_text import LMDBImages, LMDBTextImages
from ldm.data.formats.picture_files import square
from ldm.data.formats.text_writers import write_text_h5, write_text_lmdb
from ldm.data.module import DataModuleFromConfig
from ldm.util import ConfigError, UserError


def noise(count, height=64, width=64, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (count, height, width, 3), dtype=np.uint8)


def write_lmdb(path, pictures, resolution, zfill):
    """An LMDB as Diffusion Autoencoders writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=2**26) as environment, environment.begin(write=True) as transaction:
        for index, picture in enumerate(pictures):
            stream = io.BytesIO()
            Image.fromarray(picture).save(stream, "PNG")
            transaction.put(f"{resolution}-{str(index).zfill(zfill)}".encode(), stream.getvalue())
        transaction.put(b"length", str(len(pictures)).encode())
    return path


def write_h5_array(path, array):
    with h5py.File(path, "w") as file:
        file["data"] = array


def test_celeba_crops_the_face_and_resizes(tmp_path, monkeypatch):
    faces = noise(3, 218, 178)
    write_lmdb(tmp_path / "celeba.lmdb", faces, None, 7)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    data = CelebA()
    expected = Image.fromarray(faces[2]).crop((25, 57, 153, 185)).resize((64, 64), Image.Resampling.BILINEAR)
    item = data[2]
    assert (item["image"].numpy() == np.array(expected)).all() and item["index"] == 2 and len(data) == 3
    assert (CelebA(image_size=128)[0]["image"].numpy() == faces[0, 57:185, 25:153]).all()


def test_celeba_of_128_pixels(tmp_path):
    faces = noise(2, 128, 128)
    path = write_lmdb(tmp_path / "celeba" / "train-images.lmdb", faces, 128, 7)
    data = CelebA(path, original_resolution=128, crop_d2c=False, image_size=128)
    assert (data[1]["image"].numpy() == faces[1]).all()
    with pytest.raises(UserError, match="crop_d2c expects .* got 128 x 128. Set crop_d2c: false"):
        CelebA(path, original_resolution=128)[0]
    with pytest.raises(UserError, match="no key 'None-0000000' or 'img-None-0000000'. Check original_resolution"):
        CelebA(tmp_path)[0]
    with pytest.raises(UserError, match="CelebA not found"):
        CelebA(tmp_path / "nowhere")


def test_ffhq_splits_at_ten_thousand(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.data.formats.lmdb_sets.FFHQ_TEST", 3)
    faces = noise(5, 32, 32)
    write_lmdb(tmp_path / "ffhq256.lmdb", faces, 256, 5)
    for split, expected in ((None, [0, 1, 2, 3, 4]), ("train", [3, 4]), ("test", [0, 1, 2])):
        data = FFHQ(tmp_path, image_size=32, split=split)
        assert data.rows.tolist() == expected
        assert (data[len(data) - 1]["image"].numpy() == faces[expected[-1]]).all()
    assert FFHQ(tmp_path, split="train", limit=1).rows.tolist() == [3]
    with pytest.raises(ConfigError, match="split: .* got 'val'"):
        FFHQ(tmp_path, split="val")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="starts at image 10000, but the LMDB has only 5"):
        FFHQ(tmp_path, split="train")


def test_lsun_by_category(tmp_path):
    rooms, horses = noise(4, 40, 60), noise(4, 60, 40, seed=1)
    write_lmdb(tmp_path / "bedroom256.lmdb", rooms, 256, 7)
    write_lmdb(tmp_path / "lsun" / "horse.lmdb", horses, 256, 7)
    bedroom = LSUN(tmp_path, image_size=20)
    assert (bedroom[3]["image"].numpy() == np.array(square(Image.fromarray(rooms[3]), 20))).all()
    horse = LSUN(tmp_path, category="horse", image_size=40)
    assert horse.do_augment and not bedroom.do_augment and len(horse) == 4
    with pytest.raises(ConfigError, match="category: expected one of bedroom, horse, church; got 'cat'"):
        LSUN(tmp_path, category="cat")
    with pytest.raises(UserError, match="LSUN church not found .*church256.lmdb"):
        LSUN(tmp_path, category="church")


def test_mirroring_depends_on_seed_and_batch_alone(tmp_path):
    pictures = noise(16)
    path = write_lmdb(tmp_path / "some.lmdb", pictures, 64, 7)

    def read(**options):
        return LMDBImages(path, original_resolution=64, **options).__getitems__(range(16))["image"].numpy()

    mirrored = read(do_augment=True, seed=1)
    is_mirrored = (mirrored == pictures[:, :, ::-1]).all((1, 2, 3))
    assert (is_mirrored ^ (mirrored == pictures).all((1, 2, 3))).all() and 2 < is_mirrored.sum() < 14
    assert (read(do_augment=True, seed=1) == mirrored).all() and (read(do_augment=True, seed=2) != mirrored).any()
    assert (read() == pictures).all()


def test_splits_of_own_pictures(tmp_path):
    path = write_lmdb(tmp_path / "some.lmdb", noise(30, 8, 8), 8, 7)
    parts = [LMDBImages(path, 8, 8, split=split) for split in ("train", "validation", None)]
    assert [len(part) for part in parts] == [27, 3, 30]
    assert sorted([*parts[0].rows, *parts[1].rows]) == list(range(30)) == parts[2].rows.tolist()


@pytest.mark.parametrize(
    "key, write",
    [
        ("images", lambda path, array: np.save(path.with_suffix(".npy"), array)),
        ("imgs", lambda path, array: np.savez(path.with_suffix(".npz"), imgs=array)),
        ("data", lambda path, array: write_h5_array(path.with_suffix(".h5"), array)),
    ],
)
@pytest.mark.parametrize("is_chw", [False, True])
def test_arrays_of_pictures(tmp_path, key, write, is_chw):
    """Such as Clevr's data.npz and the churches' .npy."""
    pictures = noise(7, 48, 48)
    write(tmp_path / "some", pictures.transpose(0, 3, 1, 2) if is_chw else pictures)
    path = next(tmp_path.iterdir())
    assert (ArrayImages(path, key, image_size=None)[6]["image"].numpy() == pictures[6]).all()
    expected = np.array(square(Image.fromarray(pictures[1]), 32))
    assert (ArrayImages(path, key, image_size=32)[1]["image"].numpy() == expected).all()


@pytest.fixture
def twins(tmp_path):
    """The same pictures and texts as an LMDB and in HDF5."""
    samples = [(picture, [f"red {i}", "", "cube"]) for i, picture in enumerate(noise(300, 40, 30))]
    write_text_lmdb(tmp_path / "some.lmdb", samples, 32)
    assert write_text_h5(tmp_path / "some.h5", iter(samples), len(samples), 32) == 300
    return tmp_path


def test_the_twin_equals_the_lmdb(twins):
    with h5py.File(twins / "some.h5") as file:
        assert file["images"].shape == (300, 32, 32, 3) and file.attrs["length"] == 300
        assert file["texts"][7] == b"red 7||cube"
    options = {"image_size": 24, "unset_prob": 0.3, "seed": 5, "num_attributes": 3}
    a = LMDBTextImages(twins / "some.lmdb", original_resolution=32, **options).__getitems__([299, 4, 0])
    b = H5TextImages(twins / "some.h5", **options).__getitems__([299, 4, 0])
    assert a.keys() == b.keys() and a["text"] == b["text"]
    assert torch.equal(a["image"], b["image"]) and torch.equal(a["index"], b["index"])


def test_the_twin_in_workers(twins):
    config = {
        "target": "ldm.data.formats.h5_text.H5TextImages",
        "params": {"path": str(twins / "some.h5"), "image_size": 32},
    }
    batches = list(DataModuleFromConfig(128, test=config, num_workers=2).test_dataloader())
    assert sum((batch["text"] for batch in batches), [])[299] == ["red 299", "", "cube"]
    again = pickle.loads(pickle.dumps(H5TextImages(twins / "some.h5")))
    assert again[3]["text"] == ["red 3", "", "cube"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda file: file.__delitem__("texts"), "expected an array 'texts', got only .'images'."),
        (lambda file: file.attrs.__setitem__("length", 301), "expected 301 images .attribute 'length'., got 300"),
        (
            lambda file: (file.__delitem__("texts"), file.__setitem__("texts", ["a|b"] * 299)),
            r"'texts' of shape \(300,\).* got \(299,\)",
        ),
        (lambda file: (file.__delitem__("texts"), file.__setitem__("texts", np.zeros(300))), "as UTF-8 strings"),
    ],
)
def test_damages_of_the_twin_are_named(twins, change, message):
    with h5py.File(twins / "some.h5", "r+") as file:
        change(file)
    with pytest.raises(UserError, match=message):
        H5TextImages(twins / "some.h5")


def test_the_twin_with_other_attributes_or_cut_off(twins):
    with pytest.raises(UserError, match="expected 7 attributes of image 0, got 3 .'red 0..cube'.. Set num_attributes"):
        H5TextImages(twins / "some.h5", num_attributes=7)
    os.truncate(twins / "some.h5", 5000)
    with pytest.raises(UserError, match="some.h5: expected a complete HDF5 file.*truncated"):
        H5TextImages(twins / "some.h5")


def test_pictures_without_texts(tmp_path):
    """One LMDB of pictures alone serves first stages; asked for texts, it says what it lacks."""
    write_text_lmdb(tmp_path / "some.lmdb", [(picture, None) for picture in noise(3)], 64)
    assert len(LMDBImages(tmp_path / "some.lmdb", original_resolution=64)) == 3
    with pytest.raises(UserError, match="no key 'txt-64-0000000'"):
        LMDBTextImages(tmp_path / "some.lmdb", original_resolution=64)
    write_text_h5(tmp_path / "some.h5", [(picture, None) for picture in noise(3)], 3, 64)
    assert (ArrayImages(tmp_path / "some.h5")[2]["image"].numpy() == noise(3)[2]).all()
    with pytest.raises(UserError, match="image 1: expected no attributes, .* got 2"):
        write_text_h5(tmp_path / "more.h5", [(noise(1)[0], None), (noise(1)[0], ["a", "b"])], 2, 64)
    with pytest.raises(UserError, match="exists already"):
        write_text_h5(tmp_path / "some.h5", [], 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some.h5", "some.lmdb"]
