"""Data sets that take the place of others in a config."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf
from PIL import Image

from ldm.config.data_sections import without_foreign_params
from ldm.config.loading import load_config

WORLD = {"target": "ldm.data.world.World3D", "params": {"size": 64, "split": "train", "text": "attributes"}}


def merge(*layers):
    merged = OmegaConf.create({})
    for layer in layers:
        layer = OmegaConf.create({"data": {"params": {"train": layer}}})
        merged = OmegaConf.merge(without_foreign_params(merged, layer), layer)
    return OmegaConf.to_container(merged)["data"]["params"]["train"]["params"]


def test_options_that_the_new_one_does_not_take_are_left_out():
    folder = {"target": "ldm.data.formats.folder.ImageFolder", "params": {"path": "x"}}
    assert merge(WORLD, folder) == {"split": "train", "text": "attributes", "path": "x"}


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
    assert merge(WORLD, folder) == {"split": "train", "text": "attributes", "paht": "x"}


WEIGHTED = {"target": WORLD["target"], "params": {"split": "train", "caption_weights": [1] * 6, "keep": {"shape": 2}}}
FOLDER = {"target": "ldm.data.formats.folder.ImageFolder", "params": {"path": "x", "templates": {"hue": "{} hat"}}}


def test_options_that_name_attributes_do_not_survive_another_data_set():
    assert merge(WEIGHTED, FOLDER) == {"split": "train", **FOLDER["params"]}
    assert (
        merge(WEIGHTED, {"target": "ldm.data.factors.shapes3d.Shapes3D"}) == WEIGHTED["params"]
    )  # the same attributes
    other = {"target": FOLDER["target"], "params": {"path": "y", "attributes": "table.csv"}}
    assert merge(FOLDER, other) == other["params"]
    assert merge(FOLDER, {"params": {"path": "y"}}) == {**FOLDER["params"], "path": "y"}  # the same images, moved
    assert merge(FOLDER, FOLDER) == FOLDER["params"]


def load(tmp_path, *contents):
    files = [tmp_path / f"{number}.yaml" for number in range(len(contents))]
    for file, content in zip(files, contents):
        OmegaConf.save(OmegaConf.create({"data": {"params": content}}), file)
    return load_config(files).content["data"]["params"]


def test_no_section_remains_another_data_sets(tmp_path):
    """A file that names the training data alone."""
    folder = {**FOLDER, "params": {"path": "x", "do_augment": True, "split": None, "holdout": 0.2}}
    before = {"train": WORLD, "validation": WEIGHTED, "test": {**WORLD, "params": {"size": 64}}}
    before["predict"] = {"target": "stand_ins.World64"}
    params = load(tmp_path, before, {"train": folder})
    assert params["validation"] == {
        "target": folder["target"],
        "params": {"path": "x", "split": "train", "holdout": 0.2},
    }
    assert params["test"] == {"target": folder["target"], "params": {"path": "x", "holdout": 0.2}}
    assert params["predict"] == before["predict"]  # was another data set before
    before["validation"] = {"target": WORLD["target"]}
    assert load(tmp_path, before, {"train": folder})["validation"]["params"]["split"] == "validation"


def test_named_sections_stay_as_the_file_describes_them(tmp_path):
    before = dict.fromkeys(("train", "validation", "test"), WORLD)
    other = {"target": "stand_ins.World64"}
    assert load(tmp_path, before, {"train": FOLDER, "validation": None, "test": other})["validation"] is None
    params = load(tmp_path, before, {"test": FOLDER})  # only the test data are replaced
    assert params["train"] == params["validation"] == WORLD
    assert load(tmp_path, before, {"train": {"params": {"limit": 5}}})["validation"] == WORLD


@pytest.mark.parametrize("name", ["clip", "judge"])
def test_stages_of_the_quickstart_follow_or_precede_own_data(tmp_path, name):
    """The order of the files does not change the data, the words or the sizes."""
    colours = ("red", "blue") * 6
    for k, colour in enumerate(colours):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{k}.png")
    (tmp_path / "table.csv").write_text("\n".join(["path,hue", *(f"{k}.png,{c}" for k, c in enumerate(colours))]))
    images = {
        "target": FOLDER["target"],
        "params": {"path": str(tmp_path), "attributes": "table.csv", "image_size": 16},
    }
    mine = {"data": {"target": "ldm.data.module.DataModuleFromConfig", "params": {"train": images, "test": images}}}
    OmegaConf.save(OmegaConf.create(mine), tmp_path / "mine.yaml")
    stage, world = (f"configs/quickstart/{file}.yaml" for file in (name, "world"))
    mine = tmp_path / "mine.yaml"
    first, last, instead = (
        load_config(files).content for files in ([mine, stage], [stage, mine], [world, stage, mine])
    )
    assert first == last
    assert first["model"] == instead["model"]
    assert first["model"]["params"]["vocabulary"]["words"] == [["blue", "red"]]
    assert instead["data"]["params"]["validation"]["target"] == FOLDER["target"]
    assert "caption_weights" not in instead["data"]["params"]["train"]["params"]
