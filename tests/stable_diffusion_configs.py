"""Model sections as in the published configs of Stable Diffusion 1 and 2; sizes can be reduced."""

from __future__ import annotations

from typing import Any

ENCODERS = "ldm.modules.encoders.modules"


def model(stage: str, stage_params: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    """A ``model`` section; keys ``unet``, ``ddconfig`` are merged into those sections, others into ``params``."""
    unet, ddconfig = params.pop("unet", {}), params.pop("ddconfig", {})
    network = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "attention_resolutions": [4, 2, 1],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4],
        "num_heads": 8,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": 768,
        "use_checkpoint": True,
        "legacy": False,
    }
    autoencoder = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    first_stage = {
        "embed_dim": 4,
        "monitor": "val/rec_loss",
        "ddconfig": {**autoencoder, **ddconfig},
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    common = {
        "linear_start": 0.00085,
        "linear_end": 0.0120,
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "timesteps": 1000,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": 64,
        "channels": 4,
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "monitor": "val/loss_simple_ema",
        "scale_factor": 0.18215,
        "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {**network, **unet}},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": first_stage},
        "cond_stage_config": {"target": f"{ENCODERS}.{stage}", "params": stage_params or {}},
    }
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    return {"base_learning_rate": 1e-4, "target": target, "params": {**common, **params}}


# Differences of version 2 in the U-Net.
UNET_2 = {"num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True, "context_dim": 1024}
STAGE_2 = {"freeze": True, "layer": "penultimate"}
