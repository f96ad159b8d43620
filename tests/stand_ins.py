"""Small parts that stand where CLIP stands, so that models can be tested without weights."""

from __future__ import annotations

import zlib

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.world import World3D
from ldm.modules import inception

TINY_DDCONFIG = {
    "double_z": False,
    "z_channels": 4,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
    "patch_size": 4,
}
TINY_KL = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 4,
        "ddconfig": {**TINY_DDCONFIG, "double_z": True},
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}
PLAIN_UNET = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 4,
}
TINY_UNET = {**PLAIN_UNET, "use_scale_shift_norm": True, "resblock_updown": True}
# Constants of a noise schedule in checkpoints of LDM, and those that DisDiff adds.
LDM_SCHEDULE = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
}
DISDIFF_SCHEDULE = {"shift_coef", "ddim_coef"}


class World64(World3D):
    """The embedded world at 64 pixels in the place of any data set, whatever its options."""

    def __init__(self, split: str | None = None, **_: object) -> None:
        super().__init__(64, split=split)


class HashedText(nn.Module):
    """A text encoder: every string has its own fixed random direction."""

    logit_scale = 20.0

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.anchor = nn.Parameter(torch.zeros(1))

    def encode(self, texts: list[list[str]]) -> Tensor:
        """(B, U, width), zeros for an empty string."""
        return torch.stack([torch.stack([self._embed(text) for text in strings]) for strings in texts])

    def vocabulary_embeddings(self, vocabulary: list[list[str]]) -> list[Tensor]:
        """One (W_k, width) per attribute."""
        return [torch.stack([self._embed(text) for text in words]) for words in vocabulary]

    def _embed(self, text: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        direction = F.normalize(torch.randn(self.width, generator=generator), dim=0)
        return direction if text else torch.zeros(self.width)


class LinearImage(nn.Module):
    """An image encoder: a fixed random projection of the pixels."""

    def __init__(self, width: int = 16, size: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * size * size, width, generator=generator) / size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, size, size) -> (B, width)."""
        return images.flatten(1) @ self.weight


def vq_config(**params: object) -> dict:
    """A first stage of 32 px -> 4 x 8 x 8."""
    return {
        "target": "ldm.models.autoencoder.VQModelInterface",
        "params": {
            "embed_dim": 4,
            "n_embed": 64,
            "ddconfig": TINY_DDCONFIG,
            "lossconfig": {"target": "torch.nn.Identity"},
            **params,
        },
    }


class StopAt(pl.Callback):
    """Ends the training after some steps, while schedules still follow ``max_steps``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        """Stop when the step is reached."""
        trainer.should_stop = trainer.global_step >= self.step


class MeanColour(inception.Inception):
    """Six simple features in the place of a network of 90 MB."""

    def __init__(self, weights=None, device="cpu"):
        pass

    def __call__(self, images):
        pixels = inception.to_bytes(images).float().flatten(2)
        return torch.cat([pixels.mean(dim=2), pixels.std(dim=2)], dim=1).numpy()
