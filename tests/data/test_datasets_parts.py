"""Parts of factor spaces: chosen, read, encoded; and what wrapped data sets show."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from ldm.data.dataset import FactorDataset, split_rows
from ldm.data.factors import FactorSpace, factor_space
from ldm.data.module import WrappedDataset
from ldm.data.world import World3D
from ldm.util import ConfigError

SPACE = FactorSpace(("hue", "instance", "shape"), (5, 3, 4), latent=(0, 2))


def test_a_part_is_a_full_product_of_the_chosen_values():
    part = SPACE.restrict({"hue": 2, "shape": [3, 1]})
    assert part.values == {"hue": [0, 2], "instance": [0, 1, 2], "shape": [1, 3]}
    assert part.space.all_sizes == (2, 3, 2) and part.space.latent == (0, 2)
    everything = SPACE.factors_of(part.rows)
    assert {tuple(row) for row in everything.tolist()} == {(h, s) for h in (0, 2) for s in (1, 3)}
    own = part.space.factors_of(np.arange(part.space.size))
    assert (np.array([0, 2])[own[:, 0]] == everything[:, 0]).all()
    assert (np.array([1, 3])[own[:, 1]] == everything[:, 1]).all()
    assert (np.diff(part.rows) > 0).all()
    assert SPACE.restrict({"shape": 1}).space.factor_names == ("hue",)  # one value cannot be recovered
    whole = SPACE.restrict({})
    assert (whole.rows == np.arange(60)).all() and whole.space.to_dict() == SPACE.to_dict()


@pytest.mark.parametrize(
    "keep, message",
    [
        ({"hues": 2}, "got 'hues'. Did you mean 'hue'"),
        ({"hue": 6}, "keep.hue: expected 1 to 5 values, got 6"),
        ({"hue": 0}, "expected 1 to 5 values, got 0"),
        ({"hue": [0, 5]}, r"different values of \[0, 1, 2, 3, 4\], got \[0, 5\]"),
        ({"hue": [1, 1]}, "expected different values"),
        ({"hue": []}, "expected a number of values, or a list"),
        ({"hue": "red"}, "expected a number of values, or a list"),
        ([2, 3], "expected a mapping such as"),
        ({"hue": 1, "shape": 1}, "a factor with at least two values left"),
    ],
)
def test_what_cannot_be_kept_is_named(keep, message):
    with pytest.raises(ConfigError, match=message):
        SPACE.restrict(keep)


def test_a_space_in_words():
    assert FactorSpace.from_dict(SPACE.named("toys").to_dict()).to_dict() == {
        "name": "toys",
        "names": ["hue", "instance", "shape"],
        "sizes": [5, 3, 4],
        "latent": [0, 2],
    }
    with pytest.raises(ConfigError, match="latent missing"):
        FactorSpace.from_dict({"names": ["a"], "sizes": [2]})


def test_names_of_spaces():
    assert FactorSpace.from_dict({"names": ["a"], "sizes": [2], "latent": [0]}).name == "" == SPACE.name
    assert [factor_space(name).name for name in ("cars3d", "mpi3d_complex")] == ["cars3d", "mpi3d_complex"]
    toys = SPACE.named("toys")
    assert toys.restrict({}).space.name == "toys" and toys.restrict({"hue": 2}).space.name == "toys_part"
    assert SPACE.restrict({"hue": 2}).space.name == "" and SPACE.name == ""
    world, part = World3D(size=32), World3D(size=32, keep={"floor_hue": 2})
    assert world.position_space.name == "world3d"
    assert part.space.name == "world3d" and part.position_space.name == "world3d_part"
    assert World3D(size=32, name="mine").space.name == "mine"
    assert type("Toys", (FactorDataset,), {})(SPACE).position_space.name == "Toys"


def test_a_data_set_of_a_part():
    world = World3D(
        size=32,
        keep={"floor_hue": 2, "wall_hue": 1, "object_hue": 5, "orientation": 3},
        text="attributes",
        phrasing="canonical",
    )
    assert len(world) == 2 * 5 * 8 * 4 * 3 == world.position_space.size
    item = world[len(world) - 1]
    assert item["factors"].tolist() == [5, 0, 8, 7, 3, 10] and item["index"] == int(world.rows[-1])
    assert item["text"][:2] == ["cyan floor", "red wall"]
    train, held = (World3D(size=32, keep={"floor_hue": 1, "wall_hue": 1}, split=s) for s in ("train", "validation"))
    assert len(train) == 4320 and len(held) == 480 and not set(train.rows) & set(held.rows)
    assert sorted(world.rows_of("train").tolist() + world.rows_of("validation").tolist()) == world.rows.tolist()
    some = World3D(size=32, keep={"floor_hue": 1, "wall_hue": 1}, split="train", limit=10)
    assert (some.whole().rows == some.whole().kept.rows).all() and len(some.whole()) == 4800 and len(some) == 10


def test_the_splits_of_large_sets_are_what_they_were():
    assert len(split_rows(480_000, "train")) == 475_000 and len(split_rows(480_000, "validation")) == 1000
    assert not set(split_rows(480_000, "validation")) & set(split_rows(480_000, "train"))
    assert len(split_rows(17_568, "train")) == 15_812 and len(split_rows(17_568, "validation")) == 1000
    with pytest.raises(ConfigError, match="only 9. Use split: null"):
        split_rows(9, "train")


def test_a_wrapped_data_set_shows_its_factors_and_makes_whole_batches():
    wrapped = pickle.loads(pickle.dumps(WrappedDataset(World3D(size=32, keep={"floor_hue": 1}))))
    assert wrapped.position_space.all_sizes == (1, 10, 10, 8, 4, 15) and wrapped.vocabulary.num_units == 6
    assert wrapped.__getitems__([1, 0])["image"].shape == (2, 32, 32, 3)
    plain = WrappedDataset([1, 2, 3])
    assert not hasattr(plain, "__getitems__") and not hasattr(plain, "space") and plain[2] == 3


def test_the_complex_robot_has_fewer_colours_and_shapes():
    assert factor_space("mpi3d_complex").size == 460_800 and factor_space("mpi3d").size == 1_036_800
