"""The CLIP-guided DDPM: published checkpoints, a run, and a resumed one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from clip_guided_models import NETWORK, SEED_OPTIONS, SIZE, TARGET, WIDTH, batch_of, build, towers_of, unet
from legacy_configs import save_clip
from omegaconf import OmegaConf
from script_modules import load_script
from torch.utils.data import DataLoader

import main as front_door
from ldm.diffusion.samplers import DDIMSampler
from ldm.modules.diffusionmodules.clip_guided import UNet
from ldm.runs.checkpoint_io import AtomicCheckpointIO
from ldm.runs.load import load_run

# Checkpoints ---------------------------------------------------------------------------------------------------------


def published(path, arch, steps=2):
    """Train the network alone with Adam, and write the reference's file."""
    torch.manual_seed(1)
    network = UNet(**NETWORK, arch=arch)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(2, 3, SIZE, SIZE)
        (network(x, torch.tensor([1, 5]), torch.randn(2, WIDTH)) - x).square().mean().backward()
        optimizer.step()
    content = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 9, "loss_history": [0.1]}
    torch.save(content, path)
    return network, optimizer


@pytest.mark.parametrize("arch", ["package", "dli"])
@pytest.mark.parametrize("use_ema", [False, True])
def test_published_checkpoints_load_and_sample(arch, use_ema, tmp_path):
    network, _ = published(tmp_path / "9.pth", arch)
    model = build(arch, ckpt_path=str(tmp_path / "9.pth"), use_ema=use_ema).eval()
    x, cond, t = torch.randn(2, 3, SIZE, SIZE), torch.randn(2, WIDTH), torch.tensor([3, 4])
    with torch.no_grad(), model.ema_scope():
        assert torch.equal(model.apply_model(x, t, cond), network(x, t, cond))
    params = {**SEED_OPTIONS, "unet_config": unet(arch), "use_ema": use_ema}
    OmegaConf.save(OmegaConf.create({"model": {"target": TARGET, "params": params}}), tmp_path / "c.yaml")
    loaded = load_run(str(tmp_path / "9.pth"), [str(tmp_path / "c.yaml")])
    assert loaded.num_steps == 2
    with torch.no_grad():
        assert torch.equal(loaded.model.apply_model(x, t, cond), network(x, t, cond))


@pytest.mark.parametrize("use_ema", [False, True])
def test_published_checkpoints_continue(use_ema, tmp_path):
    network, optimizer = published(tmp_path / "9.pth", "package")
    model = build(use_ema=use_ema)
    rows = [{key: value[row] for key, value in batch_of().items()} for row in range(4)]
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    seen: dict[str, Any] = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen["state"] = [copy.deepcopy(state) for state in trainer.optimizers[0].state.values()]
            seen["epoch"], seen["step"] = trainer.current_epoch, trainer.global_step
            seen["weights"] = {k: v.clone() for k, v in pl_module.model.diffusion_model.state_dict().items()}
            if use_ema:
                seen["average"] = [v.clone() for v in pl_module.model_ema.state_dict().values() if v.ndim]

    trainer = pl.Trainer(max_epochs=11, callbacks=[Look()], plugins=[AtomicCheckpointIO()], **options)
    trainer.fit(model, DataLoader(rows, batch_size=2), ckpt_path=str(tmp_path / "9.pth"))
    assert (seen["epoch"], seen["step"]) == (10, 2) and trainer.global_step == 4
    assert all(torch.equal(value, seen["weights"][key]) for key, value in network.state_dict().items())
    for found, expected in zip(seen["state"], optimizer.state.values(), strict=True):
        assert torch.equal(found["exp_avg"], expected["exp_avg"])
    if use_ema:
        assert all(torch.equal(a, b) for a, b in zip(seen["average"], network.state_dict().values(), strict=True))


def test_optimizer_is_adam():
    optimizer = build().configure_optimizers()
    assert optimizer.param_groups[0]["weight_decay"] == 0
    assert build(weight_decay=0.01).configure_optimizers().param_groups[0]["weight_decay"] == 0.01


# A run ---------------------------------------------------------------------------------------------------------------


def test_a_run_estimates_the_gap_draws_pictures_and_is_sampled_from_texts(tmp_path):
    towers = towers_of(save_clip(tmp_path / "clip"))
    params = {**SEED_OPTIONS, "unet_config": unet(img_size=64), "image_size": 64, "cond_stage_config": towers}
    params |= {"use_ema": True, "cond_drop_prob": 0.1, "gap": {"kind": "mean", "num_images": 6}}
    images = {"target": "stand_ins.World64"}
    sampler = {"target": "ldm.diffusion.samplers.DDIMSampler", "params": {"num_steps": 2}}
    drawn = {"N": 2, "inpaint": False, "sampler": sampler, "unconditional_guidance_scale": 2.0}
    logger = {"batch_frequency": 1, "max_images": 2, "increase_log_steps": False, "log_images_kwargs": drawn}
    config = {
        "model": {"base_learning_rate": 1e-4, "target": TARGET, "params": params},
        "data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 2, "num_workers": 0, "train": images}},
        "lightning": {
            "callbacks": {"image_logger": {"target": "main.ImageLogger", "params": logger}},
            "trainer": {"accelerator": "cpu", "max_steps": 2, "log_every_n_steps": 1},
        },
    }
    OmegaConf.save(OmegaConf.create(config), tmp_path / "c.yaml")
    assert front_door.main(["-b", str(tmp_path / "c.yaml"), "-l", str(tmp_path / "logs")]) == 0
    assert front_door.main(["-b", str(tmp_path / "c.yaml"), "-t", "-l", str(tmp_path / "logs")]) == 0
    run = next((tmp_path / "logs").iterdir())
    names = {path.name.split("_gs")[0] for path in (run / "images").rglob("*.png")}
    assert {"inputs", "samples", "samples_cfg_scale_2.00"} <= names
    words = ["--text", "red floor", "--text", "", "--guidance", "2.5"]
    assert load_script("sample_diffusion").main(["-r", str(run), "-n", "2", "-c", "2", *words]) == 0
    assert list(run.glob("samples/last/*/*.png"))
    loaded = load_run(str(run)).model
    assert loaded.cond_stage_model.is_fitted and loaded.cond_stage_model.num_fitted == 6
    cond = loaded.condition_from_texts(["red floor", "green wall"])
    assert np.isfinite(loaded.sample(torch.randn(2, 3, 64, 64), cond, DDIMSampler(2), 2.0).numpy()).all()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """Four steps at once, and two steps and two more after a resume, in the midst of an epoch."""
    params = {**SEED_OPTIONS, "unet_config": unet(img_size=64), "image_size": 64, "use_ema": True}
    params |= {"cond_stage_config": towers_of(save_clip(tmp_path / "clip")), "cond_drop_prob": 0.3}
    params |= {"gap": {"kind": "noise_mean", "num_images": 6}}
    images = {"target": "stand_ins.World64"}
    config = {
        "model": {"base_learning_rate": 1e-3, "target": TARGET, "params": params},
        "data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 4, "num_workers": 0, "train": images}},
        "lightning": {
            "modelcheckpoint": {"params": {"every_n_train_steps": 1}},
            "callbacks": {"image_logger": None},
            "trainer": {"accelerator": "cpu", "max_steps": 4},
        },
    }
    OmegaConf.save(OmegaConf.create(config), tmp_path / "c.yaml")
    words = ["-b", str(tmp_path / "c.yaml"), "-t", "--no-test"]
    stop = ["lightning.callbacks.stop.target=stand_ins.StopAt", "lightning.callbacks.stop.params.step=2"]
    assert front_door.main([*words, "-l", str(tmp_path / "whole")]) == 0
    assert front_door.main([*words, "-l", str(tmp_path / "parts"), *stop]) == 0
    (whole,), (parts,) = ((tmp_path / name).glob("*/checkpoints/last.ckpt") for name in ("whole", "parts"))
    stopped = torch.load(parts, weights_only=True)
    assert front_door.main(["-r", str(parts.parents[1]), "-t", "--no-test", "lightning.callbacks.stop=null"]) == 0
    expected, found = (torch.load(path, weights_only=True) for path in (whole, parts))
    assert (stopped["global_step"], expected["global_step"], found["global_step"]) == (2, 4, 4)
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for key, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][key], value), key
    assert any(not torch.equal(stopped["state_dict"][key], value) for key, value in expected["state_dict"].items())
