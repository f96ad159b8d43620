"""A small text model with random weights whose network listens to its condition, saved as a model-zoo folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from stand_ins import PLAIN_UNET, TINY_KL

from ldm.util import instantiate_from_config

WORDS = ["a", "red", "blue", "cube", "floor"]
T = 40
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
            "params": {"n_embed": 16, "n_layer": 1, "vocab_size": 16, "max_seq_len": 8},
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
    (folder / "words.json").write_text(json.dumps({"words": WORDS, "context_length": 8}))
    torch.manual_seed(seed)
    model = instantiate_from_config(config)
    with torch.no_grad():
        for parameter in model.model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    torch.save({"state_dict": model.state_dict(), "global_step": 1}, folder / "model.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": config}))
    return folder
