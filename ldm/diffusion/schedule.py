"""The noise schedule: betas, and every constant that follows from them (DDPM, Ho et al. 2020; LDM conventions).

Everything is computed in float64 and rounded to float32 once, so that checkpoints and published figures agree.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ldm.util import ConfigError

SCHEDULES = ("linear", "cosine", "sqrt_linear", "sqrt")


def make_beta_schedule(
    schedule: str, num_timesteps: int, linear_start: float = 1e-4, linear_end: float = 2e-2, cosine_s: float = 8e-3
) -> np.ndarray:
    """Betas of a named schedule.

    Args:
        schedule: ``linear`` is linear in the square root of beta (LDM's meaning, not DDPM's); ``sqrt_linear`` is
            linear in beta; ``sqrt`` its square root; ``cosine`` is Nichol & Dhariwal 2021, Eq. 17.
        num_timesteps: T.
        linear_start: first beta of the three linear kinds.
        linear_end: last beta of the three linear kinds.
        cosine_s: offset s of the cosine kind.

    Returns:
        (T,) float64 in [0, 1).

    Raises:
        ConfigError: the name is unknown.
    """
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, num_timesteps, dtype=np.float64) ** 2
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, num_timesteps, dtype=np.float64)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, num_timesteps, dtype=np.float64) ** 0.5
    if schedule == "cosine":
        steps = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps + cosine_s
        signal = np.cos(steps / (1 + cosine_s) * np.pi / 2) ** 2
        signal = signal / signal[0]
        return np.clip(1 - signal[1:] / signal[:-1], 0, 0.999)
    raise ConfigError(f"beta_schedule '{schedule}' is unknown; choose one of {', '.join(SCHEDULES)}")


def schedule_buffers(betas: np.ndarray, v_posterior: float = 0.0) -> dict[str, Tensor]:
    """All constants of a schedule under the state-dict names of LDM and DisDiff.

    With alpha = 1 - beta and abar its running product, ``shift_coef`` is the weight of a sub-gradient in the training
    estimate, -sqrt(alpha) (1 - abar_prev) / sqrt(1 - abar), and ``ddim_coef`` its weight when sampling,
    -sqrt(1 - abar) (PDAE, Zhang et al. 2022, Eq. 8 and 11).

    Args:
        betas: (T,) float64.
        v_posterior: interpolates the posterior variance between the DDPM lower (0) and upper (1) bound.

    Returns:
        name -> (T,) float32.
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
    buffers = {name: torch.tensor(value, dtype=torch.float32) for name, value in arrays.items()}
    noise_level = buffers["sqrt_one_minus_alphas_cumprod"]
    buffers["shift_coef"] = -torch.sqrt(1 - buffers["betas"]) * (1 - buffers["alphas_cumprod_prev"]) / noise_level
    buffers["ddim_coef"] = -noise_level
    return buffers


def vlb_weights(buffers: dict[str, Tensor], parameterization: str) -> Tensor:
    """Weights that turn the simple loss into the variational bound, (T,) float32.

    For ``x0`` the denominator is ``2 - abar`` and not ``2 (1 - abar)``: that is what LDM computes, and what its
    published ``loss_vlb`` curves show.

    Raises:
        ConfigError: ``parameterization`` is neither ``eps`` nor ``x0``.
    """
    abar, betas = buffers["alphas_cumprod"], buffers["betas"]
    if parameterization == "eps":
        weights = betas**2 / (2 * buffers["posterior_variance"] * (1 - betas) * (1 - abar))
    elif parameterization == "x0":
        weights = 0.5 * torch.sqrt(abar) / (2.0 * 1 - abar)
    else:
        raise ConfigError(f"parameterization '{parameterization}' is unknown; choose 'eps' or 'x0'")
    weights[0] = weights[1]  # the posterior variance at t = 0 is zero
    return weights


def extract(values: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    """``values[timesteps]`` shaped (B, 1, ..., 1) to broadcast over ``like`` (B, ...)."""
    return values[timesteps].reshape(len(timesteps), *([1] * (like.ndim - 1)))
