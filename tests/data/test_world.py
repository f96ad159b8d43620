"""The embedded world: pictures, texts, splits, cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.data.dataset import split_rows
from ldm.data.world import PALETTE, World3D, compose, world_maps
from ldm.data.world import dataset as world_module
from ldm.util import ConfigError


def rows_with(world: World3D, **values: int) -> np.ndarray:
    """Rows that differ in one factor each from a plain scene."""
    names = world.space.factor_names
    factors = np.array([[2, 7, 0, 4, 0, 7]])
    for name, value in values.items():
        factors[0, names.index(name)] = value
    return world.space.index_of(factors)


def test_items_and_batches_agree():
    world = World3D(size=32, text="attributes", phrasing="canonical")
    positions = [479_999, 0, 123_456]
    batch = world.__getitems__(positions)
    assert batch["image"].shape == (3, 32, 32, 3) and batch["image"].dtype == torch.uint8
    assert batch["factors"].dtype == batch["index"].dtype == torch.int64
    for i, position in enumerate(positions):
        item = world[position]
        assert item["index"] == position == batch["index"][i]
        assert torch.equal(item["image"], batch["image"][i])
        assert torch.equal(item["factors"], batch["factors"][i])
        assert item["text"] == batch["text"][i] and len(item["text"]) == 6
    assert torch.equal(world[-1]["image"], batch["image"][0])
    with pytest.raises(IndexError, match="480000"):
        world[480_000]


def test_colours_colour_only_their_part():
    world = World3D(size=32)
    base = world.images(rows_with(world))[0].astype(int)
    floor = np.abs(world.images(rows_with(world, floor_hue=5))[0] - base).sum(-1) > 0
    wall = np.abs(world.images(rows_with(world, wall_hue=5))[0] - base).sum(-1) > 0
    thing = np.abs(world.images(rows_with(world, object_hue=5))[0] - base).sum(-1) > 0
    assert floor[-1].all() and not floor[0].any()
    assert wall[0].all() and not wall[-1].any()
    assert thing[18, 16] and not thing[0].any()
    assert (floor | wall | thing).all()


def test_every_geometry_differs_and_bytes_never_overflow():
    for size in (32, 64):
        maps = world_maps(size)
        assert maps.shape == (480, size * size, 4)
        assert maps.sum(-1).max() <= 255
        assert len({m.tobytes() for m in maps}) == 480


def test_composition_is_the_rounded_product():
    world = World3D(size=32)
    rows = np.random.RandomState(0).randint(0, 480_000, 5)
    for row in rows:
        f = world.space.factors_of(np.array([row]))[0]
        maps = world_maps(32)[(f[3] * 4 + f[4]) * 15 + f[5]].astype(int)
        colours = np.vstack([PALETTE[f[:3]], [[255, 255, 255]]]).astype(int)
        expected = np.rint((maps @ colours) / 255)
        assert np.abs(world.images(np.array([row]))[0].reshape(-1, 3) - expected).max() == 0


def test_bytes_do_not_depend_on_the_batch():
    maps, factors = world_maps(32), World3D().space.factors_of(np.arange(0, 480_000, 3331))
    together = compose(maps, factors)
    assert (together == np.concatenate([compose(maps, factors[i : i + 1]) for i in range(len(factors))])).all()


def test_hues_are_told_apart_in_light_and_shade():
    """No shaded byte colour of one hue comes near any shade of another."""
    shades = np.linspace(0.5, 1, 26)[:, None] * PALETTE[:, None].astype(float)
    gap = [np.linalg.norm(shades[i][:, None] - shades[j][None], axis=-1).min() for i in range(10) for j in range(i)]
    assert min(gap) > 30


def test_random_texts_depend_on_seed_and_rows_alone():
    a, b = (World3D(text="attributes", unset_prob=0.3, seed=3) for _ in range(2))
    b.__getitems__([5, 6])
    assert a.__getitems__([1, 2, 3])["text"] == b.__getitems__([1, 2, 3])["text"]
    other = World3D(text="attributes", unset_prob=0.3, seed=4)
    assert other.__getitems__(range(64))["text"] != a.__getitems__(range(64))["text"]


def test_units_are_unset_with_their_probability():
    texts = World3D(text="attributes", unset_prob=0.25).__getitems__(range(0, 480_000, 240))["text"]
    share = np.mean([[text == "" for text in row] for row in texts], axis=0)
    assert share == pytest.approx(0.25, abs=0.04)


def test_captions_name_what_their_mask_says():
    world = World3D(text="caption")
    batch = world.__getitems__(range(0, 480_000, 480))
    mask, labels = batch["caption_mask"].numpy(), world.vocabulary.word_labels(batch["factors"].numpy())
    assert mask.any(1).all() and mask.dtype == bool
    for caption, named, label in zip(batch["text"], mask, labels):
        parts = caption.split(", ")
        assert len(parts) == named.sum()
        for k in np.flatnonzero(named):
            assert sum(p in world.vocabulary.phrases(k, label[k]) for p in parts) >= 1
    assert np.mean(mask.sum(1) == 1) == pytest.approx(0.5, abs=0.05)
    assert mask.mean(0) == pytest.approx(mask.mean(), abs=0.06)


def test_splits_are_fixed_disjoint_and_nested():
    train, validation = split_rows(480_000, "train"), split_rows(480_000, "validation")
    assert len(train) == 475_000 and len(validation) == 1_000
    assert not set(train.tolist()) & set(validation.tolist())
    assert (split_rows(480_000, "train", 300) == train[:300]).all()
    assert (split_rows(480_000, "test") == np.arange(480_000)).all()
    few, more = split_rows(480_000, "test", 500), split_rows(480_000, None, 1_000)
    assert (np.diff(few) > 0).all() and set(few.tolist()) <= set(more.tolist())
    factors = World3D().space.factors_of(few)
    assert [len(set(column)) for column in factors.T] == [10, 10, 10, 8, 4, 15]
    assert train[:3].tolist() == [458706, 357250, 296650]  # numpy freezes this generator for good


@pytest.mark.parametrize(
    "params, message",
    [
        ({"size": 48}, "size: expected one of 32, 64; got 48"),
        ({"split": "val"}, "split: expected one of train, .*; got 'val'"),
        ({"limit": 0}, "limit: expected an integer of at least 1"),
        ({"text": "words"}, "text: expected one of attributes, caption, null"),
        ({"phrasing": "plain"}, "phrasing: expected one of"),
        ({"text": "attributes", "unset_prob": 1.5}, "unset_prob: expected a number in"),
        ({"unset_prob": 0.1}, "Set text: attributes"),
    ],
)
def test_messages(params, message):
    with pytest.raises(ConfigError, match=message):
        World3D(**params)


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """A cache folder of its own and quick stand-in geometry, counted."""
    calls = []

    def render(size: int) -> np.ndarray:
        calls.append(size)
        return np.full((480, size, size, 4), 63, np.uint8)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(world_module.geometry, "render_maps", render)
    return tmp_path / "clip-disdiff", calls


def test_cache_is_used_and_made_anew_when_damaged(fresh_cache, caplog):
    folder, calls = fresh_cache
    make = world_module.world_maps.__wrapped__
    make(32)
    assert make(32)[0, 0, 0] == 63 and calls == [32]
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:200] + b"\xff" + whole[201:]):
        file.write_bytes(damaged)
        assert (make(32) == 63).all()
        assert file.read_bytes() == whole
    assert calls == [32] * 4
    assert "computing it again" in caplog.text


def test_cache_that_cannot_be_written_only_warns(fresh_cache, caplog):
    folder, _ = fresh_cache
    folder.write_text("a file where the folder should be")
    assert (world_module.world_maps.__wrapped__(32) == 63).all()
    assert "could not be cached" in caplog.text


def test_captions_name_weighted_attributes_more_often():
    def share_of_last(weights):
        world = World3D(size=32, text="caption", limit=2000, caption_weights=weights)
        return world.__getitems__(np.arange(2000))["caption_mask"][:, -1].double().mean().item()

    assert share_of_last([1, 1, 1, 1, 1, 5]) > share_of_last(None) + 0.1
    with pytest.raises(ConfigError, match="6 positive numbers"):
        share_of_last([1, 2])
