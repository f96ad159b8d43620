"""Broken and odd data files: each is read with the right values, or refused in one line that names the file.

Every case is read through the data set and by ``scripts/dataset.py check``; some also by two loader processes.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import h5py
import lmdb
import numpy as np
import pytest
from PIL import Image
from script_modules import load_script

from ldm.data.kinds import build_kind
from ldm.errors import ConfigError, UserError
from ldm.util import instantiate_from_config

SIDE = 16
PIXELS = np.random.RandomState(5).randint(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
LIST = "ldm.data.formats.image_list.ImageList"


def encoded(pixels=PIXELS, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


SMOOTH = np.add.outer(np.arange(SIDE), np.arange(SIDE)).astype(np.uint8)[..., None].repeat(3, 2) * 8
JPEG = encoded(SMOOTH, "JPEG")


def read(kind, options):
    """Return all images and the other entries of a data set."""
    section = {"target": kind, "params": options}
    data = instantiate_from_config(section) if "." in kind else build_kind(kind, options)
    batch = data.__getitems__(range(len(data)))
    return batch["image"].numpy(), batch


def check(kind, options, capsys, tmp_path):
    """Return exit status and output of ``scripts/dataset.py check``."""
    config = tmp_path / "check.yaml"
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    params = "".join(f"        {name}: {value!r}\n" for name, value in plain.items())
    target = kind if "." in kind else load_script("dataset").KINDS[kind].target
    config.write_text(f"data:\n  params:\n    test:\n      target: {target}\n      params:\n{params}")
    status = load_script("dataset").main(["check", str(config)])
    said = capsys.readouterr()
    return status, said.out + said.err


def require_refused(kind, options, names, capsys, tmp_path, message=""):
    """Require one line that contains the name of the file, from the data set and from the tool."""
    with pytest.raises((UserError, ConfigError)) as caught:
        read(kind, options)
    assert names in str(caught.value) and "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert re.search(message, str(caught.value)), str(caught.value)
    status, said = check(kind, options, capsys, tmp_path)
    assert status == 1 and names in said and "Traceback" not in said


def write_folder(folder, **files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


PLACES = np.random.RandomState(16).randint(1, 1000, 6) / 1000


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_truncated_pictures(tmp_path, capsys, place, kind):
    whole = JPEG if kind == "jpg" else encoded()
    folder = write_folder(tmp_path / "p", **{f"a__{kind}": whole[: int(place * len(whole))]})
    require_refused("folder", {"path": folder, "image_size": SIDE}, f"a.{kind}", capsys, tmp_path)


@pytest.mark.parametrize("seed", range(12))
def test_changed_bits(tmp_path, seed):
    """A picture with a changed bit is read rightly or named; the tool also finds wrong checksums."""
    content, draws = bytearray(encoded()), np.random.RandomState(seed)
    content[draws.randint(8, len(content))] ^= 1 << draws.randint(8)
    folder = write_folder(tmp_path / "p", a__png=bytes(content), b__png=encoded())
    data = build_kind("folder", {"path": folder, "image_size": SIDE, "damaged": "skip"})
    assert all((data[position]["image"].numpy() == PIXELS).all() for position in range(len(data)))
    assert len(data) + len(data.skipped) == 2 and all("a.png: " in reason for reason in data.skipped.values())


BAD_PICTURES = {
    "empty": (b"", "the file is empty"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "it is a web page"),
    "text": (b"no picture", "it is no image"),
    "zeros": (bytes(300), "it is no image"),
    "header only": (encoded()[:8], "it is no image"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "it begins with b'version http"),
    "no pixels": (encoded()[:33] + encoded()[-12:], "decoding failed"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_files_that_are_no_pictures(tmp_path, capsys, case):
    content, message = BAD_PICTURES[case]
    folder = write_folder(tmp_path / "p", bad__jpg=content, good__png=encoded())
    require_refused("folder", {"path": folder, "image_size": SIDE}, "bad.jpg", capsys, tmp_path, message)
    images, batch = read("folder", {"path": folder, "image_size": SIDE, "damaged": "skip"})
    assert (images == PIXELS).all() and batch["index"].tolist() == [1]


def test_a_wrong_suffix_is_read(tmp_path, capsys):
    folder = write_folder(tmp_path / "p", a__jpg=encoded(), b__png=encoded(kind="WEBP", lossless=True))
    images, _ = read("folder", {"path": folder, "image_size": SIDE})
    assert (images == PIXELS).all() and len(images) == 2
    assert check("folder", {"path": folder}, capsys, tmp_path)[0] == 0


def test_folders_links_and_other_formats(tmp_path, capsys, caplog):
    folder = write_folder(tmp_path / "p", a__png=encoded(), b__gif=encoded(kind="GIF"), c__tif=encoded(kind="TIFF"))
    (folder / "x.png").mkdir()
    (folder / "sub").mkdir()
    (folder / "sub" / "up").symlink_to(folder)
    images, _ = read("folder", {"path": folder, "image_size": SIDE})
    assert len(images) == 1 and "images of other formats were not read: 2 (b.gif, c.tif)" in caplog.text
    status, said = check("folder", {"path": folder}, capsys, tmp_path)
    assert status == 0 and "2 (b.gif, c.tif), of other formats" in said


@pytest.mark.parametrize("kind", ["loop", "broken", "pipe", "unreadable"])
def test_paths_that_cannot_be_opened(tmp_path, capsys, kind):
    folder = write_folder(tmp_path / "p", good__png=encoded())
    bad = folder / "bad.png"
    if kind == "loop":
        bad.symlink_to(bad)
    elif kind == "broken":
        bad.symlink_to("nowhere.png")
    elif kind == "pipe":
        os.mkfifo(bad)
    else:
        bad.write_bytes(encoded())
        bad.chmod(0)
        if os.access(bad, os.R_OK):
            pytest.skip("root reads every file")
    require_refused("folder", {"path": folder, "image_size": SIDE}, "bad.png", capsys, tmp_path, "cannot be opened")


def test_folders_without_pictures(tmp_path, capsys):
    empty = write_folder(tmp_path / "e")
    require_refused("folder", {"path": empty}, str(empty), capsys, tmp_path, "got none")
    gifs = write_folder(tmp_path / "g", a__gif=encoded(kind="GIF"))
    require_refused("folder", {"path": gifs}, str(gifs), capsys, tmp_path, r"1 \(a.gif\). Convert them")
    file = gifs / "a.gif"
    require_refused("folder", {"path": file}, str(file), capsys, tmp_path, "expected a folder")


def write_lmdb(path, entries, length=b"3"):
    with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for index in range(3):
            transaction.put(f"img-{SIDE}-{index:07d}".encode(), encoded())
        for key, value in {b"length": length, **entries}.items():
            transaction.delete(key) if value is None else transaction.put(key, value)
    return path


KEY = f"img-{SIDE}-0000001".encode()
LMDBS = {
    "damaged": ({KEY: encoded()[:50]}, "image '16-0000001'", "decoding failed"),
    "empty value": ({KEY: b" "}, "image '16-0000001'", "it is no image"),
    "missing": ({KEY: None}, KEY.decode(), "has no key"),
    "no length": ({b"length": None}, "x.lmdb", "has no key 'length'"),
    "length in words": ({b"length": b"three"}, "x.lmdb", "expected a number of images at key 'length'"),
    "negative length": ({b"length": b"-3"}, "x.lmdb", "expected a number of images at key 'length'"),
    "length too large": ({b"length": b"4"}, f"img-{SIDE}-0000003", "has no key"),
}


@pytest.mark.parametrize("case", LMDBS)
def test_lmdbs(tmp_path, capsys, case):
    entries, names, message = LMDBS[case]
    path = write_lmdb(tmp_path / "x.lmdb", entries)
    options = {"path": path, "image_size": SIDE, "original_resolution": SIDE}
    require_refused("lmdb", options, names, capsys, tmp_path, message)


@pytest.mark.parametrize("size", [0, 5000, 20_000])
def test_truncated_lmdbs(tmp_path, capsys, size):
    path = write_lmdb(tmp_path / "x.lmdb", {})
    content = (path / "data.mdb").read_bytes()
    (path / "data.mdb").write_bytes(content[: min(size, len(content) - 4096)])
    require_refused("lmdb", {"path": path, "original_resolution": SIDE}, "x.lmdb", capsys, tmp_path)


IMAGES = np.random.RandomState(9).randint(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)


class _Dangerous:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def write_array(folder, name, array, key="images"):
    path = folder / name
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file[key] = array
    elif path.suffix == ".npz":
        np.savez(path, **{key: array})
    else:
        np.save(path, array)
    return path


ARRAYS = {
    "floats": (IMAGES / 255, "uint8"),
    "NaN": (np.full((2, 8, 8, 3), np.nan), "uint8"),
    "int64": (IMAGES.astype(np.int64), "int64"),
    "five axes": (IMAGES[None], "shape"),
    "one axis": (np.arange(7, dtype=np.uint8), "shape"),
    "two channels": (IMAGES[..., :2], "shape"),
    "no images": (IMAGES[:0], "image"),
}


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".h5"])
@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_of_other_kinds(tmp_path, capsys, case, suffix):
    array, message = ARRAYS[case]
    path = write_array(tmp_path, f"x{suffix}", array)
    require_refused("array", {"path": path, "image_size": SIDE}, f"x{suffix}", capsys, tmp_path, message)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".h5"])
def test_arrays_that_are_read(tmp_path, suffix):
    for layout in (IMAGES, np.asfortranarray(IMAGES), IMAGES.transpose(0, 3, 1, 2)):
        path = write_array(tmp_path, f"x{suffix}", layout)
        assert (read("array", {"path": path, "image_size": SIDE})[0] == IMAGES).all()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".h5"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_truncated_arrays(tmp_path, capsys, suffix, share):
    path = write_array(tmp_path, f"x{suffix}", np.repeat(IMAGES, 20, axis=0))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    require_refused("array", {"path": path, "image_size": SIDE}, f"x{suffix}", capsys, tmp_path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".h5"])
@pytest.mark.parametrize("content", [b"<html></html>", b"path,a\nb.png,1\n", pickle.dumps([1, 2])])
def test_other_files_as_arrays(tmp_path, capsys, suffix, content):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    require_refused("array", {"path": path, "image_size": SIDE}, f"x{suffix}", capsys, tmp_path)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_of_objects_are_not_unpickled(tmp_path, capsys, suffix, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_array(tmp_path, f"x{suffix}", np.array([_Dangerous()], dtype=object))
    require_refused("array", {"path": path, "image_size": SIDE}, f"x{suffix}", capsys, tmp_path)
    assert not Path("executed").exists()


def test_other_contents_of_hdf5_and_npz(tmp_path, capsys):
    for suffix in (".h5", ".npz"):
        path = write_array(tmp_path, f"other{suffix}", IMAGES, "pictures")
        require_refused("array", {"path": path}, path.name, capsys, tmp_path, "expected an array 'images', got only")
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file["images/inner"] = IMAGES
    require_refused("array", {"path": tmp_path / "group.h5"}, "group.h5", capsys, tmp_path, "array 'images'")
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("images.npy", "no array")
    require_refused("array", {"path": tmp_path / "text.npz"}, "text.npz", capsys, tmp_path)


TEXTS = {
    "too few": (["a|b"] * 4, "one string per image"),
    "numbers": (np.arange(5), "UTF-8 strings"),
    "latin-1": (np.array([b"caf\xe9"] * 5, dtype="S4"), "UTF-8"),
    "none": (None, "expected an array 'texts'"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts_in_hdf5(tmp_path, capsys, case):
    texts, message = TEXTS[case]
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file["images"] = IMAGES
        if texts is not None:
            file["texts"] = texts
    require_refused("text-h5", {"path": tmp_path / "t.h5", "image_size": SIDE}, "t.h5", capsys, tmp_path, message)
