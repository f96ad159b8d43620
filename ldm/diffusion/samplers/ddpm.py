"""Ancestral sampling (Ho et al. 2020, Algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.data.options import require_choice
from ldm.diffusion.samplers.base import Sampler, SamplerState
from ldm.diffusion.schedule import extract
from ldm.ranges import Weight


class DDPMSampler(Sampler):
    """Ancestral sampling over all time steps.

    Args:
        temperature: factor of the noise added in each step.
        clip_denoised: clamp the x0 estimate to [-1, 1]; for models of pixels only.
        variance: of the noise added at time step t: ``posterior`` is that of q(x_{t-1} | x_t, x_0); ``previous`` is
            beta_{t-1}, as in the CLIP-guided DDPM.

    Raises:
        ConfigError: ``variance`` is unknown.
    """

    def __init__(self, temperature: Weight = 1.0, clip_denoised: bool = False, variance: str = "posterior") -> None:
        super().__init__(num_steps=None, temperature=temperature)
        require_choice("sampler.params.variance", variance, ("posterior", "previous"))
        self.clip_denoised, self.variance = clip_denoised, variance

    def predict_x0(self, state: SamplerState) -> Tensor:
        x0 = state.schedule.predict_start_from_noise(state.x, state.batch_of(state.t), state.eps)
        return x0.clamp(-1, 1) if self.clip_denoised else x0

    def step(self, state: SamplerState) -> Tensor:
        """Draw from the posterior q(x_{t-1} | x_t, x_0); its mean at the last step."""
        schedule, t = state.schedule, state.batch_of(state.t)
        mean = (
            extract(schedule.posterior_mean_coef1, t, state.x) * state.x0
            + extract(schedule.posterior_mean_coef2, t, state.x) * state.x
        )
        if state.is_last:
            return mean
        if self.variance == "previous":
            deviation = torch.sqrt(extract(schedule.betas, t - 1, state.x))
        else:
            deviation = torch.exp(0.5 * extract(schedule.posterior_log_variance_clipped, t, state.x))
        return mean + deviation * self.temperature * torch.randn_like(state.x)
