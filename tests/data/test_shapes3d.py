"""3dshapes from its file: the true layout, its look-alikes and its damages."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from ldm.data import rows as rows_module
from ldm.data import shapes3d
from ldm.data.module import DataModuleFromConfig
from ldm.data.rows import halve
from ldm.data.shapes3d import Shapes3D, labels_of, write_shapes3d
from ldm.data.world import World3D
from ldm.util import ConfigError, UserError

FILLED = np.array([0, 7, 300_000, 479_999])


def write_sparse(path, images_shape=(480_000, 64, 64, 3), dtype=np.uint8, chunks=(1, 64, 64, 3), labels=None):
    """A file in the true layout whose images are stored only where ``FILLED``; small on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", images_shape, dtype, chunks=chunks, compression="gzip", fillvalue=9)
        if images_shape[0] == 480_000 and images_shape[1:] == (64, 64, 3):
            for row, image in zip(FILLED, World3D(64).images(FILLED)):
                images[row] = image
        file["labels"] = labels_of(np.arange(480_000)) if labels is None else labels
    return path


@pytest.fixture(scope="module")
def true_file(tmp_path_factory):
    return write_sparse(tmp_path_factory.mktemp("root") / "shapes3d" / "3dshapes.h5")


def test_label_values_of_the_published_file():
    assert labels_of(np.array([0])).tolist() == [[0, 0, 0, 0.75, 0, -30]]
    assert labels_of(np.array([479_999]))[0] == pytest.approx([0.9, 0.9, 0.9, 1.25, 3, 30])


def test_drops_in_for_the_world(true_file):
    options = {"text": "attributes", "unset_prob": 0.2, "seed": 3}
    file, world = Shapes3D(true_file, size=64, **options), World3D(size=64, **options)
    a, b = file.__getitems__(FILLED[::-1]), world.__getitems__(FILLED[::-1])
    assert a.keys() == b.keys() and a["text"] == b["text"]
    assert all(torch.equal(a[key], b[key]) for key in ("image", "factors", "index"))
    assert (Shapes3D(true_file, split="train", limit=9).rows == World3D(split="train", limit=9).rows).all()


def test_resizes_to_32_pixels(true_file):
    images = Shapes3D(true_file, size=32).images(FILLED)
    assert (images == halve(World3D(64).images(FILLED))).all()
    assert np.abs(images.astype(int) - World3D(32).images(FILLED)).mean() < 3


def test_found_by_path_folder_and_environment(true_file, monkeypatch, tmp_path):
    root = true_file.parent.parent
    assert Shapes3D(root).path == Shapes3D(true_file).path == true_file
    monkeypatch.setenv("DATA_ROOT", str(root))
    assert Shapes3D().path == true_file
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    with pytest.raises(UserError, match="3dshapes not found .*DATA_ROOT.*export_world"):
        Shapes3D()


def test_works_in_worker_processes_and_after_pickling(true_file):
    config = {"target": "ldm.data.shapes3d.Shapes3D", "params": {"path": str(true_file), "limit": 8}}
    inline, workers = (list(DataModuleFromConfig(4, test=config, num_workers=n).test_dataloader()) for n in (0, 2))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(inline, workers, strict=True))
    dataset = Shapes3D(true_file)
    before = dataset.images(FILLED)
    assert (pickle.loads(pickle.dumps(dataset)).images(FILLED) == before).all()


def test_a_file_chunked_across_images_is_unpacked_once(tmp_path, monkeypatch):
    """Small stand-in counts keep this quick; the layout is the published one's kind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "slow.h5"
    pictures = np.random.RandomState(0).randint(0, 256, (300, 64, 64, 3), dtype=np.uint8)
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", data=pictures, chunks=(300, 4, 4, 1))
        assert rows_module.is_slow_layout(images)
        reads = []

        def read(part):
            reads.append(part)
            return halve(images[part])

        cached = rows_module.image_cache(path, 32, 300, read)
        assert rows_module.image_cache(path, 32, 300, read) == cached and len(reads) == 1
    assert (np.load(cached, mmap_mode="r") == halve(pictures)).all()


def test_npz_as_disdiff_keeps_it(tmp_path, monkeypatch):
    """Uncompressed ones are mapped, compressed ones unpacked to the cache."""
    monkeypatch.setattr(shapes3d, "COUNT", 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pictures = World3D(64).images(np.arange(5))
    np.savez(tmp_path / "plain.npz", images=pictures, other=np.zeros(3))
    np.savez_compressed(tmp_path / "3dshapes.npz", images=pictures)
    for path in (tmp_path / "plain.npz", tmp_path):
        assert (Shapes3D(path).images(np.array([3, 0, 3])) == pictures[[3, 0, 3]]).all()
        assert (Shapes3D(path, size=32).images(np.array([4])) == halve(pictures[[4]])).all()
    np.savez(tmp_path / "other.npz", pictures=pictures)
    with pytest.raises(UserError, match=r"no array 'images'; found \['pictures'\]"):
        Shapes3D(tmp_path / "other.npz")


@pytest.mark.parametrize("options, message", [
    ({"images_shape": (1000, 64, 64, 3), "labels": np.zeros((1000, 6))}, r"\(1000, 64, 64, 3\).*--limit"),
    ({"images_shape": (480_000, 32, 32, 3), "chunks": (1, 32, 32, 3)}, r"\(480000, 32, 32, 3\) uint8, expected"),
    ({"dtype": np.float32}, "float32, expected .* uint8"),
    ({"labels": np.zeros((480_000, 6))}, "not in the order of 3dshapes"),
    ({"labels": np.zeros((480_000, 5))}, r"'labels' is \(480000, 5\)"),
])
def test_other_layouts_are_named(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        Shapes3D(write_sparse(tmp_path / "3dshapes.h5", **options))


def test_damaged_files_are_named(tmp_path, true_file):
    whole = true_file.read_bytes()
    cut = tmp_path / "cut.h5"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut.h5 cannot be read as HDF5.*truncated"):
        Shapes3D(cut)
    with h5py.File(true_file, "r") as file:
        info = file["images"].id.get_chunk_info_by_coord((7, 0, 0, 0))
    torn = tmp_path / "torn.h5"
    torn.write_bytes(whole[: info.byte_offset] + b"\0" * info.size + whole[info.byte_offset + info.size :])
    with pytest.raises(UserError, match="torn.h5: images 7 to 7 .*damaged"):
        Shapes3D(torn).images(np.array([7]))
    (tmp_path / "cut.npz").write_bytes(b"PK\3\4 not a zip")
    with pytest.raises(UserError, match="cut.npz cannot be read as .npz"):
        Shapes3D(tmp_path / "cut.npz")
    (tmp_path / "empty.h5").touch()
    with h5py.File(tmp_path / "empty.h5", "w"):
        pass
    with pytest.raises(UserError, match="no 'images'"):
        Shapes3D(tmp_path / "empty.h5")


def test_export_writes_the_true_layout(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location(
        "export_world", Path(__file__).parents[2] / "scripts" / "export_world.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path = tmp_path / "new" / "3dshapes.h5"
    assert script.main([str(path), "--limit", "1000"]) == 0
    with h5py.File(path) as file:
        assert file["images"].shape == (1000, 64, 64, 3) and file["images"].dtype == np.uint8
        assert file["labels"].dtype == np.float64
        assert (file["images"][990:] == World3D(64).images(np.arange(990, 1000))).all()
        assert (file["labels"][:] == labels_of(np.arange(1000))).all()
        assert not rows_module.is_slow_layout(file["images"])
    assert [p.name for p in path.parent.iterdir()] == ["3dshapes.h5"]
    assert script.main([str(path), "--limit", "0"]) == 1
    assert "at least 1" in capsys.readouterr().err


def test_a_broken_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(done: int) -> None:
        raise OSError("disk full")

    with pytest.raises(UserError, match="could not be written .disk full"):
        write_shapes3d(tmp_path / "3dshapes.h5", 5, fail)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="32 or 64"):
        Shapes3D(tmp_path, size=16)
