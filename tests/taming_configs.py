"""Small networks, losses and schedules in the form of taming-transformers' configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

DDCONFIG = {
    "double_z": False,
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


LOSS = {
    "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "params": {"disc_start": 0, "perceptual_weight": 0.0, "disc_weight": 0.5, "disc_num_layers": 1, "disc_ndf": 8},
}


SCHEDULE = {
    "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
    "params": {"warm_up_steps": 0, "max_decay_steps": 4, "lr_start": 0.9, "lr_max": 0.9, "lr_min": 0.1},
}


def save(model: Any, path: Path) -> str:
    torch.save({"state_dict": model.state_dict()}, path)
    return str(path)
