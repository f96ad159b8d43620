"""The diffusion models under the names that configs know (``ldm.models.diffusion.ddpm.<class>``)."""

from ldm.models.diffusion.base import DDPM
from ldm.models.diffusion.finetune import (
    LatentDepth2ImageDiffusion,
    LatentFinetuneDiffusion,
    LatentInpaintDiffusion,
    LatentUpscaleDiffusion,
    LatentUpscaleFinetuneDiffusion,
)
from ldm.models.diffusion.latent import LatentDiffusion

__all__ = ["DDPM", "LatentDepth2ImageDiffusion", "LatentDiffusion", "LatentFinetuneDiffusion", "LatentInpaintDiffusion"]
__all__ += ["LatentUpscaleDiffusion", "LatentUpscaleFinetuneDiffusion"]
