"""Small CLIP-guided DDPMs, their batches, and towers of a small CLIP."""

from __future__ import annotations

import torch

from ldm.models.diffusion.methods.clip_guided.model import CLIPGuidedDDPM

T, SIZE, WIDTH = 20, 8, 64
NETWORK = {"T": T, "img_ch": 3, "img_size": SIZE, "down_chs": [32, 32, 64], "c_embed_dim": WIDTH}
TARGET = "ldm.models.diffusion.methods.clip_guided.model.CLIPGuidedDDPM"
SEED_OPTIONS = {
    "timesteps": T,
    "beta_schedule": "sqrt_linear",
    "linear_start": 1e-4,
    "linear_end": 0.02,
    "image_size": SIZE,
    "channels": 3,
    "use_ema": False,
    "monitor": None,
    "sampler": {"target": "ldm.diffusion.samplers.DDPMSampler", "params": {"variance": "previous"}},
}


def unet(arch="package", **params):
    return {"target": "ldm.modules.diffusionmodules.clip_guided.UNet", "params": {**NETWORK, "arch": arch, **params}}


def build(arch="package", **params):
    torch.manual_seed(0)
    return CLIPGuidedDDPM(**{**SEED_OPTIONS, "unet_config": unet(arch), **params})


def batch_of(count=4, size=SIZE):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    return {"image": images, "clip_embedding": torch.randn(count, WIDTH, generator=generator)}


def towers_of(folder):
    modules = "ldm.modules.encoders.modules"
    return {
        "text_encoder": {"target": f"{modules}.FrozenCLIPTextEmbedder", "params": {"version": str(folder)}},
        "image_encoder": {"target": f"{modules}.FrozenClipImageEmbedder", "params": {"model": str(folder)}},
    }
