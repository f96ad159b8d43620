"""``scripts/edit_score.py`` computes the score of a run again, with the run's settings where none are given."""

import json

import pytest
import pytorch_lightning as pl
import torch
import yaml
from script_modules import load_script

from ldm.models.judge import AttributeJudge

NAMES = ("", "-1", "-2")  # of the files of the first score and of the next ones

MODEL = """
import pytorch_lightning as pl
import torch


class Flat(pl.LightningModule):
    latent_unit, latent_shape = 6, (1, 2, 2)

    def __init__(self):
        super().__init__()
        self.level = torch.nn.Parameter(torch.tensor(0.0))

    def test_step(self, batch, batch_idx):
        return None

    def sample_edit(self, texts, x_T, sampler=None, guidance_scale=1.0, only=None):
        return self.level.expand(len(texts), 3, 32, 32)
"""


@pytest.fixture
def script():
    return load_script("edit_score")


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "flat_model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    from flat_model import Flat

    run = tmp_path / "logs" / "2024-01-01T00-00-00_flat"
    judge = AttributeJudge(space="shapes3d", channels=4, hidden=8)
    for folder, model in ((tmp_path / "judge", judge), (run, Flat())):
        (folder / "checkpoints").mkdir(parents=True)
        checkpoint = {
            "epoch": 4,
            "global_step": 700,
            "pytorch-lightning_version": pl.__version__,
            "state_dict": model.state_dict(),
            "hyper_parameters": dict(model.hparams),
        }
        torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    world = {"target": "ldm.data.world.World3D", "params": {"limit": 20}}
    callback = {
        "target": "ldm.evaluation.editing.callback.EditScore",
        "params": {"judge": str(tmp_path / "judge"), "num_samples": 3, "num_steps": 2},
    }
    config = {
        "model": {"target": "flat_model.Flat"},
        "data": {"target": "ldm.data.module.DataModuleFromConfig", "params": {"batch_size": 5, "test": world}},
        "lightning": {"callbacks": {"edit_score": callback}, "trainer": {"accelerator": "cpu"}},
    }
    (run / "configs").mkdir()
    (run / "configs" / "2024-01-01T00-00-00-project.yaml").write_text(yaml.safe_dump(config))
    return run


def test_scores_a_run_again_and_changes_no_other_file(run, script):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert script.main(["-r", str(run), "--num-samples", "5"]) == 0
    report = json.loads((run / "edit_score" / "700.json").read_text())
    assert report["num_samples"] == 5 and report["sampler"]["num_steps"] == 2
    assert report["step"] == 700 and report["epoch"] == 4
    assert report["edit_leakage"] == 0  # a flat model samples the same image for all texts
    assert all(path.read_bytes() == content for path, content in before.items())


def test_an_earlier_score_is_kept(run, script):
    for options in ([], ["--num-steps", "1"], ["--num-steps", "3"]):
        assert script.main(["-r", str(run), *options]) == 0
        kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        if not options:
            first = kept
    assert all(kept[path] == content for path, content in first.items())
    steps = [json.loads((run / "edit_score" / f"700{name}.json").read_text())["sampler"]["num_steps"] for name in NAMES]
    assert steps == [2, 1, 3]
    assert script.main(["-r", str(run), "--num-steps", "4", "--replace"]) == 0
    assert json.loads((run / "edit_score" / "700.json").read_text())["sampler"]["num_steps"] == 4
    assert len(list((run / "images" / "test").glob("edit_grid_*.png"))) == len(NAMES)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"name": "ddim", "num_steps": 2, "eta": 0.0}),
        (["--num-steps", "3", "--eta", "0.5"], {"name": "ddim", "num_steps": 3, "eta": 0.5}),
        (["--sampler", "dpm_solver"], {"name": "dpm_solver", "num_steps": 20}),
        (["--sampler", "ddim", "--num-steps", "4"], {"name": "ddim", "num_steps": 4, "eta": 0.0}),
    ],
)
def test_the_sampler_of_the_run_or_of_the_options(run, script, options, expected):
    assert script.main(["-r", str(run), *options]) == 0
    sampler = json.loads((run / "edit_score" / "700.json").read_text())["sampler"]
    assert {name: sampler[name] for name in expected} == expected


def test_settings_change_a_configured_sampler(script):
    configured = {"target": "ldm.diffusion.samplers.PLMSSampler", "params": {"num_steps": 9, "spacing": "quad"}}
    changed = script.changed_sampler(configured, None, {"num_steps": 5})
    assert changed["params"] == {"num_steps": 5, "spacing": "quad"}
    assert script.changed_sampler("plms", None, {"num_steps": 5}).num_steps == 5
    assert script.changed_sampler(configured, "ddpm", {}).num_steps is None


def test_errors_are_one_message(run, script, capsys):
    assert script.main(["-r", str(run), "--judge", str(run / "nothing")]) == 1
    assert "checkpoint of a factor judge" in capsys.readouterr().err
    assert script.main(["-r", str(run / "nothing")]) == 1


def test_several_guidance_scales_and_ordered_attributes(run, script):
    options = [
        "--guidance-scale",
        "1",
        "3",
        "--num-guidance-samples",
        "2",
        "--ordered",
        "scale=tiny,small,medium,large",
    ]
    assert script.main(["-r", str(run), *options]) == 0
    report = json.loads((run / "edit_score" / "700.json").read_text())
    assert [point["guidance_scale"] for point in report["sampler"]["guidance_curve"]] == [1, 3]
    assert "edit_neighbour_errors_scale" in report
    assert script.main(["-r", str(run), "--guidance-scale", "1.5", "--replace"]) == 0
    report = json.loads((run / "edit_score" / "700.json").read_text())
    assert report["sampler"]["guidance_scale"] == 1.5 and "guidance_curve" not in report["sampler"]
