"""The one tool for data sets: what it checks, converts and writes, and what it says."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import h5py
import lmdb
import numpy as np
import pytest
from PIL import Image
from script_modules import load_script

from ldm.data.factors import FactorSpace, factor_space
from ldm.data.factors import space as factors
from ldm.data.factors.mpi3d import MPI3D
from ldm.data.factors.shapes3d import Shapes3D, labels_of
from ldm.data.formats.h5_text import H5TextImages
from ldm.data.formats.lmdb_text import LMDBImages, LMDBTextImages
from ldm.data.world import World3D

PART = "--keep floor_hue=2 wall_hue=2 object_hue=[0,4] scale=2 shape=4 orientation=1"


@pytest.fixture(scope="module")
def tool():
    return load_script("dataset")


@pytest.fixture
def run(tool, capsys, tmp_path, monkeypatch):
    """Runs a command line in an empty folder: (exit status, what it said)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_ROOT", raising=False)

    def call(line):
        status = tool.main(shlex.split(line))
        said = capsys.readouterr()
        return status, said.out + said.err

    return call


def write_photos(folder, count=3):
    world = World3D(size=64, text="attributes", phrasing="canonical")
    lines = ["image,floor,wall,object,size,shape,side"]
    folder.mkdir()
    for k in range(count):
        item = world[k * 30_001]
        Image.fromarray(item["image"].numpy()).save(folder / f"{k}.png")
        lines.append(",".join([f"{k}.png", *item["text"]]))
    (folder / "table.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    return world


def test_world_and_check(run):
    status, said = run(f"world data/3dshapes.h5 {PART}")
    assert status == 0 and "up to 0.0 GB" in said and "64 images written" in said
    status, said = run("check shapes3d --path data")
    assert status == 0
    assert "floor_hue 2, wall_hue 2, object_hue 2, scale 2, shape 4, orientation 1" in said
    assert "64 x 64 x 3 uint8, values" in said and "64 images, 0 problems" in said
    assert len(Shapes3D("data", text="attributes")) == 64
    assert run("check shapes3d --path data --quick limit=5 text=attributes")[0] == 0
    status, said = run("world data/3dshapes.h5 --keep flor_hue=2")
    assert status == 1 and "Did you mean 'floor_hue'" in said


def test_check_names_each_damage(run, tmp_path):
    run(f"world data/3dshapes.h5 {PART}")
    path = tmp_path / "data" / "3dshapes.h5"
    with h5py.File(path) as file:
        chunks = [file["images"].id.get_chunk_info_by_coord((row, 0, 0, 0)) for row in (3, 60)]
    content = bytearray(path.read_bytes())
    for chunk in chunks:
        content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(content)
    status, said = run("check shapes3d --path data")
    assert status == 1 and "2 problems" in said and "images 3 to 3" in said and "images 60 to 60" in said
    os.truncate(path, len(content) // 2)
    status, said = run("check shapes3d --path data")
    assert status == 1 and "truncated" in said


def test_write_and_check_an_lmdb(run, tmp_path):
    world = write_photos(tmp_path / "photos")
    for kind in ("lmdb", "h5"):
        status, said = run(f"write mine.{kind} --images photos --attributes photos/table.csv --resolution 64")
        assert status == 0 and "3 images written" in said
    a = LMDBTextImages("mine.lmdb", original_resolution=64).__getitems__([2, 0])
    b = H5TextImages("mine.h5").__getitems__([2, 0])
    assert a["text"] == b["text"] == [world[60_002]["text"], world[0]["text"]]
    assert (a["image"] == b["image"]).all() and (a["image"].numpy()[1] == world[0]["image"].numpy()).all()
    status, said = run("check text-lmdb --path mine.lmdb original_resolution=64")
    assert status == 0 and "3 images, 0 problems" in said and "red floor" in said
    assert run("check text-h5 --path mine.h5")[0] == 0
    for name in ("damaged.lmdb", "endless.lmdb"):
        shutil.copytree("mine.lmdb", name)
    with lmdb.open("damaged.lmdb", map_size=2**27) as environment, environment.begin(write=True) as transaction:
        transaction.delete(b"img-64-0000001")
        transaction.put(b"txt-64-0000002", b"one|two")
    status, said = run("check text-lmdb --path damaged.lmdb original_resolution=64")
    assert status == 1 and "no key 'img-64-0000001'" in said and "attributes of image 2, got 2" in said
    with lmdb.open("endless.lmdb", map_size=2**27) as environment, environment.begin(write=True) as transaction:
        transaction.delete(b"length")
    status, said = run("check text-lmdb --path endless.lmdb original_resolution=64")
    assert status == 1 and "no key 'length'" in said


@pytest.mark.parametrize("name", ["y.zip", "y.tar.gz", "y.csv"])
def test_write_refuses_unknown_suffixes(run, tmp_path, name):
    status, said = run(f"write {name} --world 3")
    assert status == 1 and "expected a folder without suffix or a name that ends in .lmdb, .h5" in said
    assert not (tmp_path / name).exists()


def test_write_does_not_advise_an_option_of_data_sets(run, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("broken")
    status, said = run("write y --images photos")
    assert status == 1 and "Replace it, or remove it from the folder and the table" in said and "skip" not in said


def test_write_without_texts_or_from_the_world(run, tmp_path):
    write_photos(tmp_path / "photos")
    assert run("write bare.lmdb --images photos --resolution 32")[0] == 0
    assert len(LMDBImages("bare.lmdb", original_resolution=32)) == 3
    assert run("write w.lmdb --world 5 --resolution 64 --jpeg")[0] == 0
    assert len(LMDBTextImages("w.lmdb", original_resolution=64, num_attributes=6)) == 5
    (tmp_path / "photos" / "1.png").unlink()
    status, said = run("write new.lmdb --images photos --attributes photos/table.csv")
    assert status == 1 and "got 1 that do not exist, such as 1.png" in said and not Path("new.lmdb").exists()
    status, said = run("write w.lmdb --world 5")
    assert status == 1 and "exists already" in said


def test_convert(run, tmp_path, monkeypatch):
    space = factor_space("mpi3d")
    monkeypatch.setitem(factors._SPACES, "mpi3d", FactorSpace(space.all_names, (1, 1, 2, 1, 1, 3, 4)))
    made = np.random.RandomState(0).randint(0, 256, (24, 64, 64, 3), dtype=np.uint8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "down").mkdir()
    np.savez_compressed(tmp_path / "down" / "mpi3d_toy.npz", images=made)
    for target in ("data/mpi3d/mpi3d_toy.npy", "other/mpi3d_toy.h5"):
        status, said = run(f"convert mpi3d {target} --path down variant=toy")
        assert status == 0 and "24 images of down/mpi3d_toy.npz written" in said and "GB are free" in said
        assert (MPI3D(Path(target).parents[-2]).images(np.arange(24)) == made).all()
    assert not Path("cache").exists()
    status, said = run("convert mpi3d data/mpi3d/mpi3d_toy.npy --path data")
    assert status == 1 and "already converted" in said
    assert "ends in .npy or .h5" in run("convert mpi3d data/x.zip --path down")[1]
    os.truncate("down/mpi3d_toy.npz", 9000)
    status, said = run("convert mpi3d new.npy --path down")
    assert status == 1 and "truncated" in said and not Path("new.npy").exists()


def test_converted_3dshapes_keep_their_labels(run, tmp_path, monkeypatch):
    small = FactorSpace(factor_space("shapes3d").all_names, (1, 1, 1, 1, 1, 15))
    pictures = World3D(size=64).images(np.arange(15))
    monkeypatch.setitem(factors._SPACES, "shapes3d", small)
    (tmp_path / "down").mkdir()
    np.savez_compressed(tmp_path / "down" / "3dshapes.npz", images=pictures)
    assert run("convert shapes3d data/shapes3d/3dshapes.h5 --path down")[0] == 0
    with h5py.File("data/shapes3d/3dshapes.h5") as file:
        assert (file["labels"][:] == labels_of(np.arange(15))).all()
    assert (Shapes3D("data").images(np.arange(15)) == pictures).all()


def test_a_part_is_not_converted(run):
    run(f"world data/3dshapes.h5 {PART}")
    status, said = run("convert shapes3d x.npy --path data")
    assert status == 1 and "got a part of 3dshapes" in said


def test_check_a_config(run, tmp_path):
    write_photos(tmp_path / "photos", 12)
    section = "{target: ldm.data.formats.folder.ImageFolder, params: {path: photos, attributes: table.csv}}"
    (tmp_path / "mine.yaml").write_text(f"data: {{params: {{batch_size: 2, train: {section}, test: {section}}}}}\n")
    status, said = run("check mine.yaml data.params.test.params.limit=4")
    assert status == 0 and "data.params.train" in said
    assert "12 images, 0 problems" in said and "4 images, 0 problems" in said
    (tmp_path / "photos" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "photos" / "5.png").write_bytes(b"")
    status, said = run("check mine.yaml")
    assert status == 1 and "2 problems" in said
    assert "3.png: expected a complete PNG" in said and "5.png: expected a complete PNG" in said
    (tmp_path / "empty.yaml").write_text("model: {}\n")
    assert "empty.yaml: expected a data set" in run("check empty.yaml")[1]


def test_messages(run):
    status, said = run("check shape3d")
    assert status == 1 and "Did you mean 'shapes3d'" in said
    status, said = run("check shapes3d --path nowhere")
    assert status == 1 and "3dshapes not found (path: nowhere)" in said
    status, said = run("check lmdb --path nowhere resolution=3")
    assert status == 1 and "original_resolution" in said
    for line in ("--help", "world x.h5 keep=3", "check lmdb --pth x"):
        with pytest.raises(SystemExit):
            run(line)


def test_help_shows_commands_that_parse(tool):
    lines = [line.split("#")[0].split()[2:] for line in tool.__doc__.splitlines() if line.startswith("    python ")]
    assert len(lines) == 9 and {line[0] for line in lines} == {"check", "convert", "write", "world", "emoji"}
    for words in lines:
        tool.parse(words)


def test_check_lists_attributes(run, tmp_path):
    write_photos(tmp_path / "photos", 12)
    rows = [f"{k}.png,{'red' if k % 3 else 'blue'},{'' if k == 4 else k % 2}" for k in range(11)]
    (tmp_path / "t.csv").write_text("\n".join(["image,hue,kind", *rows, "11.png,green,0"]))
    status, said = run("check folder --path photos attributes=t.csv")
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert status == 0 and "attribute hue: blue, green, red" in lines
    assert "attribute kind: 0, 1; unknown for 1 images" in lines
    assert "combinations: 5 of 6, 1 to 3 images each, 1 missing" in lines
    status, said = run("check folder --path photos attributes=t.csv holdout=0.2 split=train")
    assert "held out: 1 of 5 combinations" in " ".join(said.split())
    (tmp_path / "n.csv").write_text("\n".join(["image,note", *(f"{k}.png,no. {k}" for k in range(12))]))
    status, said = run("check folder --path photos attributes=n.csv max_words=1")
    assert status == 0 and "no vocabulary:" in said and "'note' has 12 different entries" in " ".join(said.split())
    status, said = run("check world --quick keep.floor_hue=2 keep.wall_hue=1 limit=50")
    assert "red, blue" not in said and "attribute scale" in said and "words without images" in said


def test_check_explains_the_instance(run, tmp_path):
    write_photos(tmp_path / "photos", 8)
    rows = [f"{k}.png,{'ab'[k % 2]},{'cd'[k // 4]}" for k in range(8)]
    (tmp_path / "t.csv").write_text("\n".join(["image,hue,kind", *rows]))
    said = " ".join(run("check folder --path photos attributes=t.csv")[1].split())
    assert "factors: hue 2, kind 2, instance 2" in said and "number of an image among those of one combination" in said


def test_check_warns_of_test_images_that_are_trained_on(run, tmp_path):
    write_photos(tmp_path / "photos", 12)

    def check(train="", test=""):
        section = "{{target: ldm.data.formats.folder.ImageFolder, params: {{path: photos{}}}}}"
        train, test = section.format(train), section.format(test)
        (tmp_path / "c.yaml").write_text(f"data: {{params: {{batch_size: 2, train: {train}, test: {test}}}}}\n")
        status, said = run("check c.yaml")
        assert status == 0
        return " ".join(said.split())

    assert "WARNING: 12 of its images are also in data.params.train" in check()
    assert "WARNING: 11 of its images" in check(", split: train")
    assert "WARNING" not in check(", split: train", ", split: validation")
    world = "{target: ldm.data.world.World3D, params: {limit: 4}}"
    (tmp_path / "w.yaml").write_text(f"data: {{params: {{batch_size: 2, train: {world}, test: {world}}}}}\n")
    assert "WARNING" not in run("check w.yaml")[1]
