"""Denoising diffusion implicit models (Song et al. 2021)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.samplers.base import Sampler, SamplerState
from ldm.diffusion.schedule import NoiseSchedule
from ldm.ranges import Eta, NumSteps, Spacing, Weight
from ldm.util import ConfigError


class DDIMSampler(Sampler):
    """DDIM (Song et al. 2021, Eq. 12).

    Args:
        num_steps: S, the number of steps aimed at.
        eta: 0 is deterministic, 1 has DDPM's variance.
        spacing: ``uniform`` or ``quad``, see ``spaced_timesteps``.
        temperature: factor of the noise added in each step.

    Raises:
        ConfigError: ``eta`` is negative; while sampling, ``eta`` exceeds the schedule's limit.
    """

    def __init__(
        self, num_steps: NumSteps | None = 50, eta: Eta = 0.0, spacing: Spacing = "uniform", temperature: Weight = 1.0
    ) -> None:
        super().__init__(num_steps, spacing, temperature)
        if not eta >= 0:
            raise ConfigError(f"sampler: expected eta of at least 0 (0 is deterministic, 1 is DDPM), got {eta}")
        self.eta = eta

    def sigma(self, abar: Tensor, abar_prev: Tensor) -> Tensor:
        """Return the deviation of the added noise (Eq. 16)."""
        return self.eta * torch.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))

    def check(self, schedule: NoiseSchedule, timesteps: np.ndarray) -> None:
        """Raise if a step would add more variance than the new state has: sigma^2 <= 1 - abar_prev.

        An ``eta`` of at most 1 fits every schedule and needs no look at the constants, which are on the device.
        """
        if self.eta <= 1:
            return
        abar = schedule.alphas_cumprod.detach().double().cpu().numpy()
        now = abar[timesteps]
        previous = np.append(abar[0], now[:-1])
        added = (1 - previous) / (1 - now) * (1 - now / previous)  # variance at eta = 1
        limit = float(np.sqrt(((1 - previous) / np.maximum(added, 1e-12)).min()))
        if self.eta > limit:
            raise ConfigError(
                f"sampler: expected eta of at most {limit:.3f} for {len(timesteps)} steps of this schedule, got "
                f"{self.eta:g}. Use 0 (deterministic) to 1 (as noisy as DDPM)"
            )

    def step(self, state: SamplerState) -> Tensor:
        sigma = self.sigma(state.abar, state.abar_prev)
        x = torch.sqrt(state.abar_prev) * state.x0 + torch.sqrt(1 - state.abar_prev - sigma**2) * state.eps
        return x + sigma * self.temperature * torch.randn_like(x) if self.eta > 0 else x
