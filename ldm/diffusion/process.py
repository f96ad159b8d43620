"""The diffusion process of a model: its schedule as buffers, and the maps between x_t, x_0 and eps."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from ldm.diffusion.schedule import extract, schedule_buffers, vlb_weights


class DiffusionProcess(nn.Module):
    """Mixin of a model that denoises. All maps take x (B, C, H, W) and time steps t (B,) int64."""

    def register_schedule(self, betas: np.ndarray, v_posterior: float, parameterization: str) -> None:
        """Keep the schedule's constants as buffers under LDM's names.

        Args:
            betas: (T,) float64.
            v_posterior: see ``schedule_buffers``.
            parameterization: the network predicts ``eps`` or ``x0``.
        """
        self.parameterization = parameterization
        self.num_timesteps = len(betas)
        buffers = schedule_buffers(betas, v_posterior)
        self.schedule_names = tuple(buffers)
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.register_buffer("lvlb_weights", vlb_weights(buffers, parameterization), persistent=False)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps."""
        signal = extract(self.sqrt_alphas_cumprod, t, x_start) * x_start
        return signal + extract(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 = sqrt(1 / abar_t) x_t - sqrt(1 / abar_t - 1) eps."""
        scaled = extract(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
        return scaled - extract(self.sqrt_recipm1_alphas_cumprod, t, x_t) * noise

    def predict_noise_from_start(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)."""
        residual = x_t - extract(self.sqrt_alphas_cumprod, t, x_t) * x_start
        return residual / extract(self.sqrt_one_minus_alphas_cumprod, t, x_t)

    def start_from_prediction(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The estimate of x_0 that a network output stands for."""
        return self.predict_start_from_noise(x_t, t, prediction) if self.parameterization == "eps" else prediction
