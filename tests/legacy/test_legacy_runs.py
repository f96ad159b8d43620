"""Files that users of the references own, through the front doors: trained on, continued, sampled."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import legacy_configs
import numpy as np
import pytest
import torch
from golden_recipe import fill
from legacy_configs import LIGHTNING, MODELS, data, save_clip, with_clip
from omegaconf import OmegaConf
from script_modules import load_script
from torch import Tensor

import main as front_door
from ldm.data.formats.text_writers import write_text_lmdb
from ldm.util import instantiate_from_config

pytest.importorskip("lmdb")
OF_DISDIFF = ("shift_coef", "ddim_coef")
SCALE = 0.8


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    """Four pictures with three attributes each."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "db"
    pictures = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(4)]
    write_text_lmdb(path, [(picture, ["red floor", "blue wall", ""]) for picture in pictures], resolution=128)
    return path


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    """State dict of a latent-diffusion model in that repository's layout, filled by the recipe of the golden figures.

    The averaged weights are twice the raw ones, so that it shows which were taken.
    """
    torch.manual_seed(0)
    model = instantiate_from_config(MODELS["ldm"])
    fill(model.model.diffusion_model)
    fill(model.first_stage_model)
    for name, weight in model.model.named_parameters():
        getattr(model.model_ema, name.replace(".", "")).copy_(2 * weight.detach())
    model.scale_factor.fill_(SCALE)
    return {key: value.clone() for key, value in model.state_dict().items() if key not in OF_DISDIFF}


@pytest.fixture(scope="module")
def checkpoint(reference, tmp_path_factory) -> Path:
    """The state as a file of Lightning's making."""
    path = tmp_path_factory.mktemp("stage2") / "last.ckpt"
    content = {"epoch": 3, "global_step": 40, "pytorch-lightning_version": "1.4.2", "state_dict": reference}
    torch.save({**content, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}, path)
    return path


def train(tmp_path: Path, model: dict[str, Any], database: Path, words: str = "", **sections: Any) -> tuple[Path, dict]:
    """Two steps of ``main.py``; the run's folder and its checkpoint."""
    content = {"model": model, "data": data(path=str(database)), "lightning": LIGHTNING, **sections}
    OmegaConf.save(OmegaConf.create(copy.deepcopy(content)), tmp_path / "old.yaml")
    flags = f"-t --gpus 0, -s 0 -n run -l {tmp_path}/logs --max_steps 2 {words}".split()
    assert front_door.main(["-b", str(tmp_path / "old.yaml"), *flags]) == 0
    run = next((tmp_path / "logs").iterdir())
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values() if value.is_floating_point())
    return run, saved["state_dict"]


def sample(run: Path, *words: str) -> None:
    """Two samples of a run by the sampling script."""
    flags = ["-r", str(run), "-n", "2", "-c", "2", "--batch_size", "2", *words]
    assert load_script("sample_diffusion").main(flags) == 0
    assert list(run.glob("samples/last/*/*.png"))


def with_first_stage(params: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    params = copy.deepcopy(params)
    params.setdefault("first_stage_config", copy.deepcopy(legacy_configs.VQ))["params"]["ckpt_path"] = str(checkpoint)
    return params


def test_legacy_latent_diffusion_trains_on_and_samples(tmp_path, database, checkpoint, reference):
    model = legacy_configs.model(ckpt_path=str(checkpoint))
    run, state = train(tmp_path, model, database, "--no-test")
    assert state["scale_factor"].item() == pytest.approx(SCALE)
    name = "model.diffusion_model.out.2.bias"
    assert 0 < (state[name] - reference[name]).abs().max() < 1e-4  # two small steps away
    assert torch.equal(state["first_stage_model.quant_conv.weight"], reference["first_stage_model.quant_conv.weight"])
    sample(run)


def test_legacy_disdiff_trains_on_a_reference_checkpoint_and_samples(tmp_path, database, checkpoint, reference):
    params = with_first_stage(legacy_configs.DISDIFF, checkpoint)
    params["unet_config"]["params"]["ckpt_path"] = str(checkpoint)
    pictures = copy.deepcopy(LIGHTNING)
    pictures["callbacks"]["image_logger"]["params"]["batch_frequency"] = 2
    pictures["callbacks"]["image_logger"]["params"]["log_images_kwargs"].update(ddim_steps=2, N=2)
    run, state = train(tmp_path, legacy_configs.model(**params), database, "-dt Z -dw 0.05", lightning=pictures)
    assert state["scale_factor"].item() == pytest.approx(SCALE)
    assert list(run.glob("images/train/samples_swapping_gs-000002_*.png"))
    assert list(run.glob("images/train/predXstart*_gs-000002_*.png"))
    name = "out.2.bias"
    assert torch.equal(state[f"model.diffusion_model.{name}"], 2 * reference[f"model.diffusion_model.{name}"])
    with np.load(next(run.glob("dis_repre/*.npz"))) as file:
        assert file["latents"].shape == (4, 3, 4) and file["num_samples"] == 2
    sample(run)
    sample(run, "--swap")


def test_legacy_clip_disdiff_trains_on_a_reference_checkpoint_and_samples(tmp_path, database, checkpoint):
    params = with_first_stage(legacy_configs.CLIP, checkpoint)
    params["unet_config"]["params"]["ckpt_path"] = str(checkpoint)
    model = with_clip(legacy_configs.model(**params), save_clip(tmp_path / "clip"), 64)
    images = data("ldm.data.dis.CustomDatasetTrainCLIP", path=str(database))
    run, state = train(tmp_path, model, database, data=images)
    assert not any(key.startswith("cond_stage_model") for key in state)
    with np.load(next(run.glob("dis_repre/*.npz"))) as file:
        assert file["latents"].shape == (4, 3, 64)
    sample(run)


def test_legacy_encdiff_trains_and_samples(tmp_path, database, checkpoint):
    params = with_first_stage({**legacy_configs.ENCDIFF, "eval_name": None}, checkpoint)
    callbacks = {
        "image_logger": {
            "target": "main_val.ImageLogger",
            "params": {
                "batch_frequency": 2,
                "max_images": 2,
                "increase_log_steps": False,
                "log_config": {"target": "ldm.tools.Record", "params": {"plot_image": True, "every_step_num": 1}},
                "log_images_kwargs": {
                    "inpaint": False,
                    "sample_swap": True,
                    "plot_progressive_rows": False,
                    "ddim_steps": 2,
                },
            },
        }
    }
    model = legacy_configs.model("ldm.models.diffusion.ddpm_enc.LatentDiffusion", **params)
    run, _ = train(tmp_path, model, database, "--token_num 3", lightning={"callbacks": callbacks})
    assert run.name.endswith("_TK3_run")
    assert list(run.glob("images/train/samples_swapping_gs-000002_*.png"))
    header, *rows = (run / "record.csv").read_text().splitlines()
    assert header.startswith("step,train/") and [row.split(",")[0] for row in rows] == ["1", "2"]
    sample(run)


def test_legacy_autoencoder_trains(tmp_path, database):
    model = copy.deepcopy(MODELS["vq"])
    model["params"]["lossconfig"]["params"].update(perceptual_weight=0.0, disc_ndf=8, disc_num_layers=1)
    _, state = train(tmp_path, model, database, "lightning.trainer.accumulate_grad_batches=1")
    assert any(key.startswith("loss.discriminator.main.0") for key in state)


def test_legacy_run_of_lightning_1_goes_on(tmp_path, database, checkpoint, reference):
    old = tmp_path / "2022-01-01T00-00-00_celebahq"
    (old / "configs").mkdir(parents=True)
    (old / "checkpoints").mkdir()
    (old / "checkpoints" / "last.ckpt").write_bytes(checkpoint.read_bytes())
    project = {"model": MODELS["ldm"], "data": data(path=str(database)), "lightning": LIGHTNING}
    OmegaConf.save(OmegaConf.create(copy.deepcopy(project)), old / "configs" / "2022-01-01T00-00-00-project.yaml")
    assert front_door.main(["-r", str(old), "-t", "--max_steps", "42", "--no-test"]) == 0
    saved = torch.load(old / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 42
    name = "model.diffusion_model.out.2.bias"
    assert 0 < (saved["state_dict"][name] - reference[name]).abs().max() < 1e-3


def test_legacy_autoencoder_of_lightning_1_goes_on(tmp_path, database):
    """With its adversarial loss, whose start is told in steps of the run."""
    config = copy.deepcopy(MODELS["vq"])
    config["params"]["lossconfig"]["params"].update(perceptual_weight=0.0, disc_ndf=8, disc_num_layers=1)
    model = instantiate_from_config(config)
    old = tmp_path / "2022-01-01T00-00-00_vq"
    for folder in ("configs", "checkpoints", "testtube/version_0"):
        (old / folder).mkdir(parents=True)
    (old / "testtube" / "version_0" / "metrics.csv").write_text("step,train/loss\n38,0.5\n39,0.4\n")
    optimizers = [optimizer.state_dict() for optimizer in model.configure_optimizers()[0]]
    content = {
        "epoch": 20,
        "global_step": 40,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {},
        "state_dict": model.state_dict(),
        "optimizer_states": optimizers,
        "lr_schedulers": [],
    }
    torch.save(content, old / "checkpoints" / "last.ckpt")
    lightning = copy.deepcopy(LIGHTNING)
    lightning["trainer"]["log_every_n_steps"] = 1
    lightning["callbacks"]["image_logger"]["params"]["batch_frequency"] = 2
    project = {"model": config, "data": data(path=str(database)), "lightning": lightning}
    OmegaConf.save(OmegaConf.create(copy.deepcopy(project)), old / "configs" / "2022-01-01T00-00-00-project.yaml")
    assert front_door.main(["-r", str(old), "-t", "--max_steps", "42", "--no-test"]) == 0
    saved = torch.load(old / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 42
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 42
    rows = (old / "testtube" / "version_0" / "metrics.csv").read_text().splitlines()[1:]
    assert [row for row in rows if "0.5" in row.split(",")] and len(rows) >= 4
    assert list(old.glob("images/train/reconstructions_gs-000042_*.png"))


def test_legacy_published_weights_are_no_run_to_be_continued(tmp_path, database, reference, capsys):
    run = tmp_path / "run"
    (run / "configs").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    torch.save({"state_dict": reference, "global_step": 7}, run / "checkpoints" / "model.ckpt")
    project = {"model": MODELS["ldm"], "data": data(path=str(database)), "lightning": LIGHTNING}
    OmegaConf.save(OmegaConf.create(copy.deepcopy(project)), run / "configs" / "a-project.yaml")
    assert front_door.main(["-r", str(run / "checkpoints" / "model.ckpt"), "-t", "--no-test"]) == 1
    assert "contains weights only; cannot resume training from it" in capsys.readouterr().err


def test_legacy_bare_weights_are_sampled_with_their_config(tmp_path, database, reference):
    torch.save(reference, tmp_path / "model.ckpt")
    OmegaConf.save(OmegaConf.create(copy.deepcopy({"model": MODELS["ldm"]})), tmp_path / "config.yaml")
    flags = ["-r", str(tmp_path / "model.ckpt"), "-b", str(tmp_path / "config.yaml"), "-n", "2", "-c", "2"]
    assert load_script("sample_diffusion").main([*flags, "-l", str(tmp_path / "out")]) == 0
    assert list((tmp_path / "out").glob("samples/model/*/*.png"))


def test_legacy_a_wrong_checkpoint_leaves_nothing_behind(tmp_path, database, checkpoint, capsys):
    model = legacy_configs.model(ckpt_path=str(checkpoint), unet_config=legacy_configs.network(model_channels=64))
    OmegaConf.save(OmegaConf.create({"model": model, "data": data(path=str(database))}), tmp_path / "old.yaml")
    assert front_door.main(["-b", str(tmp_path / "old.yaml"), "-t", "-l", str(tmp_path / "logs")]) == 1
    assert "expected (256, 64), got (128, 32)" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()
