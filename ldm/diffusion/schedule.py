"""Noise schedules: betas, and the constants that follow from them (DDPM, Ho et al. 2020; conventions of LDM).

Constants are computed in float64 and rounded once, so that checkpoints and published figures agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm.data.options import require_choice

SCHEDULES = ("linear", "cosine", "sqrt_linear", "sqrt")


def make_beta_schedule(
    schedule: str, num_timesteps: int, linear_start: float = 1e-4, linear_end: float = 2e-2, cosine_s: float = 8e-3
) -> np.ndarray:
    """Return the betas of a named schedule.

    Args:
        schedule: ``linear`` is linear in the square root of beta (LDM's meaning, not DDPM's); ``sqrt_linear`` is
            linear in beta; ``sqrt`` the square root of ``sqrt_linear``; ``cosine`` of Nichol & Dhariwal 2021, eq. 17.
        num_timesteps: T.
        linear_start: first beta of the three linear schedules.
        linear_end: last beta of the three linear schedules.
        cosine_s: offset s of the cosine schedule.

    Returns:
        (T,) float64 in [0, 1).

    Raises:
        ConfigError: the name is unknown.
    """
    require_choice("beta_schedule", schedule, SCHEDULES)
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, num_timesteps, dtype=np.float64) ** 2
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, num_timesteps, dtype=np.float64)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, num_timesteps, dtype=np.float64) ** 0.5
    steps = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps + cosine_s
    signal = np.cos(steps / (1 + cosine_s) * np.pi / 2) ** 2
    signal = signal / signal[0]
    return np.clip(1 - signal[1:] / signal[:-1], 0, 0.999)


@dataclass(frozen=True)
class NoiseSchedule:
    """Constants of a noise schedule under LDM's names, each (T,).

    With alpha = 1 - beta and abar its cumulative product (``alphas_cumprod``), ``shift_coef`` is the weight of a
    sub-gradient in the training estimate, -sqrt(alpha) (1 - abar_prev) / sqrt(1 - abar), and ``ddim_coef`` its weight
    in sampling, -sqrt(1 - abar) (PDAE, Zhang et al. 2022, Eq. 8 and 11).

    Example:
        >>> schedule = NoiseSchedule.from_betas(make_beta_schedule("linear", 1000))
        >>> schedule.num_timesteps
        1000
        >>> schedule.q_sample(torch.zeros(2, 3, 8, 8), torch.tensor([0, 999]), torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    shift_coef: Tensor
    ddim_coef: Tensor

    @classmethod
    def from_betas(
        cls, betas: np.ndarray, v_posterior: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> NoiseSchedule:
        """Compute all constants.

        Args:
            betas: (T,) float64.
            v_posterior: interpolates the posterior variance between the DDPM lower (0) and upper (1) bound.
            dtype: type of the constants.
        """
        alphas = 1.0 - betas
        abar = np.cumprod(alphas)
        abar_prev = np.append(1.0, abar[:-1])
        posterior_variance = (1 - v_posterior) * betas * (1 - abar_prev) / (1 - abar) + v_posterior * betas
        arrays = {
            "betas": betas,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": abar_prev,
            "sqrt_alphas_cumprod": np.sqrt(abar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
            "log_one_minus_alphas_cumprod": np.log(1 - abar),
            "sqrt_recip_alphas_cumprod": np.sqrt(1 / abar),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / abar - 1),
            "posterior_variance": posterior_variance,
            "posterior_log_variance_clipped": np.log(np.maximum(posterior_variance, 1e-20)),
            "posterior_mean_coef1": betas * np.sqrt(abar_prev) / (1 - abar),
            "posterior_mean_coef2": (1 - abar_prev) * np.sqrt(alphas) / (1 - abar),
        }
        constants = {name: torch.tensor(value, dtype=dtype) for name, value in arrays.items()}
        noise_level = constants["sqrt_one_minus_alphas_cumprod"]
        shift = -torch.sqrt(1 - constants["betas"]) * (1 - constants["alphas_cumprod_prev"]) / noise_level
        return cls(**constants, shift_coef=shift, ddim_coef=-noise_level)

    def constants(self) -> dict[str, Tensor]:
        """Return the constants by name."""
        return dict(vars(self))

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, (B, ...), for time steps t (B,) int64."""
        signal = extract(self.sqrt_alphas_cumprod, t, x_start) * x_start
        return signal + extract(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_0 = sqrt(1 / abar_t) x_t - sqrt(1 / abar_t - 1) eps."""
        scaled = extract(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
        return scaled - extract(self.sqrt_recipm1_alphas_cumprod, t, x_t) * noise

    def predict_noise_from_start(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """Return eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)."""
        residual = x_t - extract(self.sqrt_alphas_cumprod, t, x_t) * x_start
        return residual / extract(self.sqrt_one_minus_alphas_cumprod, t, x_t)


def extract(values: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    """Return ``values[timesteps]`` shaped (B, 1, ..., 1), which broadcasts over ``like`` (B, ...)."""
    return values[timesteps].reshape(len(timesteps), *([1] * (like.ndim - 1)))
