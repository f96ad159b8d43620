"""Maps of the low-resolution image of Stable Diffusion's upscaler, with noise augmentation (Ho et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.schedule import NoiseSchedule, extract, make_beta_schedule

_CONSTANTS = """betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
    log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod""".split()


class AbstractLowScaleModel(nn.Module):
    """Low-resolution image as it is; the schedule has ``timesteps`` and the options of ``make_beta_schedule``."""

    def __init__(self, noise_schedule_config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if noise_schedule_config is not None:
            options = {"beta_schedule": "linear", "timesteps": 1000, **noise_schedule_config}
            betas = make_beta_schedule(options.pop("beta_schedule"), options.pop("timesteps"), **options)
            constants = NoiseSchedule.from_betas(betas).constants()
            for name in _CONSTANTS:
                self.register_buffer(name, constants[name])

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the image x (B, C, h, w) for the network, and its noise levels (B,) int64 if it has some."""
        return x, None


class SimpleImageConcat(AbstractLowScaleModel):
    """Low-resolution image as it is, with noise level 0."""

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, torch.zeros(len(x), dtype=torch.long, device=x.device)


class ImageConcatWithNoiseAugmentation(AbstractLowScaleModel):
    """Low-resolution image with noise of a level below ``max_noise_level``; ``to_cuda`` has no effect."""

    def __init__(
        self, noise_schedule_config: Mapping[str, Any], max_noise_level: int = 1000, to_cuda: bool = False
    ) -> None:
        super().__init__(noise_schedule_config)
        self.max_noise_level = max_noise_level

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if noise_level is None:
            noise_level = torch.randint(0, self.max_noise_level, (len(x),), device=x.device)
        signal = extract(self.sqrt_alphas_cumprod, noise_level, x) * x
        return signal + extract(self.sqrt_one_minus_alphas_cumprod, noise_level, x) * torch.randn_like(x), noise_level
