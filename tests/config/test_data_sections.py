"""Data sets that take the place of others in a config."""

from __future__ import annotations

from omegaconf import OmegaConf

from ldm.config.data_sections import without_foreign_params

WORLD = {"target": "ldm.data.world.World3D", "params": {"size": 64, "split": "train", "text": "attributes"}}


def merge(*layers):
    merged = OmegaConf.create({})
    for layer in layers:
        layer = OmegaConf.create({"data": {"params": {"train": layer}}})
        merged = OmegaConf.merge(without_foreign_params(merged, layer), layer)
    return OmegaConf.to_container(merged)["data"]["params"]["train"]["params"]


def test_options_that_the_new_one_does_not_take_are_left_out():
    folder = {"target": "ldm.data.formats.folder.ImageFolder", "params": {"path": "x"}}
    assert merge(WORLD, folder) == {"split": "train", "path": "x"}


def test_a_drop_in_keeps_all_options():
    stored = {"target": "ldm.data.factors.shapes3d.Shapes3D", "params": {"path": "x"}}
    assert merge(WORLD, stored) == {**WORLD["params"], "path": "x"}
    assert merge(WORLD, {"target": "ldm.data.factors.shapes3d.Shapes3D"}) == WORLD["params"]


def test_nothing_is_left_out_where_nothing_is_replaced():
    assert merge(WORLD, {"params": {"sise": 3}}) == {**WORLD["params"], "sise": 3}
    assert merge({"params": {"sise": 3}}, WORLD) == {**WORLD["params"], "sise": 3}
    assert merge(WORLD, {"target": "ldm.data.world.World3D", "params": {"sise": 3}}) == {**WORLD["params"], "sise": 3}
    foreign = {"target": "builtins.dict"}  # nobody knows what it takes
    assert merge(WORLD, foreign) == WORLD["params"]
    assert merge(WORLD, {"target": "ldm.data.formats.folder.ImageFoldr"}) == WORLD["params"]


def test_a_slip_beside_the_new_target_stays_to_be_named():
    folder = {"target": "ldm.data.formats.folder.ImageFolder", "params": {"paht": "x"}}
    assert merge(WORLD, folder) == {"split": "train", "paht": "x"}
