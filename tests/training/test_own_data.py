"""A user's own images through a recipe: derived settings, errors, and all stages with a few steps."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageDraw
from script_modules import load_script

import main as front_door
from ldm.data.check import check_dataset
from ldm.data.formats.folder import ImageFolder
from ldm.training import recipe as recipe_module
from ldm.training.cli import parse_arguments
from ldm.training.own_data import read_own_data
from ldm.training.plan import make_plan
from ldm.training.recipe import by_attribute, load_recipe
from ldm.util import ConfigError, UserError

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configs" / "own_data"
SHAPES, COLOURS = ("disc", "square"), ("red", "green", "blue")


def draw(folder: Path, rows: list[tuple[str, str]]) -> None:
    """Draw a shape of a colour per row, of no particular size, and write their table."""
    (folder / "pictures").mkdir(parents=True)
    lines = ["image,shape,colour"]
    for k, (shape, colour) in enumerate(rows):
        picture = Image.new("RGB", (40, 44), (230, 230 - k % 20, 230))
        getattr(ImageDraw.Draw(picture), "ellipse" if shape == "disc" else "rectangle")((8, 8, 30, 30), fill=colour)
        picture.save(folder / "pictures" / f"{k:03d}.png")
        lines.append(f"{k:03d}.png,{shape},{colour}")
    (folder / "table.csv").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    draw(folder, list(itertools.product(SHAPES, COLOURS)) * 5)
    return folder


def write(images: Path, name: str = "mine.yaml", **options: object) -> Path:
    """Write a user's file beside the images; its paths are relative to it. None removes an option."""
    content = {"path": "pictures", "attributes": "table.csv", "image_size": 32} | options
    path = images / name
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def load(images: Path, *words: str, recipe: str = "recipe", **options: object):
    file = write(images, **options)
    command = ["--recipe", str(RECIPES / f"{recipe}.yaml"), f"data={file}", "-l", str(images / "logs"), *words]
    return load_recipe(parse_arguments(command))


def test_data_of_all_stages_are_in_one_file(images: Path) -> None:
    recipe = load(images, templates={"shape": "a {}"}, do_augment=True, unset_prob=0.1)
    assert [stage.name for stage in recipe.stages] == ["clip", "judge", "vq", "ldm", "clip_disdiff"]
    file = str(images / "logs" / "data.yaml")
    assert {stage.base[0] for stage in recipe.stages} == {file}
    sections = yaml.safe_load(Path(file).read_text())["data"]["params"]
    common = {"path": str(images / "pictures"), "attributes": str(images / "table.csv"), "image_size": 32}
    common["templates"] = {"shape": "a {}"}
    assert sections["validation"]["params"] == {**common, "split": "validation"}
    assert sections["test"]["params"] == {**common, "split": "evaluation"}
    training = {"split": "train", "do_augment": True, "unset_prob": 0.1, "repeat": 371}  # of 27 images
    assert sections["train"]["params"] == {**common, **training}
    assert recipe.score is not None and recipe.notes == ()


def test_paths_are_relative_to_the_working_directory_first(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)
    (tmp_path / "mine.yaml").write_text("path: pictures\nattributes: table.csv\nimage_size: 32\n")
    train = read_own_data(str(tmp_path / "mine.yaml")).sections["data"]["params"]["train"]["params"]
    assert (train["path"], train["attributes"]) == ("pictures", "table.csv")


@pytest.mark.parametrize(
    ("size", "chosen", "stage"), [(16, None, "pixels"), (32, None, "vq"), (32, "pixels", "pixels"), (16, "vq", "vq")]
)
def test_first_stage(images: Path, size: int, chosen: str | None, stage: str) -> None:
    recipe = load(images, image_size=size, first_stage=chosen)
    names = [part.name for part in recipe.stages]
    assert ("vq" in names) == (stage == "vq")
    assert recipe.stages[-1].base[1].endswith(f"first_stage_{stage}.yaml")
    assert recipe.figures == ({"psnr": None} if stage == "pixels" else {})


def test_overrides_of_stages(images: Path) -> None:
    """Those of the file follow those of the recipe, and precede those of the command line."""
    changes = {"lightning": {"trainer": {"max_steps": 5}}, "model": {"params": {"ckpt_path": None, "betas": [1, 2]}}}
    stage = load(images, "clip.lightning.trainer.max_steps=6", stages={"clip": changes}).stages[0]
    expected = ["lightning.trainer.max_steps=5", "model.params.betas=[1, 2]", "model.params.ckpt_path=null"]
    assert sorted(stage.overrides[:-1]) == expected
    assert stage.overrides[-1] == "lightning.trainer.max_steps=6"


SLIP = {"lightning": {"trainer": {"max_stepz": 5}}}


@pytest.mark.parametrize(
    ("stages", "words", "message"),
    [
        ({"clip": SLIP}, [], "mine.yaml: stages.clip.lightning.trainer.max_stepz: unknown key 'max_stepz'"),
        ({}, ["clip.lightning.trainer.max_step=1"], "^command line: clip.lightning.trainer.max_step: unknown key"),
        ({"clip": SLIP}, ["clip.lightning.trainer.max_stepz=1"], "^command line: clip.lightning.trainer.max_stepz: "),
    ],
)
def test_slips_in_overrides_name_stage_and_source(images: Path, stages: dict, words: list[str], message: str) -> None:
    recipe = load(images, *words, stages=stages)
    with pytest.raises(ConfigError, match=message):
        recipe_module._run_recipe(recipe, parse_arguments(["--recipe", "unused.yaml"]))


def test_columns_with_one_word_are_reported(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = (images / "table.csv").read_text().splitlines()
    added = ["thing", *["same"] * (len(lines) - 1)]
    (images / "same.csv").write_text("".join(f"{line},{word}\n" for line, word in zip(lines, added)))
    load(images, attributes="same.csv")
    assert "mine.yaml: thing is the same for all images" in caplog.text and caplog.text.count("the same for") == 1
    facts = dict(check_dataset(ImageFolder(images / "pictures", attributes=images / "same.csv"), is_quick=True).facts)
    assert facts["attribute thing"] == "same; the same for all images: remove the column"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_sze": 32}, r"mine.yaml: image_sze: unknown key 'image_sze'. Did you mean 'image_size'"),
        ({"split": "train"}, "unknown key 'split'"),
        ({"first_stage": "pixel"}, "mine.yaml: first_stage: expected vq or pixels, got 'pixel'. Did you mean 'pixels'"),
        ({"stages": {"clp": {"model": {"x": 1}}}}, r"mine.yaml: stages: expected a stage .* got 'clp'. Did you mean"),
        ({"stages": {"clip": ["model.x=1"]}}, r"mine.yaml: stages: expected changes .*max_steps"),
        ({"image_size": 36}, "mine.yaml: image_size: expected a multiple of 8, got 36"),
        ({"target": "torch.utils.data.TensorDatset"}, "mine.yaml: .*TensorDatset"),
        ({"target": "ldm.data.world.World3D"}, r"mine.yaml: (path|attributes): unknown key '(path|attributes)'"),
    ],
)
def test_slips_in_the_file(images: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(images, **options)


def test_files_that_are_missing(images: Path) -> None:
    with pytest.raises(UserError, match=r"mine.yaml: .*no_pictures: expected a folder of images"):
        load(images, path="no_pictures")
    with pytest.raises(UserError, match=r"mine.yaml: .*no_table.csv"):
        load(images, attributes="no_table.csv")
    with pytest.raises(UserError, match=r"config file .*nothing.yaml does not exist"):
        load_recipe(parse_arguments(["--recipe", str(RECIPES / "recipe.yaml"), "data=nothing.yaml"]))
    (images / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match=r"list.yaml: expected a mapping"):
        load_recipe(parse_arguments(["--recipe", str(RECIPES / "recipe.yaml"), f"data={images / 'list.yaml'}"]))


def test_a_recipe_needs_data_or_takes_none(images: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"recipe.yaml: data: expected the file of your images, got none. Run: .*data="
    ):
        load_recipe(parse_arguments(["--recipe", str(RECIPES / "recipe.yaml")]))
    with pytest.raises(ConfigError, match=r"data=.*mine.yaml: expected a recipe with the key data.* got .*quickstart"):
        quickstart = str(ROOT / "configs" / "quickstart" / "recipe.yaml")
        load_recipe(parse_arguments(["--recipe", quickstart, f"data={write(images)}"]))


def test_a_recipe_can_name_its_data(images: Path) -> None:
    (images / "named.yaml").write_text(f"base: {RECIPES / 'recipe.yaml'}\nname: mine\ndata: {write(images)}\n")
    recipe = load_recipe(parse_arguments(["--recipe", str(images / "named.yaml"), "-l", str(images / "logs")]))
    assert recipe.name == "mine" and recipe.stages[0].base[0].endswith("data.yaml")


def test_no_metrics_of_an_incomplete_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path, [*itertools.product(SHAPES, COLOURS), *itertools.product(SHAPES, COLOURS[:2])] * 2)
    recipe = load(tmp_path)
    assert recipe.score is None and "no disentanglement metrics" in recipe.notes[0]


def test_factor_sets_take_the_place_of_a_folder(images: Path) -> None:
    """Their images are augmented as those of a folder, and their options are checked before the first stage."""
    options = {"target": "ldm.data.world.World3D", "size": 32, "limit": 400, "holdout": 0.2}
    removed = dict.fromkeys(("path", "attributes", "image_size"))
    recipe = load(images, **removed, **options)
    for stage in recipe.stages:
        make_plan(replace(stage, train=False))
    params = make_plan(replace(recipe.stages[0], train=False)).data_params
    assert params["train"]["params"]["augment"] and "augment" not in params["test"]["params"]


def test_holdout_of_the_file_remains(images: Path) -> None:
    """In the quickstart, text_to_image.yaml holds out combinations of its own."""
    for holdout in (0.25, None):
        recipe = load(images, recipe="recipe_text_to_image", holdout=holdout)
        params = make_plan(replace(recipe.stages[-1], train=False)).data_params
        assert {params[name]["params"].get("holdout") for name in ("train", "validation", "test")} == {holdout}


@pytest.mark.parametrize("change", ["table", "picture", "new picture", "rewritten table"])
def test_stages_are_trained_again_for_other_files(tmp_path: Path, change: str) -> None:
    draw(tmp_path, list(itertools.product(SHAPES, COLOURS)) * 5)

    def fingerprints() -> list[str]:
        return [make_plan(replace(stage, train=False)).fingerprint for stage in load(tmp_path).stages]

    before, table, pictures = fingerprints(), tmp_path / "table.csv", tmp_path / "pictures"
    if change == "table":  # with the same words
        table.write_text(table.read_text().replace("001.png,disc,green", "001.png,disc,red"))
    elif change == "rewritten table":
        table.write_text(table.read_text())
    elif change == "picture":
        Image.new("RGB", (40, 44)).save(pictures / "000.png")
    else:
        shutil.copy(pictures / "000.png", pictures / "100.png")
        table.write_text(table.read_text() + "\n100.png,disc,red")
    changed = [one != other for one, other in zip(before, fingerprints(), strict=True)]
    assert changed == [change != "rewritten table"] * len(before)


@pytest.mark.parametrize("has_table", [False, True])
def test_methods_of_attributes_need_attributes(
    tmp_path: Path, has_table: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A column of free text has no words. The recipe is refused before the first stage is trained."""
    (tmp_path / "pictures").mkdir()
    lines = ["image,note"]
    for k in range(300):
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / f"{k:03d}.png")
        lines.append(f"{k:03d}.png,note {k} of its own")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    file = write(tmp_path, **({} if has_table else {"attributes": None}))
    words = ["--recipe", str(RECIPES / "recipe.yaml"), f"data={file}", "-l", str(tmp_path / "logs")]
    assert front_door.main(words) == 1
    assert "attributes" in capsys.readouterr().err
    assert not list((tmp_path / "logs").glob("*_clip"))
    recipe = load_recipe(parse_arguments([words[0], str(RECIPES / "recipe_encdiff.yaml"), *words[2:]]))
    assert [stage.name for stage in recipe.stages] == ["vq", "encdiff"] and recipe.score is None


def test_figures_by_attribute() -> None:
    figures = {"a": 0.5, "a_hue": 0.4, "a_hue_seen": 0.9, "a_seen": 0.8, "b_value": 1, "path": "x", "a_size_big": 0.1}
    assert by_attribute(figures) == [
        ("a", 0.5, {"hue": 0.4, "size_big": 0.1}),
        ("a_seen", 0.8, {"hue": 0.9}),
        ("b_value", 1, {}),
    ]


SHORT = {
    "trainer": {"max_steps": 2, "limit_val_batches": 1, "val_check_interval": 1},
    "callbacks": {"image_logger": None},
}
UNET = {"params": {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 1]}}
EDITS = {"num_samples": 4, "columns": 2, "sampler": {"params": {"num_steps": 2}}}
STAGES = {
    "clip": {"model": {"params": {"vision_cfg": {"width": 32, "layers": 1}}}},
    "judge": {"model": {"params": {"channels": 4, "hidden": 16}}},
    "vq": {"model": {"params": {"n_embed": 64, "lossconfig": {"params": {"n_classes": 64}}}}},
    "ldm": {"model": {"params": {"unet_config": UNET}}},
    "clip_disdiff": {"model": {"params": {"unet_config": UNET}}},
}


def short(**first_stage: object) -> dict:
    """Changes to all stages: two steps, small networks."""
    stages = {name: {**changes, "lightning": SHORT} for name, changes in STAGES.items()}
    stages["clip_disdiff"]["lightning"] = {
        **SHORT,
        "callbacks": {"image_logger": None, "edit_score": {"params": EDITS}},
    }
    for name in ("ldm", "clip_disdiff"):
        params = stages[name]["model"]["params"]
        stages[name]["model"] = {"params": {**params, **first_stage}}
    return stages


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run the stages' commands in this process, from the root of the repository; scoring is left out."""
    calls: list[list[str]] = []

    def call(command: list[str], task: str, again: str) -> None:
        calls.append(command[1:])
        if command[1].endswith("main.py"):
            assert front_door.main(command[2:]) == 0, task

    monkeypatch.setattr(recipe_module, "_call", call)
    monkeypatch.chdir(ROOT)
    return calls


@pytest.mark.parametrize("first_stage", ["vq", pytest.param("pixels", marks=pytest.mark.slow)])
def test_all_stages_train(images: Path, tmp_path: Path, in_process: list, first_stage: str) -> None:
    smaller = {"first_stage_config": {"params": {"n_embed": 64}}} if first_stage == "vq" else {}
    stages = short(**smaller)
    if first_stage == "pixels":
        del stages["vq"]
    file = write(images, f"{first_stage}.yaml", first_stage=first_stage, stages=stages)
    assert front_door.main(["--recipe", "configs/own_data/recipe.yaml", f"data={file}", "-l", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "own_data_results.json").read_text())
    names = {"psnr", "clip_accuracy", "judge_accuracy", "edit_accuracy", "edit_leakage", "clip_accuracy_shape"}
    assert names <= set(results)
    assert (results["psnr"] is None) == (first_stage == "pixels")
    assert set(results["seconds"]) == {*stages, "score", "total"}
    assert in_process[-1][0].endswith("run_para_metrics.py")
    count = len(in_process)
    assert all(str(tmp_path / "data.yaml") in command for command in in_process[:-1])
    assert front_door.main(["--recipe", "configs/own_data/recipe.yaml", f"data={file}", "-l", str(tmp_path)]) == 0
    assert len(in_process) == count + 1  # scoring; no stage is trained twice
    again = ["main.py" if word.endswith("main.py") else word for word in in_process[0]]  # as printed
    assert front_door.main([*again[1:], "-n", "by_hand"]) == 0


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in RECIPES.glob("recipe*.yaml")} == {"recipe", *OTHERS}


NO_STEPS = {"sampler": {"params": {"num_steps": 2}}}
BENCH = {"direction_bench": {"params": {**NO_STEPS, "num_samples": 4, "num_images": 8, "columns": 2}}}
PROMPTS = {"prompt_score": {"params": {**NO_STEPS, "rows": 1}}}
OTHERS = {
    "recipe_text_attention": {"text_attention": {}},
    "recipe_directions": {"text_attention": {}, "noiseclr": BENCH},
    "recipe_text_to_image": {"text_to_image": PROMPTS},
    "recipe_encdiff": {"encdiff": {}},
    "recipe_disdiff": {"ldm": {}, "disdiff": {}},
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OTHERS)
def test_other_methods_train(images: Path, tmp_path: Path, in_process: list, recipe: str) -> None:
    has_texts = recipe not in ("recipe_encdiff", "recipe_disdiff")
    stages = {name: changes for name, changes in short().items() if name in ("clip", "judge") and has_texts}
    for name, callbacks in OTHERS[recipe].items():
        stages[name] = {"lightning": {**SHORT, "callbacks": {"image_logger": None, **callbacks}}}
    if "noiseclr" in stages:
        stages["noiseclr"]["model"] = {"params": {"num_directions": 4, "directions_per_iteration": 2}}
    texts = {"templates": {"shape": "the shape is a {}"}} if has_texts else {"attributes": None}
    file = write(images, f"{recipe}.yaml", image_size=16, stages=stages, **texts)
    assert front_door.main(["--recipe", f"configs/own_data/{recipe}.yaml", f"data={file}", "-l", str(tmp_path)]) == 0
    results = json.loads(next(tmp_path.glob("*_results.json")).read_text())
    assert set(results["runs"]) == set(stages)


@pytest.mark.slow
def test_digits(tmp_path: Path, in_process: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real images of scikit-learn: 1,797 digits of 8 x 8 pixels as a folder; the attribute is the digit."""
    from sklearn.datasets import load_digits

    digits, lines = load_digits(), ["image,digit"]
    (tmp_path / "pictures").mkdir()
    for k, (pixels, digit) in enumerate(zip(digits.images, digits.target)):
        Image.fromarray((pixels * 15.9).astype("uint8")).save(tmp_path / "pictures" / f"{k}.png")
        lines.append(f"{k}.png,{digit}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    stages = short()
    del stages["vq"]
    stages["judge"] = {"lightning": {"trainer": {"max_steps": 150}, "callbacks": {"image_logger": None}}}
    stages["clip"] = {"lightning": {"trainer": {"max_steps": 150}, "callbacks": {"image_logger": None}}}
    file = write(tmp_path, image_size=16, templates={"digit": "the digit {}"}, stages=stages)
    command = ["--recipe", "configs/own_data/recipe.yaml", f"data={file}", "-l", str(tmp_path / "logs")]
    assert front_door.main(command) == 0
    results = json.loads((tmp_path / "logs" / "own_data_results.json").read_text())
    assert results["judge_accuracy"] > 0.8 and results["clip_accuracy"] > 0.3  # chance is 0.1
    assert 0 <= results["edit_accuracy"] <= 1 and results["notes"] and os.listdir(tmp_path / "logs")


def test_the_file_of_a_recipe_is_checked_as_a_data_set(images: Path, capsys: pytest.CaptureFixture) -> None:
    tool = load_script("dataset")
    assert tool.main(["check", str(write(images))]) == 0
    assert "attribute colour:" in capsys.readouterr().out
    assert tool.main(["check", str(write(images, attributes="absent.csv"))]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "absent.csv: expected a UTF-8 file, got no such file. Correct the path." in message
