"""MPI3D, dSprites, Cars3D and SmallNORB: small files in the true formats, order, range, workers, damages.

The true sets have 10^4 to 10^6 images; here their factor spaces are cut down to a few values.
"""

from __future__ import annotations

import os
import pickle
import shutil
import struct

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from ldm.data.factors import FactorSpace, factor_space
from ldm.data.factors import space as factors
from ldm.data.factors.cars3d import Cars3D
from ldm.data.factors.dsprites import DSprites
from ldm.data.factors.mpi3d import MPI3D
from ldm.data.factors.smallnorb import PARTS, SmallNORB, file_of
from ldm.data.module import DataModuleFromConfig
from ldm.data.rows import halve
from ldm.util import ConfigError, UserError

SIZES = {
    "mpi3d": (2, 1, 2, 1, 1, 3, 2),
    "mpi3d_complex": (2, 1, 2, 1, 1, 2, 2),
    "dsprites": (1, 3, 1, 2, 2, 2),
    "cars3d": (4, 24, 2),
    "smallnorb": (2, 4, 2, 3, 1),
}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """The spaces with fewer values, and caches of one's own."""
    for name, sizes in SIZES.items():
        space = factor_space(name)
        monkeypatch.setitem(factors._SPACES, name, FactorSpace(space.all_names, sizes, space.latent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DATA_ROOT", raising=False)


def pictures(count, *shape, high=256):
    return np.random.RandomState(0).randint(0, high, (count, *shape), dtype=np.uint8)


def write_mpi3d(root, variant="toy", name="mpi3d_toy", **arrays):
    count = factor_space("mpi3d_complex" if variant == "complex" else "mpi3d").size
    made = pictures(count, 64, 64, 3)
    root.mkdir(parents=True, exist_ok=True)
    np.savez(root / f"{name}.npz", **({"images": made} | arrays))
    return made


def write_dsprites(root, **arrays):
    space = factor_space("dsprites")
    made = pictures(space.size, 64, 64, high=2)
    classes = np.column_stack((np.zeros(space.size, int), space.factors_of(np.arange(space.size))))
    root.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        root / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz", **({"imgs": made, "latents_classes": classes} | arrays)
    )
    return made


def write_cars(root, cars=2, is_compressed=False, **content):
    """.mat files whose names sort otherwise than they were written; picture (e, a) of a car, by car."""
    (root / "cars").mkdir(parents=True)
    made = [np.random.RandomState(car).randint(0, 256, (128, 128, 3, 24, 4), dtype=np.uint8) for car in range(cars)]
    for car in reversed(range(cars)):
        scipy.io.savemat(
            root / "cars" / f"car_{car:03d}_mesh.mat", {"im": made[car]} | content, do_compression=is_compressed
        )
    return made


def write_matrix(path, array):
    """SmallNORB's binary format."""
    magic = {"uint8": 507333717, "int32": 507333716}[str(array.dtype)]
    dims = (*array.shape, 1, 1)[: max(3, array.ndim)]
    path.write_bytes(struct.pack(f"<{2 + len(dims)}i", magic, array.ndim, *dims) + array.tobytes())


def write_norb(root):
    """Both parts, instances 0 and 1 in testing, 2 and 3 in training, in no order; a picture shows its factors."""
    folder = root / "small_norb"
    folder.mkdir(parents=True)
    shown = np.random.RandomState(1).permutation(
        [(c, i, e, a, li) for c in range(2) for i in range(4) for e in range(2) for a in range(3) for li in range(1)]
    )
    for part, instances in zip(PARTS, ((2, 3), (0, 1))):
        chosen = shown[np.isin(shown[:, 1], instances)]
        dat = np.zeros((len(chosen), 2, 96, 96), np.uint8)
        dat[:, 1] = 255  # the other camera
        for k, (category, instance, elevation, azimuth, lighting) in enumerate(chosen):
            dat[k, 0, :48], dat[k, 0, 48:] = 10 * (category * 4 + instance), 10 * (elevation * 3 + azimuth) + lighting
        info = chosen[:, 1:].astype(np.int32)
        info[:, 2] *= 2
        for kind, array in (("dat", dat), ("cat", chosen[:, 0].astype(np.int32)), ("info", info)):
            write_matrix(file_of(folder, part, kind), array)
    return folder


def test_mpi3d_is_mapped_as_it_is(tmp_path, monkeypatch):
    made = write_mpi3d(tmp_path / "mpi_toy")
    data = MPI3D(tmp_path)
    assert data.space.name == "mpi3d_toy"
    item = data[5]
    assert (item["image"].numpy() == made[5]).all() and item["image"].dtype == torch.uint8
    assert item["factors"].tolist() == [0, 0, 0, 0, 0, 2, 1] and item["index"] == 5 and len(data) == 24
    assert (MPI3D(tmp_path, size=32).images(np.array([7, 0])) == halve(made[[7, 0]])).all()
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    assert MPI3D().path == tmp_path / "mpi_toy" / "mpi3d_toy.npz"


@pytest.mark.parametrize(
    "variant, name, size",
    [
        ("realistic", "mpi3d_realistic", 24),
        ("real", "mpi3d_real", 24),
        ("complex", "mpi3d_real_complex", 16),
        ("complex", "real3d_complicated_shapes_ordered", 16),
    ],
)
def test_variants_of_mpi3d(tmp_path, variant, name, size):
    made = write_mpi3d(tmp_path / "mpi3d", variant, name)
    data = MPI3D(tmp_path, variant=variant)
    assert data.position_space.name == f"mpi3d_{variant}"
    assert len(data) == size == data.position_space.size and (data[3]["image"].numpy() == made[3]).all()
    with pytest.raises(UserError, match="MPI3D toy not found .*mpi3d_toy.npz"):
        MPI3D(tmp_path)
    with pytest.raises(ConfigError, match="variant: expected one of toy, realistic, real, complex; got 'unreal'"):
        MPI3D(tmp_path, variant="unreal")


@pytest.mark.parametrize("suffix", [".npy", ".h5"])
def test_converted_files_come_first(tmp_path, suffix):
    made = write_mpi3d(tmp_path)
    other = made[::-1].copy()
    if suffix == ".npy":
        np.save(tmp_path / "mpi3d_toy.npy", other)
    else:
        with h5py.File(tmp_path / "mpi3d_toy.h5", "w") as file:
            file.create_dataset("images", data=other, chunks=(1, 64, 64, 3))
    assert (MPI3D(tmp_path).images(np.array([0])) == made[-1:]).all()


def test_a_compressed_file_is_unpacked_once_and_read_by_workers(tmp_path):
    made = write_mpi3d(tmp_path)
    np.savez_compressed(tmp_path / "mpi3d_toy.npz", images=made)
    config = {"target": "ldm.data.factors.mpi3d.MPI3D", "params": {"path": str(tmp_path)}}
    batches = list(DataModuleFromConfig(8, test=config, num_workers=2).test_dataloader())
    assert (torch.cat([batch["image"] for batch in batches]).numpy() == made).all()
    assert len(list((tmp_path / "cache" / "clip-disdiff").glob("*.npy"))) == 1
    again = pickle.loads(pickle.dumps(MPI3D(tmp_path)))
    assert (again.images(np.array([23])) == made[23:]).all()


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"images": pictures(23, 64, 64, 3)}, "expected 24 images for the factors of MPI3D .* got 23"),
        ({"images": pictures(24, 64, 64, 3).astype(np.float32)}, "uint8, or channels first; got .* float32"),
        ({"images": pictures(24, 32, 32, 3)}, r"'images' of shape \(N, 64, 64, 3\) .* got \(24, 32, 32, 3\) uint8"),
        ({"images": pictures(24, 64, 64)}, r"got \(24, 64, 64\)"),
    ],
)
def test_other_files_of_mpi3d_are_named(tmp_path, arrays, message):
    write_mpi3d(tmp_path, **arrays)
    with pytest.raises(UserError, match=message):
        MPI3D(tmp_path)


@pytest.mark.parametrize("kind", ["npz", "npy", "h5"])
def test_files_cut_in_half_are_named(tmp_path, kind):
    made = write_mpi3d(tmp_path)
    path = tmp_path / f"mpi3d_toy.{kind}"
    if kind == "npy":
        np.save(path, made)
    elif kind == "h5":
        with h5py.File(path, "w") as file:
            file["images"] = made
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=rf"mpi3d_toy\.{kind}: .*truncated"):
        MPI3D(path)


def test_a_compressed_file_with_a_flipped_bit_is_named(tmp_path):
    write_mpi3d(tmp_path)
    np.savez_compressed(tmp_path / "mpi3d_toy.npz", images=pictures(24, 64, 64, 3))
    whole = bytearray((tmp_path / "mpi3d_toy.npz").read_bytes())
    whole[len(whole) // 2] ^= 16
    (tmp_path / "mpi3d_toy.npz").write_bytes(whole)
    with pytest.raises(UserError, match="expected a complete .npz file"):
        MPI3D(tmp_path)
    assert not list((tmp_path / "cache" / "clip-disdiff").glob("*.npy"))


def test_a_full_disk_is_told_before_unpacking(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "mpi3d_toy.npz", images=pictures(24, 64, 64, 3))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("ldm.data.rows.shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="GB left.*XDG_CACHE_HOME"):
        MPI3D(tmp_path)


def test_dsprites(tmp_path):
    made = write_dsprites(tmp_path / "dsprites")
    data = DSprites(tmp_path)
    batch = data.__getitems__([23, 0])
    assert batch["image"].shape == (2, 64, 64, 3)
    assert (batch["image"].numpy() == 255 * made[[23, 0]][..., None]).all()
    assert batch["factors"].tolist() == [[2, 0, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert data.space.factor_names == ("shape", "scale", "orientation", "x_position", "y_position")
    small = DSprites(tmp_path, size=32).images(np.arange(24))
    assert (small == np.repeat(halve(255 * made[..., None]), 3, axis=-1)).all()


def test_published_size_of_dsprites():
    space = FactorSpace.from_dict({"names": list("abcdef"), "sizes": [1, 3, 6, 40, 32, 32], "latent": [1, 2, 3, 4, 5]})
    assert space.size == 737_280 and space.factors_num_values == (3, 6, 40, 32, 32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latents_classes": np.zeros((24, 6), int)}, r"of row 0 in row 1"),
        ({"latents_classes": np.full((24, 6), 3)}, "expected color in 0 to 0, got 3"),
        ({"latents_classes": np.zeros((24, 5), int)}, r"of shape \(N, 6\).* got \(N, 5\)"),
        ({"imgs": np.zeros((24, 64, 64))}, r"'imgs' of shape \(N, 64, 64\) uint8.* got \(24, 64, 64\) float64"),
        ({"imgs": pictures(20, 64, 64)}, "expected 24 images for the factors of DSprites .* got 20"),
    ],
)
def test_other_files_of_dsprites_are_named(tmp_path, change, message):
    write_dsprites(tmp_path, **change)
    with pytest.raises(UserError, match=message):
        DSprites(tmp_path)


def test_cars3d(tmp_path):
    made = write_cars(tmp_path, is_compressed=True)
    data = Cars3D(tmp_path)
    assert len(data) == 4 * 24 * 2
    for elevation, azimuth, car in ((0, 0, 0), (1, 2, 1), (3, 23, 1)):
        row = int(data.space.index_of(np.array([[elevation, azimuth, car]]))[0])
        expected = Image.fromarray(made[car][..., azimuth, elevation])
        expected.thumbnail((64, 64), Image.Resampling.LANCZOS)
        item = data[row]
        assert (item["image"].numpy() == np.array(expected)).all()
        assert item["factors"].tolist() == [elevation, azimuth, car] and row == elevation * 48 + azimuth * 2 + car
    cached = list((tmp_path / "cache").rglob("*.npy"))
    times = [path.stat().st_mtime_ns for path in cached]
    assert (Cars3D(tmp_path / "cars").images(np.arange(192)) == data.images(np.arange(192))).all()
    assert len(cached) == 1 and [path.stat().st_mtime_ns for path in cached] == times


def test_cars3d_repeats_for_training_only_where_told(tmp_path):
    write_cars(tmp_path)
    once, ten = Cars3D(tmp_path), Cars3D(tmp_path, repeat=10)
    assert len(ten) == 1920 == 10 * len(once)
    assert [ten[i]["index"] for i in (0, 9, 10, 1919)] == [0, 0, 1, 191]
    with pytest.raises(ConfigError, match="repeat: expected an integer of at least 1"):
        Cars3D(tmp_path, repeat=0)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"im": np.zeros((128, 128, 3, 24, 3), np.uint8)}, r"got \(128, 128, 3, 24, 3\) uint8"),
        ({"im": np.zeros((128, 128, 3, 24, 4))}, "float64"),
    ],
)
def test_other_meshes_are_named(tmp_path, content, message):
    write_cars(tmp_path, **content)
    with pytest.raises(UserError, match=message):
        Cars3D(tmp_path)


def test_cars_that_lack_or_are_cut_are_named(tmp_path):
    write_cars(tmp_path)
    files = sorted((tmp_path / "cars").iterdir())
    os.truncate(files[1], files[1].stat().st_size // 2)
    with pytest.raises(UserError, match="car_001_mesh.mat: expected a complete .mat file"):
        Cars3D(tmp_path)
    files[1].unlink()
    with pytest.raises(UserError, match="expected 2 .mat files, one per car; got 1"):
        Cars3D(tmp_path)
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_smallnorb(tmp_path):
    write_norb(tmp_path)
    data = SmallNORB(tmp_path)
    assert len(data) == 48 and data.space.factor_names == ("category", "elevation", "azimuth", "lighting")
    pixels = data.images(np.arange(48))
    assert pixels.shape == (48, 64, 64, 3) and (pixels[..., 0] == pixels[..., 2]).all()
    rows = data.space.index_of(np.array([(1, 3, 0, 2, 0), (0, 1, 1, 0, 0)]))
    assert pixels[rows][:, 5, 5, 0].tolist() == [10 * 7, 10] and pixels[rows][:, 60, 5, 0].tolist() == [20, 30]
    assert data[int(rows[0])]["factors"].tolist() == [1, 0, 2, 0]
    latent, drawn = data.position_space.sample(500, np.random.RandomState(0))
    assert (pixels[drawn][:, 60, 5, 0] == 10 * (latent[:, 1] * 3 + latent[:, 2])).all()
    assert {int(v) % 4 for v in pixels[drawn][:, 5, 5, 0] // 10} == {0, 1, 2, 3}  # every instance is drawn
    assert (SmallNORB(tmp_path, size=32).images(rows) == halve(pixels[rows])).all()


def test_smallnorb_resizes_as_the_library_does(tmp_path):
    folder = write_norb(tmp_path)
    dat = pictures(24, 2, 96, 96)
    write_matrix(file_of(folder, PARTS[0], "dat"), dat)
    info = np.fromfile(file_of(folder, PARTS[0], "info"), np.int32, offset=20).reshape(24, 4)
    category = np.fromfile(file_of(folder, PARTS[0], "cat"), np.int32, offset=20)
    data = SmallNORB(folder)
    row = data.space.index_of(np.array([(category[4], info[4, 0], info[4, 1], info[4, 2] // 2, info[4, 3])]))
    expected = np.array(Image.fromarray(dat[4, 0]).resize((64, 64), Image.Resampling.LANCZOS))
    assert (data.images(row)[0, :, :, 1] == expected).all()


def test_damages_of_smallnorb_are_named(tmp_path):
    folder = write_norb(tmp_path)
    dat, info = (file_of(folder, PARTS[1], kind) for kind in ("dat", "info"))
    whole = info.read_bytes()
    info.write_bytes(whole[:20] + whole[36:52] + whole[36:])  # one combination twice
    with pytest.raises(UserError, match="one image of each of 48 combinations .*, [02] of combination"):
        SmallNORB(tmp_path)
    info.write_bytes(whole[:28] + struct.pack("<i", 99) + whole[32:])
    with pytest.raises(UserError, match="expected azimuth in 0 to .*, got 49"):
        SmallNORB(tmp_path)
    info.write_bytes(struct.pack("<i", 12345) + whole[4:])
    with pytest.raises(UserError, match="expected one of the magic numbers .* got .12345, 2."):
        SmallNORB(tmp_path)
    info.unlink()
    with pytest.raises(UserError, match="testing-info.mat cannot be read"):
        SmallNORB(tmp_path)
    info.write_bytes(whole)
    os.truncate(dat, dat.stat().st_size // 2)
    with pytest.raises(UserError, match="testing-dat.mat: expected .* bytes .*truncated"):
        SmallNORB(tmp_path)
    with pytest.raises(UserError, match="SmallNORB not found"):
        SmallNORB(tmp_path / "nowhere")


def test_a_file_of_the_true_size_of_mpi3d(tmp_path, monkeypatch):
    """1,036,800 images, most of them holes in the file: mapped, so neither disk nor memory is needed."""
    monkeypatch.undo()
    path = tmp_path / "mpi3d_toy.npy"
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (1_036_800, 64, 64, 3))
    filled = np.array([172_800 + 28_800 + 14_400 + 4_800 + 1_600 + 40 + 1, 1_036_799])
    array[filled] = pictures(2, 64, 64, 3)
    array.flush()
    data = MPI3D(path)
    assert len(data) == 1_036_800 and data[int(filled[0])]["factors"].tolist() == [1] * 7
    assert (data.images(filled[::-1]) == pictures(2, 64, 64, 3)[::-1]).all()
