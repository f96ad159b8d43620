"""Every config that ships trains, and a run that was cut off goes on as if it had not been."""

import csv
from pathlib import Path

import pytest
import torch

from ldm.models.clip import WorldCLIP
from ldm.training.cli import Options
from ldm.training.plan import make_plan
from ldm.training.recipe import load_recipe
from ldm.training.run import build, run

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart"
SHORT = [
    "lightning.trainer.max_steps=2",
    "lightning.trainer.limit_val_batches=1",
    "lightning.trainer.limit_test_batches=1",
    "lightning.trainer.log_every_n_steps=1",
    "lightning.callbacks.image_logger=null",
    "data.params.batch_size=2",
    "data.params.eval_batch_size=2",
    "data.params.num_workers=0",
]
NO_FIRST_STAGE = "model.params.first_stage_config.params.ckpt_path=null"
NO_BASE = "model.params.unet_config.params.ckpt_path=null"
CONFIGS = {
    "quickstart/clip": [],
    "quickstart/judge": [],
    "quickstart/vq": ["lightning.trainer.val_check_interval=1"],
    "quickstart/ldm": [NO_FIRST_STAGE, "lightning.trainer.val_check_interval=1"],
    "quickstart/clip_disdiff": [NO_FIRST_STAGE, NO_BASE, "CLIP", "lightning.callbacks.edit_score=null"],
    "autoencoder/example_vq_4_16": ["lightning.trainer.accumulate_grad_batches=1"],
    "latent-diffusion/example_vq_4_16": [NO_FIRST_STAGE],
    "latent-diffusion/example_vq_4_16_clip-dis": [NO_FIRST_STAGE, NO_BASE, "CLIP"],
}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """An untrained CLIP of the size the quickstart trains."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip") / "clip"
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    WorldCLIP(embed_dim=64, vision_cfg=vision, text_cfg={"width": 32, "heads": 2, "layers": 1}).save_folder(folder)
    return folder


def overrides_of(name, clip_folder):
    """What a config needs where no earlier stage was trained."""
    stage = "model.params.cond_stage_config"
    clip = [f"{stage}.text_encoder.params.version={clip_folder}", f"{stage}.image_encoder.params.model={clip_folder}"]
    return [word for entry in CONFIGS[name] for word in (clip if entry == "CLIP" else [entry])]


def options_of(name, clip_folder, logdir, extra=(), **changes):
    """A ``main.py`` command on a shipped config, shortened."""
    overrides = [*SHORT, *overrides_of(name, clip_folder), *extra]
    base = [str(ROOT / "configs" / f"{name}.yaml")]
    if name in ("quickstart/ldm", "quickstart/clip_disdiff"):
        base.insert(0, str(QUICKSTART / "latents.yaml"))
    if name.startswith("quickstart"):
        base.insert(0, str(QUICKSTART / "world.yaml"))
    return Options(base=tuple(base), overrides=tuple(overrides), name="x", logdir=str(logdir), train=True, **changes)


def test_every_shipped_config_is_listed():
    shipped = {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in ROOT.glob("configs/*/*.yaml")}
    parts = {"quickstart/world", "quickstart/latents", "quickstart/recipe", "quickstart/recipe_gpu"}
    assert shipped - parts == set(CONFIGS)


@pytest.mark.parametrize("recipe", ["recipe", "recipe_gpu"])
def test_recipes_are_valid_and_their_models_can_be_built(recipe, clip_folder):
    """Stages that need an earlier one get none; what their sizes say must still fit together."""
    stages = load_recipe(Options(recipe=str(QUICKSTART / f"{recipe}.yaml"))).stages
    assert [stage.name for stage in stages] == ["clip", "judge", "vq", "ldm", "clip_disdiff"]
    for stage in stages:
        base = tuple(str(ROOT / path) for path in stage.base)
        missing = overrides_of(f"quickstart/{stage.name}", clip_folder)
        plan = make_plan(Options(base=base, overrides=(*stage.overrides, *missing), name="x", train=True))
        assert sum(p.numel() for p in build(plan.config, "model").parameters()) > 1000


@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps(name, clip_folder, tmp_path):
    folder = run(make_plan(options_of(name, clip_folder, tmp_path)))
    state = torch.load(folder.last, weights_only=True)
    assert state["global_step"] >= 2
    assert not any(key.startswith("cond_stage_model") for key in state["state_dict"])
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values() if value.is_floating_point())


def losses_of(folder):
    with open(next(folder.path.glob("testtube/*/metrics.csv")), newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("train/loss")]
    return {int(row["step"]): row["train/loss"] for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("quickstart")])
def test_resumed_equals_uninterrupted(name, clip_folder, tmp_path):
    """Six steps at once, and three steps and three more after a resume, in the midst of an epoch."""

    six = [
        "lightning.trainer.max_steps=6",
        "lightning.trainer.limit_val_batches=0",
        "lightning.modelcheckpoint.params.every_n_train_steps=1",
    ]
    stop = ["lightning.callbacks.stop.target=stand_ins.StopAt", "lightning.callbacks.stop.params.step=3"]
    whole = run(make_plan(options_of(name, clip_folder, tmp_path / "whole", six, no_test=True)))
    first = run(make_plan(options_of(name, clip_folder, tmp_path / "parts", [*six, *stop], no_test=True)))
    assert len(losses_of(first)) == 3
    overrides = ("lightning.callbacks.stop=null",)
    resumed = run(make_plan(Options(resume=str(first.path), overrides=overrides, train=True, no_test=True)))
    assert losses_of(resumed) == losses_of(whole)
    assert len(losses_of(whole)) == 6
    expected, found = (torch.load(folder.last, weights_only=True)["state_dict"] for folder in (whole, resumed))
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
