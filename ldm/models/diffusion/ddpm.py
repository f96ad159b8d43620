"""The diffusion models under the names that configs know (``ldm.models.diffusion.ddpm.<class>``)."""

from ldm.models.diffusion.base import DDPM
from ldm.models.diffusion.latent import LatentDiffusion

__all__ = ["DDPM", "LatentDiffusion"]
