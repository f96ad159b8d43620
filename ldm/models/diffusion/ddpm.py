"""The diffusion models under the names that configs know (``ldm.models.diffusion.ddpm.<class>``)."""

from ldm.models.diffusion.latent_diffusion import LatentDiffusion
from ldm.models.diffusion.pixel_diffusion import DDPM

__all__ = ["DDPM", "LatentDiffusion"]
