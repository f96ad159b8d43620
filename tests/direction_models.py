"""A small text model with random weights that depends on its condition, and a run of NoiseCLR on it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from stand_ins import PLAIN_UNET, TINY_KL

import main as front_door
from ldm.data.world import world_vocabulary
from ldm.modules.encoders.tokenizer import WordTokenizer
from ldm.util import instantiate_from_config

T, LENGTH = 40, 16
MODEL = {
    "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "params": {
        "linear_start": 0.0015,
        "linear_end": 0.0155,
        "timesteps": T,
        "image_size": 8,
        "channels": 4,
        "use_ema": False,
        "monitor": None,
        "conditioning_key": "crossattn",
        "cond_stage_key": "text",
        "first_stage_config": TINY_KL,
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.BERTEmbedder",
            "params": {"n_embed": 16, "n_layer": 1, "vocab_size": 64, "max_seq_len": LENGTH},
        },
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": {**PLAIN_UNET, "use_spatial_transformer": True, "context_dim": 16},
        },
    },
}


def save_text_model(folder: Path, seed: int = 0) -> Path:
    """Write ``model.ckpt`` and ``config.yaml``; layers that start at zero get weights too."""
    folder.mkdir(parents=True)
    config = json.loads(json.dumps(MODEL))
    config["params"]["cond_stage_config"]["params"]["tokenizer"] = str(folder / "words.json")
    WordTokenizer(world_vocabulary().all_words(), LENGTH).save(folder / "words.json")
    torch.manual_seed(seed)
    model = instantiate_from_config(config)
    with torch.no_grad():
        for parameter in model.model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    torch.save({"state_dict": model.state_dict(), "global_step": 1}, folder / "model.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": config}))
    return folder


def train_noiseclr(folder: Path, zoo: Path) -> Path:
    """Train 6 directions of a model two steps by ``main.py``; return the run folder."""
    world = {"target": "ldm.data.world.World3D", "params": {"size": 32, "limit": 16}}
    denoiser = {"target": "ldm.models.diffusion.methods.noiseclr.denoiser.RunDenoiser", "params": {"run": str(zoo)}}
    options = {"denoiser_config": denoiser, "num_directions": 6, "directions_per_iteration": 2}
    target = "ldm.models.diffusion.methods.noiseclr.model.NoiseCLR"
    data = {"batch_size": 2, "num_workers": 0, "train": world}
    config = {
        "model": {"base_learning_rate": 0.1, "target": target, "params": options},
        "data": {"target": "ldm.data.module.DataModuleFromConfig", "params": data},
        "lightning": {"trainer": {"max_steps": 2, "accelerator": "cpu", "log_every_n_steps": 1}},
    }
    (folder / "noiseclr.yaml").write_text(yaml.safe_dump(config))
    words = ["-b", str(folder / "noiseclr.yaml"), "-t", "--no-test", "-l", str(folder / "logs"), "-n", "directions"]
    assert front_door.main(words) == 0
    (run,) = (folder / "logs").glob("*_directions")
    return run
