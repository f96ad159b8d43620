"""Stages one after the other: trained once, skipped when done, redone when changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import main as front_door
from ldm.training import recipe as recipe_module
from ldm.training.cli import parse_arguments
from ldm.training.recipe import load_recipe, newest_pictures
from ldm.util import ConfigError, Interrupted, UserError

FIRST = """
model: {base_learning_rate: 0.01, target: tiny_training.TinyModel}
data:
  target: main.DataModuleFromConfig
  params: {batch_size: 4, num_workers: 0, train: {target: tiny_training.TinyDataset}}
lightning:
  logger: csv
  trainer: {max_epochs: 1, accelerator: cpu}
  callbacks: {image_logger: null, representation_writer: null}
"""
SECOND = "model: {params: {ckpt_path: '${last_ckpt:first}'}}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "first.yaml").write_text(FIRST)
    (tmp_path / "second.yaml").write_text(SECOND)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: tiny\nlogdir: {tmp_path}/logs\nseed: 3\nscore: null\nstages:\n"
        f"  - {{name: first, base: [{tmp_path}/first.yaml]}}\n"
        f"  - {{name: second, base: [{tmp_path}/first.yaml, {tmp_path}/second.yaml],\n"
        "     overrides: [model.params.width=3]}\n"
    )
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run the stages' commands in this process, and count them."""
    made: list[list[str]] = []

    def call(command: list[str], what: str, again: str) -> None:
        made.append(command[2:])
        code = front_door.main(command[2:])
        if code == 130:
            raise Interrupted(2)
        if code:
            raise UserError(f"{what} failed: {again}")

    monkeypatch.setattr(recipe_module, "_call", call)
    return made


def results(recipe: Path) -> dict:
    return json.loads((recipe.parent / "logs" / "tiny_results.json").read_text())


def test_stages_run_once_and_again_when_they_change(recipe: Path, calls: list[list[str]]) -> None:
    assert front_door.main(["--recipe", str(recipe)]) == 0
    assert len(calls) == 2
    first = results(recipe)
    assert set(first["seconds"]) == {"first", "second", "total"}
    assert (first["recipe"], first["seed"]) == ("tiny", 3)
    config = next((Path(first["runs"]["second"]) / "configs").glob("*-project.yaml")).read_text()
    assert f"{first['runs']['first']}/checkpoints/last.ckpt" in config

    assert front_door.main(["--recipe", str(recipe)]) == 0
    assert len(calls) == 2

    assert front_door.main(["--recipe", str(recipe), "second.model.base_learning_rate=0.5"]) == 0
    assert len(calls) == 3
    assert results(recipe)["runs"]["first"] == first["runs"]["first"]
    assert results(recipe)["runs"]["second"] != first["runs"]["second"]

    assert front_door.main(["--recipe", str(recipe), "-s", "4"]) == 0
    assert len(calls) == 5


def test_a_stopped_stage_is_continued(recipe: Path, calls: list[list[str]]) -> None:
    stop = recipe.parent / "first.yaml"
    stop.write_text(FIRST.replace("TinyModel}", "TinyModel, params: {signal_step: 3}}"))
    assert front_door.main(["--recipe", str(recipe)]) == 130
    # The same command: the step that stopped is not computed again by the same process, so let it pass.
    import tiny_training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_training.os, "kill", lambda *_: None)
        assert front_door.main(["--recipe", str(recipe)]) == 0
    assert [words[0] for words in calls] == ["-t", "-r", "-t"]
    assert calls[1][1] == results(recipe)["runs"]["first"]


def test_a_failing_stage_says_how_to_go_on(
    recipe: Path, calls: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert front_door.main(["--recipe", str(recipe), "first.model.params.broken_step=2"]) == 1
    assert len(calls) == 1
    assert f"stage first failed: python main.py --recipe {recipe}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stages:", "stage:", "'stages'"),
        ("name: tiny", "nam: tiny", "'name'"),
        ("{name: first, base", "{name: first, bas", "'base'"),
        ("score: null", "score: {process: 2}", "'processes'"),
    ],
)
def test_slips_in_a_recipe(recipe: Path, old: str, new: str, message: str) -> None:
    recipe.write_text(recipe.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_recipe(parse_arguments(["--recipe", str(recipe)]))


def test_all_stages_are_checked_before_the_first_one_runs(
    recipe: Path, calls: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert front_door.main(["--recipe", str(recipe), "second.lightning.trainer.max_epoch=1"]) == 1
    assert calls == []
    assert "'max_epochs'" in capsys.readouterr().err


def test_an_override_for_no_stage(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="got 'firts'.*'first'"):
        load_recipe(parse_arguments(["--recipe", str(recipe), "firts.model.params.x=1"]))


def test_only_the_newest_of_each_picture(tmp_path: Path) -> None:
    for name in (
        "images/val/x_gs-000001_e-0_b-0.png",
        "images/val/x_gs-000009_e-0_b-0.png",
        "report.png",
        "losses.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = [path.name for path in newest_pictures(tmp_path)]
    assert names == ["losses.png", "report.png", "x_gs-000009_e-0_b-0.png"]
