"""Data sets with CLIP embeddings: matching by path, records, and every defect of a file."""

from __future__ import annotations

import csv
import io
import resource
import shutil

import numpy as np
import pytest
import torch
from legacy_configs import save_clip
from PIL import Image

from ldm.data.check import check_dataset
from ldm.data.collate import collate
from ldm.data.dataset import WrappedDataset
from ldm.data.factors import FactorSpace
from ldm.data.factors.stored import StoredFactors
from ldm.data.formats.clip_embeddings import EmbeddingTable, read_table, table_of, with_embeddings, write_table
from ldm.data.formats.folder import ImageFolder
from ldm.data.formats.h5_text import ArrayImages
from ldm.data.formats.image_list import ImageList
from ldm.data.formats.image_sources import ImageArray
from ldm.data.formats.lmdb_text import LMDBImages
from ldm.data.formats.text_writers import write_text_lmdb
from ldm.data.module import DataModuleFromConfig
from ldm.data.world import World3D
from ldm.evaluation.clip_embeddings import compute_embeddings, load_image_encoder
from ldm.modules.encoders.clip_embedders import FrozenCLIPTextEmbedder
from ldm.modules.encoders.clip_loading import find_clip, load_clip
from ldm.util import ConfigError, UserError

FOLDER = "ldm.data.formats.folder.ImageFolder"
SUFFIXES = (".csv", ".safetensors", ".h5")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return load_image_encoder(str(save_clip(tmp_path_factory.mktemp("clip"))))


def tiny_imagenet(root, count=12):
    """The layout of Tiny ImageNet: train/<wnid>/images/*.JPEG and val/images/*.JPEG."""
    rng = np.random.default_rng(0)
    for k in range(count):
        folder = root / ("val/images" if k % 4 == 3 else f"train/n{k % 2:02d}/images")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48 + k, 3), dtype=np.uint8)).save(folder / f"{k}.JPEG")
    return root


@pytest.fixture
def images(tmp_path):
    return tiny_imagenet(tmp_path / "tiny")


@pytest.fixture
def table(images, encoder, tmp_path):
    """Embeddings of the training images, in a .csv."""
    return compute_embeddings([ImageFolder(images / "train")], encoder, tmp_path / "clip.csv")[0]


def folder_of(path, **params):
    return {"target": FOLDER, "params": {"path": str(path), "image_size": 32, **params}}


def opened(table, path, suffix=".csv", **params):
    table.path = table.path.with_suffix(suffix)
    write_table(table)
    return with_embeddings(folder_of(path, **params), table.path)


def expected(encoder, path):
    return encoder(encoder.preprocess(Image.open(path).convert("RGB"))[None])[0]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_items_and_batches_contain_the_embedding_of_the_original_image(table, images, encoder, suffix):
    order = np.random.default_rng(1).permutation(len(table.names))
    mixed = EmbeddingTable(table.path, [table.names[k] for k in order], table.values[order], table.record)
    data = opened(mixed, images, suffix, split="train", fit="random_crop", do_augment=True)
    assert len(data) == 9 and data.space is None
    batch = collate(data.__getitems__([0, 5, 2]))
    assert batch["clip_embedding"].shape == (3, 64) and batch["clip_embedding"].dtype == torch.float32
    for position, value in zip((0, 5, 2), batch["clip_embedding"]):
        path = images / data.pictures[position]
        assert np.allclose(value.numpy(), expected(encoder, path), atol=1e-5)
        assert torch.equal(data[position]["clip_embedding"], value)


def test_the_seeds_csv_has_no_header_and_no_record(table, images):
    rows = [*csv.reader(table.path.read_text().splitlines())]
    assert len(rows) == 9 and all(len(row) == 65 for row in rows)
    assert rows[0][0] == f"{images.as_posix()}/train/n00/images/0.JPEG"
    assert np.array_equal(np.array([row[1:] for row in rows], np.float32), table.values)
    table.path.with_name("clip.csv.json").unlink()
    data = with_embeddings(folder_of(images / "train"), table.path)
    assert np.array_equal(data.__getitems__(range(9))["clip_embedding"].numpy(), table.values)
    assert table_of(data).record == {} and table_of(WrappedDataset(data)) is table_of(data)
    assert table_of(ImageFolder(images)) is None and table_of([]) is None


def test_paths_of_another_machine(table, images, tmp_path):
    moved = shutil.move(images, tmp_path / "elsewhere")
    table.names = [name.replace(str(images), r"D:\data\tiny").replace("/", "\\") for name in table.names]
    for params in ({"path": f"{moved}/train"}, {"path": str(moved), "split": "train"}):
        assert len(opened(table, **params)) == 9


def test_folders_with_the_same_names(tmp_path, encoder):
    for k, part in enumerate(("train", "val")):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.new("RGB", (32, 32), (k * 200, 0, 90)).save(tmp_path / part / "cat/1.png")
    compute_embeddings([ImageFolder(tmp_path)], encoder, tmp_path / "both.h5")
    for part in ("train", "val"):
        data = with_embeddings(folder_of(tmp_path / part), tmp_path / "both.h5")
        assert np.allclose(data[0]["clip_embedding"], expected(encoder, tmp_path / part / "cat/1.png"), atol=1e-5)


def test_rows_of_two_other_folders_are_ambiguous(tmp_path, encoder):
    names = [str(tmp_path / folder / "photos/1.png") for folder in ("a", "b")]
    (tmp_path / "c/photos").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "c/photos/1.png")
    write_table(EmbeddingTable(tmp_path / "t.h5", names, np.eye(2, 64, dtype=np.float32)))
    with broken(r"got none \(or two of other folders\) of 1, such as .*/c/photos/1.png. Add them with"):
        with_embeddings(folder_of(tmp_path / "c/photos"), tmp_path / "t.h5")
    write_table(EmbeddingTable(tmp_path / "t.h5", [*names, "x/c/photos/1.png"], np.eye(3, 64, dtype=np.float32)))
    data = with_embeddings(folder_of(tmp_path / "c/photos"), tmp_path / "t.h5")
    assert data[0]["clip_embedding"][2] == 1


@pytest.mark.parametrize("kind", ["world", "array", "lmdb", "list"])
def test_every_kind_of_data_set(kind, images, encoder, tmp_path):
    pixels = World3D(size=64).images(np.arange(0, 480_000, 50_000))
    if kind == "world":
        config = {"target": "ldm.data.world.World3D", "params": {"size": 64, "split": "train", "limit": 6}}
        data, originals = World3D(**config["params"]), World3D(size=64).images
    elif kind == "array":
        np.save(tmp_path / "a.npy", pixels)
        config = {"target": "ldm.data.formats.h5_text.ArrayImages", "params": {"path": f"{tmp_path}/a.npy"}}
        config["params"]["image_size"] = 16
        data, originals = ArrayImages(**config["params"]), lambda rows: pixels[rows]
    elif kind == "lmdb":
        write_text_lmdb(tmp_path / "a.lmdb", [(image, None) for image in pixels], 64)
        config = {"target": "ldm.data.formats.lmdb_text.LMDBImages", "params": {"path": f"{tmp_path}/a.lmdb"}}
        config["params"] |= {"original_resolution": 64, "image_size": 32}
        data, originals = LMDBImages(**config["params"]), lambda rows: pixels[rows]
    else:
        paths = sorted(str(path) for path in images.rglob("*.JPEG"))
        config = {"target": "ldm.data.formats.image_list.ImageList", "params": {"paths": paths, "size": 32}}
        data, originals = ImageList(**config["params"]), None
    compute_embeddings([data], encoder, tmp_path / "clip.safetensors")
    found = with_embeddings(config, tmp_path / "clip.safetensors")
    item = found[1]
    picture = Image.open(data.files[1]) if originals is None else Image.fromarray(originals(data.rows[[1]])[0])
    wanted = encoder(encoder.preprocess(picture)[None])[0]
    assert len(found) == len(data) and np.allclose(item["clip_embedding"], wanted, atol=1e-5)
    assert not check_dataset(found).problems
    assert found.in_memory == data.in_memory and str(found.space) == str(data.space)


def test_the_loader_delivers_embeddings(table, images):
    section = {"target": "ldm.data.formats.clip_embeddings.with_embeddings", "params": {"embeddings": str(table.path)}}
    section["params"]["data"] = folder_of(images / "train", repeat=2)
    for wrap in (False, True):
        module = DataModuleFromConfig(batch_size=4, train=section, wrap=wrap, num_workers=2)
        batch = next(iter(module.train_dataloader()))
        assert batch["clip_embedding"].shape == (4, 64) and batch["image"].shape == (4, 32, 32, 3)


def broken(message):
    return pytest.raises(UserError, match=message)


def test_missing_rows_and_duplicates(table, images):
    values = table.values
    table.names[3:4], table.values = [], np.delete(values, 3, 0)
    with broken(r"expected an embedding of each of 9 images, got none .* of 1, such as .*/train/.*JPEG"):
        opened(table, images / "train")
    table.names, table.values = [*table.names, table.names[0]], values
    with broken(r"expected one row per image, got two of .*0.JPEG \(rows 1 and 9\)"):
        opened(table, images / "train")


def test_other_images_under_the_same_names(table, images):
    for path in (images / "train").rglob("*.JPEG"):
        Image.new("RGB", (50, 40)).save(path)
    for suffix in SUFFIXES:
        with broken("is not the image that was embedded"):
            opened(table, images / "train", suffix)


def test_images_that_could_not_be_read_are_left_out(images, encoder, tmp_path, caplog):
    (images / "train/n00/images/0.JPEG").write_bytes(b"\xff\xd8 no image")
    _, failed = compute_embeddings([ImageFolder(images / "train")], encoder, tmp_path / "clip.h5")
    assert len(failed) == 1 and "0.JPEG: expected a complete" in next(iter(failed.values()))
    moved = shutil.move(images, tmp_path / "moved")
    data = with_embeddings(folder_of(f"{moved}/train"), tmp_path / "clip.h5")
    assert len(data) == 8 and "1 images were left out" in caplog.text
    assert len(data.__getitems__(range(8))["clip_embedding"]) == 8
    Image.new("RGB", (40, 40)).save(f"{moved}/train/n00/images/0.JPEG")
    with broken(r"expected an embedding of each of 9 images, got none .* of 1, such as .*/0.JPEG. Add them"):
        with_embeddings(folder_of(f"{moved}/train"), tmp_path / "clip.h5")


def test_split_of_a_data_set_with_embeddings_of_this_split_only(encoder, tmp_path):
    config = {"target": "ldm.data.world.World3D", "params": {"size": 64, "split": "train", "limit": 3}}
    compute_embeddings([World3D(**config["params"])], encoder, tmp_path / "clip.csv")
    data = with_embeddings(config, tmp_path / "clip.csv")
    with broken(r"clip.csv: expected an embedding of image \d+, got none. Give the data set to"):
        data.whole().__getitems__(range(9))


def test_another_clip(table, encoder):
    read = read_table(table.path)
    read.require_clip("mine", encoder.fingerprint, 64)
    with broken(r"expected embeddings of the CLIP mine \(64 wide, fingerprint 0\), got those of .*fingerprint"):
        read.require_clip("mine", "0", 64)
    with broken(r"\(32 wide"):
        read.require_clip("mine", encoder.fingerprint, 32)
    read.record = {}
    read.require_clip("mine", "0", 64)
    with broken("got those of an unknown CLIP"):
        read.require_clip("mine", "0", 512)


def test_the_fingerprint_follows_the_weights(encoder):
    text = FrozenCLIPTextEmbedder(encoder.name)
    assert text.fingerprint == encoder.fingerprint and text.width == encoder.width
    model = load_clip(find_clip(encoder.name))
    from ldm.modules.weights import weights_fingerprint

    assert weights_fingerprint(model.half()) == encoder.fingerprint
    with torch.no_grad():
        model.float().text_projection[0, 0] += 1
    assert weights_fingerprint(model) != encoder.fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,1,2\nb.png,1\n", r"row 2 \(b.png\): expected a path and 2 numbers, got 1"),
        ("a.png,1,2\nb.png,1,x\n", r"row 2 \(b.png\): expected a path and 2 numbers, got 2 .*'x'"),
        ("path,f1,f2\na.png,1,2\n", r"row 1 \(path\): expected a path and 2 numbers, got 2 .*'f1'"),
        ("a.png,1\nb.png,1\n\na.png,2\n", r"got two of a.png \(rows 1 and 3\)"),
        ("a.png,1,nan\n", r"expected finite numbers, got others in row 1 \(a.png\)"),
        ("a.png\n", "expected a path and 1 numbers, got 0"),
    ],
)
def test_bad_csv(tmp_path, text, message):
    (tmp_path / "c.csv").write_text(text)
    with broken(message):
        read_table(tmp_path / "c.csv")


def test_bad_files(table, images, tmp_path):
    with broken("expected a file of CLIP embeddings, got none. Compute it with python scripts/preprocess_clip.py"):
        read_table(tmp_path / "none.h5")
    with broken("expected a file of embeddings"):
        read_table(tmp_path / "clip.npy")
    for suffix in (".safetensors", ".h5"):
        path = tmp_path / f"b{suffix}"
        path.write_bytes(b"damaged" * 9)
        with broken("complete"):
            read_table(path)
        table.values = table.values.astype(np.float64)
        with broken("expected embeddings"):
            opened(table, images / "train", suffix)
    with pytest.raises(ConfigError, match="expected a data set of ldm.data"):
        with_embeddings({"target": "torch.nn.Identity"}, table.path)


def test_random_crops_of_resized_images(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, :, 0] = np.arange(96)
    Image.fromarray(wide).save(tmp_path / "a.png")
    data = ImageFolder(tmp_path, image_size=32, fit="random_crop", repeat=400)
    first = data.__getitems__(range(400))["image"]
    left = first[:, 0, 0, 0]
    assert torch.equal(first[:, 0, 31, 0], left + 31)
    assert left.min() <= 1 and left.max() >= 63 and len(left.unique()) > 50
    assert torch.equal(data.__getitems__(range(400))["image"], first)
    centre = ImageFolder(tmp_path, image_size=32)[0]["image"]
    assert centre[0, 0, 0] == 32
    Image.fromarray(wide[:, :32]).save(tmp_path / "a.png")
    assert torch.equal(data[0]["image"], torch.from_numpy(wide[:, :32]))
    with pytest.raises(ConfigError, match="random_crop"):
        ImageFolder(tmp_path, fit="random")


def test_originals_are_files(images):
    data = ImageFolder(images / "train", image_size=32)
    assert Image.open(io.BytesIO(data.original(0))).size == (48, 40)


@pytest.mark.parametrize("line", ["b.png,1.5,2.", "b.png,1.5,2.25"])
def test_complete_last_row_without_newline(tmp_path, caplog, line):
    (tmp_path / "c.csv").write_text(f"a.png,1,2\n{line}")
    table = read_table(tmp_path / "c.csv")
    assert table.names == ["a.png", "b.png"] and table.values[1, 0] == 1.5
    assert caplog.text.count("row 2 (b.png) has no newline") == 1
    assert read_table(tmp_path / "c.csv", is_partial=True).names == ["a.png"]


@pytest.mark.parametrize("line", ["b", "b.png,1", "b.png,1,", "b.png,1,2e-"])
def test_incomplete_last_row_without_newline_is_ignored(tmp_path, caplog, line):
    (tmp_path / "c.csv").write_text(f"a.png,1,2\n{line}")
    assert read_table(tmp_path / "c.csv").names == ["a.png"] and not caplog.text


def test_items_of_a_csv_without_a_final_newline(table, images):
    table.path.write_text(table.path.read_text().removesuffix("\n"))
    data = with_embeddings(folder_of(images / "train"), table.path)
    assert np.array_equal(data.__getitems__(range(9))["clip_embedding"].numpy(), table.values)


def test_large_batches_of_workers_need_few_file_descriptors(tmp_path, encoder):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        table, failed = compute_embeddings([ArrayImages(tmp_path / "a.npy")], encoder, tmp_path / "c.h5", 150, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(table.names) == 300 and not failed


def test_two_data_sets_whose_images_have_the_same_numbers(tmp_path, encoder):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 8, 8, 3), dtype=np.uint8)
    sets = []
    for name, images in zip("ab", pixels):
        np.save(tmp_path / f"{name}.npy", images)
        sets.append(ArrayImages(tmp_path / f"{name}.npy"))
    with broken(r"two of image_000000 \(in .*a.npy and .*b.npy\). Use one --output per data set"):
        compute_embeddings(sets, encoder, tmp_path / "c.h5")
    with broken("Use one --output"):
        compute_embeddings([sets[0], World3D(size=32)], encoder, tmp_path / "c.h5")
    assert len(compute_embeddings([sets[0], ArrayImages(tmp_path / "a.npy")], encoder, tmp_path / "c.h5")[0].names) == 4


def test_two_data_sets_that_share_files(images, encoder, tmp_path):
    sets = [ImageFolder(images), ImageFolder(images / "train"), ImageList(paths=[*map(str, images.rglob("*.JPEG"))])]
    assert len(compute_embeddings(sets, encoder, tmp_path / "c.h5")[0].names) == 12


def test_finished_rows_of_a_relative_path(images, encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(images)
    first, _ = compute_embeddings([ImageFolder("train")], encoder, tmp_path / "c.csv")
    for folder in (images / "train", "../tiny/train", "train"):
        again, _ = compute_embeddings([ImageFolder(folder)], encoder, tmp_path / "c.csv")
        assert again.names == first.names and np.array_equal(again.values, first.values)
        assert len(with_embeddings(folder_of(images / "train"), tmp_path / "c.csv")) == 9
    (tmp_path / "c.csv.json").unlink()
    assert compute_embeddings([ImageFolder(images / "train")], encoder, tmp_path / "c.csv")[0].names == first.names


@pytest.mark.parametrize("is_slow", [False, True])
def test_originals_of_halved_factor_sets_have_the_stored_size(tmp_path, monkeypatch, is_slow):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    space = FactorSpace(("shape", "hue"), (3, 4))
    pixels = np.random.default_rng(0).integers(0, 256, (space.size, 64, 64, 3), dtype=np.uint8)
    path = tmp_path / ("a.npz" if is_slow else "a.npy")
    np.savez_compressed(path, images=pixels) if is_slow else np.save(path, pixels)
    half, full = (StoredFactors(space, ImageArray(path), size) for size in (32, 64))
    assert np.array_equal(half.original(5), pixels[5]) and np.array_equal(full.original(5), pixels[5])
    assert half.images(np.array([5])).shape == (1, 32, 32, 3) and half[5]["image"].shape == (32, 32, 3)


# Combinations of words that training does not contain ----------------------------------------------------------------


def combinations(world):
    return set(map(tuple, world.vocabulary.word_labels(world.space.factors_of(world.rows)).tolist()))


def test_unseen_combinations_are_those_of_the_validation_split_only():
    train, held_out = (World3D(split=split, holdout=0.1) for split in ("train", "validation"))
    assert not combinations(train) & combinations(held_out)
    assert len(combinations(train) | combinations(held_out)) == 80_000
    assert len(combinations(held_out)) / 80_000 == pytest.approx(0.1, abs=0.01)
    assert len(train) + len(held_out) == len(World3D()) == 480_000
    words = train.vocabulary.word_labels(train.space.factors_of(train.rows))
    assert all(len(np.unique(column)) == len(of_factor) for column, of_factor in zip(words.T, train.vocabulary.words))


def test_limit_takes_a_random_sample_of_the_unseen_combinations():
    few, more = (World3D(split="validation", holdout=0.1, limit=limit) for limit in (200, 400))
    assert len(few) == 200 and few.rows.tolist() == more.rows[:200].tolist()
    assert len(np.unique(few.space.factors_of(few.rows)[:, 0])) == 10


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_holdout_is_checked(share):
    with pytest.raises(ConfigError, match="holdout"):
        World3D(holdout=share)
