"""3dshapes from its file: the true layout, its look-alikes and its damages."""

from __future__ import annotations

import pickle

import h5py
import numpy as np
import pytest
import torch

from ldm.data import rows as rows_module
from ldm.data.factors import FactorSpace, factor_space
from ldm.data.factors import space as factors
from ldm.data.factors.shapes3d import Shapes3D, labels_of, write_shapes3d
from ldm.data.formats.image_sources import ImageArray
from ldm.data.module import DataModuleFromConfig
from ldm.data.rows import halve
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
    with pytest.raises(UserError, match="3dshapes not found .*DATA_ROOT.*dataset.py world"):
        Shapes3D()


def test_works_in_worker_processes_and_after_pickling(true_file):
    config = {"target": "ldm.data.factors.shapes3d.Shapes3D", "params": {"path": str(true_file), "limit": 8}}
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
    source = ImageArray(path)
    assert source.is_slow
    for halved, expected in ((True, halve(pictures)), (False, pictures)):
        source.prepare(halved)
        assert (source.read(np.array([299, 0])) == expected[[299, 0]]).all()
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "clip-disdiff").glob("*.npy")}
    again = ImageArray(path)
    again.prepare()
    assert (again.read(np.array([7])) == pictures[7]).all()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "clip-disdiff").glob("*.npy")} == made and len(made) == 2


def test_npz_as_disdiff_keeps_it(tmp_path, monkeypatch):
    """Uncompressed ones are mapped, compressed ones unpacked to the cache."""
    small = FactorSpace(factor_space("shapes3d").all_names, (1, 1, 1, 1, 1, 5))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pictures = World3D(64).images(np.arange(5))
    monkeypatch.setitem(factors._SPACES, "shapes3d", small)
    np.savez(tmp_path / "plain.npz", images=pictures, other=np.zeros(3))
    np.savez_compressed(tmp_path / "3dshapes.npz", images=pictures)
    for path in (tmp_path / "plain.npz", tmp_path):
        assert (Shapes3D(path).images(np.array([3, 0, 3])) == pictures[[3, 0, 3]]).all()
        assert (Shapes3D(path, size=32).images(np.array([4])) == halve(pictures[[4]])).all()
    np.savez(tmp_path / "other.npz", pictures=pictures)
    with pytest.raises(UserError, match=r"an array 'images', got only \['pictures'\]"):
        Shapes3D(tmp_path / "other.npz")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"images_shape": (1000, 64, 64, 3), "labels": labels_of(np.arange(1000))},
            r"1440 images \(1 x 1 x 3 x 8 x 4 x 15\); got 1000",
        ),
        (
            {"images_shape": (960, 64, 64, 3), "labels": labels_of(np.arange(960)[::-1])},
            "in the order of 3dshapes, got",
        ),
        (
            {"images_shape": (960, 64, 64, 3), "labels": labels_of(np.arange(960)) + 0.03},
            "expected labels of floor_hue among",
        ),
        ({"images_shape": (960, 64, 64, 3)}, r"'labels' of shape \(960, 6\) float64, got \(480000, 6\)"),
        ({"images_shape": (480_000, 32, 32, 3), "chunks": (1, 32, 32, 3)}, r"got \(480000, 32, 32, 3\) uint8"),
        ({"dtype": np.float32}, "uint8, or channels first; got .* float32"),
        ({"labels": np.zeros((480_000, 6))}, "in the order of 3dshapes, got"),
        ({"labels": np.zeros((480_000, 5))}, r"'labels' of shape \(480000, 6\) float64, got \(480000, 5\)"),
    ],
)
def test_other_layouts_are_named(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        Shapes3D(write_sparse(tmp_path / "3dshapes.h5", **options))


def test_damaged_files_are_named(tmp_path, true_file):
    whole = true_file.read_bytes()
    cut = tmp_path / "cut.h5"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut.h5: expected a complete HDF5 file.*truncated"):
        Shapes3D(cut)
    with h5py.File(true_file, "r") as file:
        info = file["images"].id.get_chunk_info_by_coord((7, 0, 0, 0))
    torn = tmp_path / "torn.h5"
    torn.write_bytes(whole[: info.byte_offset] + b"\0" * info.size + whole[info.byte_offset + info.size :])
    with pytest.raises(UserError, match="torn.h5: images 7 to 7 .*damaged"):
        Shapes3D(torn).images(np.array([7]))
    (tmp_path / "cut.npz").write_bytes(b"PK\3\4 not a zip")
    with pytest.raises(UserError, match="cut.npz: expected a complete .npz file"):
        Shapes3D(tmp_path / "cut.npz")
    (tmp_path / "empty.h5").touch()
    with h5py.File(tmp_path / "empty.h5", "w"):
        pass
    with pytest.raises(UserError, match="expected an array 'images'"):
        Shapes3D(tmp_path / "empty.h5")


KEEP = {"floor_hue": 2, "wall_hue": [0, 7], "object_hue": 1, "scale": 2, "shape": 4, "orientation": 3}


def test_a_part_of_the_set_that_its_labels_tell(tmp_path):
    """2 x 2 x 1 x 2 x 4 x 3 images, in their own order; rows, factors and texts stay those of the whole set."""
    path = tmp_path / "new" / "3dshapes.h5"
    assert write_shapes3d(path, KEEP) == 96
    assert [p.name for p in path.parent.iterdir()] == ["3dshapes.h5"]
    with h5py.File(path) as file:
        assert file["images"].shape == (96, 64, 64, 3) and file["images"].dtype == np.uint8
        assert file["labels"].dtype == np.float64 and not rows_module.is_slow_layout(file["images"])
        assert np.unique(file["labels"][:, 1]) == pytest.approx([0, 0.7])
    options = {"text": "attributes", "phrasing": "canonical"}
    part, world = Shapes3D(path, **options), World3D(size=64, keep=KEEP, **options)
    a, b = part.__getitems__(range(96)), world.__getitems__(range(96))
    assert a["text"] == b["text"] and all(torch.equal(a[key], b[key]) for key in ("image", "factors", "index"))
    assert part.position_space.all_sizes == (2, 2, 1, 2, 4, 3) == world.position_space.all_sizes
    assert part.space.size == 480_000
    with pytest.raises(UserError, match="contains 96 of 480000 images, and row 1 is not"):
        part.images(np.array([1]))
    less = Shapes3D(path, keep={"wall_hue": [7], "orientation": 2})
    assert less.position_space.all_sizes == (2, 1, 1, 2, 4, 2)
    assert (less.__getitems__([0, 31])["image"] == world.__getitems__([24, 94])["image"]).all()
    with pytest.raises(ConfigError, match=r"keep.wall_hue: expected different values of \[0, 7\], got \[3\]"):
        Shapes3D(path, keep={"wall_hue": [3]})
    assert len(Shapes3D(path, split="train")) == 87 and len(Shapes3D(path, split="validation")) == 9


def test_a_part_in_npz(tmp_path):
    part = World3D(size=64, keep=KEEP)
    pictures = part.images(part.rows)
    np.savez(tmp_path / "3dshapes.npz", images=pictures, labels=labels_of(part.rows))
    assert (Shapes3D(tmp_path).__getitems__([95])["image"].numpy() == pictures[95:]).all()
    np.savez(tmp_path / "3dshapes.npz", images=pictures)
    with pytest.raises(UserError, match="expected 480000 images, or 'labels' of a part of 3dshapes; got 96 images"):
        Shapes3D(tmp_path)


def test_channels_first(tmp_path):
    part = World3D(size=64, keep=KEEP)
    pictures = part.images(part.rows)
    np.savez(tmp_path / "3dshapes.npz", images=pictures.transpose(0, 3, 1, 2), labels=labels_of(part.rows))
    assert (Shapes3D(tmp_path).__getitems__([5])["image"].numpy() == pictures[5:6]).all()


def test_a_broken_export_leaves_nothing(tmp_path):
    def fail(done: int) -> None:
        raise OSError("disk full")

    with pytest.raises(UserError, match="could not be written .disk full"):
        write_shapes3d(tmp_path / "3dshapes.h5", KEEP, fail)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="keep: expected one of floor_hue, .*; got 'hue'"):
        write_shapes3d(tmp_path / "3dshapes.h5", {"hue": 3})
    write_shapes3d(tmp_path / "3dshapes.h5", KEEP)
    with pytest.raises(ConfigError, match="expected one of 32, 64"):
        Shapes3D(tmp_path, size=16)
