"""Broken and odd data files: each is read with the right values, or refused in one line that names the file.

Every case is read through the data set and by ``scripts/dataset.py check``; some also by two loader processes.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import unicodedata
import zipfile
from pathlib import Path

import h5py
import lmdb
import numpy as np
import pytest
from PIL import Image
from script_modules import load_script

from ldm.data.kinds import build_kind
from ldm.data.module import DataModuleFromConfig
from ldm.errors import ConfigError, UserError
from ldm.training.cli import run_command
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


BOM8, NFD = b"\xef\xbb\xbf", unicodedata.normalize("NFD", "bäume.png")
TABLES = {  # content -> texts of b.png, and of bäume.png if it is in the table
    "plain": (b"image,kind\nb.png,bush\nb\xc3\xa4ume.png,tree\n", ["bush"], ["tree"]),
    "semicolons": (b"image;kind;x\nb.png;bush;1\n", ["bush", "1"]),
    "tabs": (b"image\tkind\nb.png\tbush, green\n", ["bush, green"]),
    "byte order mark": (BOM8 + b"image,kind\nb.png,bush\n", ["bush"]),
    "UTF-16": ("image,kind\nb.png,bush\nbäume.png,tree\n".encode("utf-16"), ["bush"], ["tree"]),
    "UTF-16 big endian": (b"\xfe\xff" + "image,kind\nb.png,bush\n".encode("utf-16-be"), ["bush"]),
    "CRLF": (b"image,kind\r\nb.png,bush\r\n", ["bush"]),
    "old Mac": (b"image,kind\rb.png,bush\r", ["bush"]),
    "blank lines": (b"\n  \nimage,kind\n\nb.png,bush\n   \n,\n\n", ["bush"]),
    "trailing spaces": (b" image , kind \n b.png , bush \n", ["bush"]),
    "trailing separators": (b"image,kind,,\nb.png,bush,,\n", ["bush"]),
    "pandas index": (b",image,kind\n0,b.png,bush\n", ["bush"]),
    "pandas index saved twice": (b"Unnamed: 0,image,kind\n0,b.png,bush\n", ["bush"]),
    "index of names": (b",kind\nb.png,bush\n", ["bush"]),
    "dot": (b"image,kind\n./b.png,bush\n", ["bush"]),
    "two dots": (b"image,kind\nsub/../b.png,bush\n", ["bush"]),
    "backslashes": (b"image,kind\n.\\b.png,bush\n", ["bush"]),
    "folder": (b"image,kind\np/b.png,bush\n", ["bush"]),
    "absolute": ("image,kind\n{folder}/b.png,bush\n", ["bush"]),
    "NFD": (f"image,kind\n{NFD},tree\nb.png,bush\n".encode(), ["bush"], ["tree"]),
    "case": (b"image,kind\nB.PNG,bush\n", ["bush"]),
    "no suffix": (b"image,kind\nb,bush\n1,one\n", ["bush"]),
    "names of columns are numbers": (b"image,0,1,2\nb.png,x,y,z\n", ["x", "y", "z"]),
    "quotes": (b'image,kind\n"b.png","bush, ""green"""\n', ['bush, "green"']),
    "text behind quotes": (b'image,kind\nb.png,"red" bush\n', ["red bush"]),
    "quoted line break": (b'image,kind\nb.png,"bush\ngreen"\n', ["bush\ngreen"]),
    "several labels": (b"image,kind\nb.png,a;b\n1.png,c;d\n", ["a;b"]),
    "NaN in numbers": (b"image,kind\nb.png,NaN\n1.png,3\n", [""]),
    "word None": (b"image,kind\nb.png,None\n1.png,hat\n", ["None"]),
    "repeated row": (b"image,kind\nb.png,bush\n./b.png,bush\n", ["bush"]),
    "path column": (b"kind,path\nbush,b.png\n", ["bush"]),
    "object": (b'{"b.png": {"kind": "bush", "x": 1}}', ["bush", "1"]),
    "lists": (b'{"b.png": [true, null, 0.5]}', ["True", "", "0.5"]),
    "one text": (b'{"b.png": "bush"}', ["bush"]),
    "list of objects": (b'[{"image": "b.png", "kind": "bush"}]', ["bush"]),
    "JSON in UTF-16": ('{"b.png": ["bush"]}'.encode("utf-16"), ["bush"]),
}


@pytest.fixture
def pictures(tmp_path):
    folder = write_folder(tmp_path / "p", b__png=encoded(), **{"1__png": encoded()})
    (folder / "bäume.png").write_bytes(encoded())
    return folder


def write_table(folder, content):
    name = "t.json" if content[:1] in (b"{", b"[") or content.startswith("{".encode("utf-16")) else "t.csv"
    (folder.parent / name).write_bytes(content)
    return folder.parent / name


@pytest.mark.parametrize("case", TABLES)
def test_tables_that_are_read(pictures, capsys, tmp_path, case):
    content, *texts = TABLES[case]
    content = content.format(folder=pictures).encode() if isinstance(content, str) else content
    options = {"path": pictures, "attributes": write_table(pictures, content)}
    data = build_kind("folder", options)
    found = dict(zip(data.pictures, data.__getitems__(range(len(data)))["text"]))
    assert [found["b.png"], *([found["bäume.png"]] if len(texts) > 1 else [])] == texts
    assert len(data.pictures) == len(set(data.pictures))
    status, said = check("folder", options, capsys, tmp_path)
    assert status == 0 and "0 problems" in said


BAD_TABLES = {
    "nothing": (b"", "got 0 lines below the header"),
    "header only": (b"image,kind\n", "got 0 lines below the header 'image, kind'"),
    "blank rows": (b"image,kind\n\n,\n  \n", "got 0 lines below the header 'image, kind'"),
    "one column": (b"image\nb.png\n", "expected a header"),
    "no header": (b"b.png,bush\n1.png,one\n", r"line 1: expected a header .* \(b.png\). Add a first line"),
    "short line": (b"image,kind\nb.png,bush\n\n1.png\n", "line 4: expected 2 fields as in the first line, got 1"),
    "unquoted separator": (b"image,kind\nb.png,bush, green\n", "line 2: expected 2 fields .*, got 3"),
    "open quote": (b'image,kind\nb.png,"bush\n', "line 2: expected .* complete quotes|line 3: expected .* quotes"),
    "open quote in the middle": (b'image,kind\nb.png,"bush\n1.png,tree\n', "complete quotes .a quote is not closed"),
    "latin-1": ("image,kind\nbäume.png,tree\n".encode("latin-1"), "line 2: expected text in UTF-8"),
    "zeros": (b"image,kind\nb.png,\x00\x00\n", "line 2: expected text"),
    "picture as a table": (encoded(), "t.csv"),
    "same names": (b"image,kind,kind\nb.png,a,b\n", "columns with different names"),
    "no name": (b"image,kind\n,bush\n", "line 2: expected the path of an image, got an empty cell"),
    "two entries": (b"image,kind\nb.png,bush\n1.png,a\nb.png,tree\n", "line 4: .* 'b.png' again.* than in line 2"),
    "two spellings": (b"image,kind\nb.png,bush\n./b.png,tree\n", "line 3: .* 'b.png' again.* than in line 2"),
    "missing": (b"image,kind\nb.png,bush\nc.png,a\nd.png,a\n", "got 2 that do not exist, such as c.png, d.png"),
    "misspelt": (b"image,kind\nbaume.png,tree\n", "such as baume.png. Did you mean 'bäume.png'"),
    "outside": (b"image,kind\n/etc/b.png,bush\n", "such as /etc/b.png"),
    "other suffix": (b"image,kind\nb.jpg,bush\n", "such as b.jpg"),
    "two separators": (b"image;a,b\nb.png;1,2\n1.png;x,y\n", "both divide the lines"),
    "JSON cut off": (b'{"b.png": ["bush"', "complete JSON"),
    "JSON nested": (b'{"b.png": [["bush"]]}', "for 'b.png', got"),
    "JSON of numbers": (b"[1, 2]", "got a list"),
    "JSON empty": (b"{}", "got an empty one"),
    "JSON without entries": (b'{"b.png": []}', "for 'b.png'"),
    "JSON of several widths": (b'{"b.png": ["a"], "1.png": ["a", "b"]}', "expected 1 attributes for '1.png'"),
    "JSON of other keys": (b'{"b.png": {"a": 1}, "1.png": {"b": 1}}', "the keys a for '1.png'"),
    "JSON with a name twice": (b'{"b.png": ["a"], "b.png": ["b"]}', "'b.png' twice with different entries"),
    "JSON list without names": (b'[{"kind": 3}]', "without the path of an image under 'kind'"),
    "JSON too deep": (b"[" * 100_000, "complete JSON"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_tables_that_are_refused(pictures, capsys, tmp_path, case):
    content, message = BAD_TABLES[case]
    table = write_table(pictures, content)
    require_refused("folder", {"path": pictures, "attributes": table}, table.name, capsys, tmp_path, message)


def test_ambiguous_names_are_refused(pictures, capsys, tmp_path):
    (pictures / "B.png").write_bytes(encoded())
    table = write_table(pictures, b"image,kind\nb.PNG,bush\n")
    require_refused("folder", {"path": pictures, "attributes": table}, "b.PNG", capsys, tmp_path, "do not exist")


def test_rows_and_images_without_a_partner_are_listed(pictures, capsys, tmp_path, caplog):
    table = write_table(pictures, b"image,kind\nb.png,bush\nc.png,a\n")
    options = {"path": pictures, "attributes": table, "damaged": "skip"}
    status, said = check("folder", options, capsys, tmp_path)
    assert status == 0 and "1 (c.png)" in said and "2 (1.png, bäume.png)" in said
    assert "rows without an image were left out: 1 (c.png)" in caplog.text


LISTS = {
    "blank lines": b"\n\np/b.png\n\n\n",
    "byte order mark": BOM8 + b"p/b.png\n",
    "CRLF": b"p/b.png\r\n\r\n",
    "UTF-16": "p/b.png\n".encode("utf-16"),
    "spaces": b"  p/b.png  \n",
    "backslashes": b"p\\b.png\n",
}


@pytest.mark.parametrize("case", LISTS)
def test_lists_that_are_read(pictures, capsys, tmp_path, case):
    (tmp_path / "l.txt").write_bytes(LISTS[case])
    images, _ = read(LIST, {"list_file": tmp_path / "l.txt"})
    assert (images == PIXELS).all() and len(images) == 1
    assert check(LIST, {"list_file": tmp_path / "l.txt"}, capsys, tmp_path)[0] == 0


@pytest.mark.parametrize("content", [b"", b"\n \n", b"p/gone.png\n", b"p\n", b"\xff\x00\xfe", encoded()])
def test_lists_that_are_refused(pictures, capsys, tmp_path, content):
    (tmp_path / "l.txt").write_bytes(content)
    require_refused(LIST, {"list_file": tmp_path / "l.txt"}, "l.txt", capsys, tmp_path)


def test_errors_of_loader_processes_are_one_line(tmp_path, capsys):
    folder = write_folder(tmp_path / "p", a__png=encoded(), b__png=encoded()[:50])
    section = {"target": "ldm.data.formats.folder.ImageFolder", "params": {"path": str(folder), "image_size": SIDE}}
    loader = DataModuleFromConfig(1, test=section, num_workers=2).test_dataloader()
    assert run_command(lambda: len(list(loader))) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"error: {folder / 'b.png'}: expected a complete") and "\n" not in said


def test_the_check_does_not_end_at_damaged_files(tmp_path, capsys):
    files = {f"{k:03d}__png": encoded() if k % 2 else encoded()[:50] for k in range(60)}
    folder = write_folder(tmp_path / "p", **files)
    status, said = check("folder", {"path": folder, "image_size": SIDE}, capsys, tmp_path)
    assert status == 1 and "60 images, 30 problems" in said and "PROBLEM: ... 30 images in all" in said
    assert said.count("PROBLEM") == 21 and "038.png" in said and "058.png" not in said
