"""Samplers: one signature for all, a denoiser in, latents out.

A denoiser is a function ``(x (B, C, H, W), t (B,) int64) -> eps (B, C, H, W)``. What conditions it (text, units,
guidance) is closed over by the model that calls; samplers know the schedule alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.schedule import extract
from ldm.util import ConfigError

Denoiser = Callable[[Tensor, Tensor], Tensor]
StepCallback = Callable[["SamplerStep"], None]


class SamplerStep(NamedTuple):
    """What a callback sees after each step: position from the last (count - 1) down to 0, x_{t-1} and x0 estimate."""

    position: int
    timestep: int
    x: Tensor
    pred_x0: Tensor


class Inpainting(NamedTuple):
    """Where ``mask`` (B, 1, H, W) is one, the sample follows the noised ``x0`` (B, C, H, W)."""

    mask: Tensor
    x0: Tensor


def ddim_timesteps(num_steps: int, num_timesteps: int, method: str = "uniform") -> np.ndarray:
    """The subsequence of time steps DDIM visits, ascending int64 (Song et al. 2021, section 4.2; LDM's offset of 1).

    ``uniform`` steps by T // S and so may hold more than S entries, as in LDM; an entry beyond T - 1 is dropped.

    Raises:
        ConfigError: more steps than time steps, or an unknown method.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ConfigError(f"a sampler with {num_steps} steps: expected between 1 and {num_timesteps} (timesteps)")
    if method == "uniform":
        steps = np.arange(0, num_timesteps, num_timesteps // num_steps) + 1
    elif method == "quad":
        steps = (np.linspace(0, np.sqrt(num_timesteps * 0.8), num_steps) ** 2).astype(np.int64) + 1
    else:
        raise ConfigError(f"DDIM discretisation '{method}' is unknown; choose 'uniform' or 'quad'")
    return np.unique(steps[steps < num_timesteps])


class DDIMConstants(NamedTuple):
    """Per visited step: abar, abar of the step before (both float32) and sigma (Song et al. 2021, Eq. 16)."""

    timesteps: np.ndarray
    alphas: Tensor
    alphas_prev: Tensor
    sigmas: Tensor


def ddim_constants(alphas_cumprod: Tensor, num_steps: int, eta: float, method: str = "uniform") -> DDIMConstants:
    """Constants of DDIM with ``num_steps`` steps; ``eta`` 0 is deterministic, 1 has DDPM's variance."""
    timesteps = ddim_timesteps(num_steps, len(alphas_cumprod), method)
    index = torch.as_tensor(timesteps, device=alphas_cumprod.device)
    alphas = alphas_cumprod[index]
    alphas_prev = torch.cat([alphas_cumprod[:1], alphas[:-1]])
    sigmas = eta * torch.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
    return DDIMConstants(timesteps, alphas, alphas_prev, sigmas)


@torch.no_grad()
def ddim_sample(
    denoise: Denoiser,
    x_T: Tensor,
    alphas_cumprod: Tensor,
    num_steps: int = 50,
    eta: float = 0.0,
    temperature: float = 1.0,
    quantize_x0: Callable[[Tensor], Tensor] | None = None,
    inpainting: Inpainting | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Denoising diffusion implicit models (Song et al. 2021, Eq. 12).

    Args:
        denoise: see the module's docstring.
        x_T: (B, C, H, W) standard normal noise.
        alphas_cumprod: (T,) float32.
        num_steps: S, the number of steps aimed at.
        eta: 0 deterministic, 1 as noisy as DDPM.
        temperature: scales the noise added in a step.
        quantize_x0: maps the x0 estimate of each step onto a codebook.
        inpainting: what to keep of a given image.
        callback: called after each step.

    Returns:
        (B, C, H, W) sample.
    """
    constants = ddim_constants(alphas_cumprod, num_steps, eta)
    x = x_T
    for position in reversed(range(len(constants.timesteps))):
        timestep = int(constants.timesteps[position])
        t = torch.full((len(x),), timestep, device=x.device, dtype=torch.long)
        alpha, alpha_prev, sigma = (series[position] for series in constants[1:])
        if inpainting is not None:
            x = _keep_known(x, inpainting, alphas_cumprod[timestep])
        eps = denoise(x, t)
        pred_x0 = (x - torch.sqrt(1 - alpha) * eps) / torch.sqrt(alpha)
        if quantize_x0 is not None:
            pred_x0 = quantize_x0(pred_x0)
        x = torch.sqrt(alpha_prev) * pred_x0 + torch.sqrt(1 - alpha_prev - sigma**2) * eps
        if eta > 0:
            x = x + sigma * temperature * torch.randn_like(x)
        if callback is not None:
            callback(SamplerStep(position, timestep, x, pred_x0))
    return x


@torch.no_grad()
def ddpm_sample(
    denoise: Denoiser,
    x_T: Tensor,
    buffers: dict[str, Tensor],
    temperature: float = 1.0,
    clip_denoised: bool = False,
    quantize_x0: Callable[[Tensor], Tensor] | None = None,
    inpainting: Inpainting | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Ancestral sampling over all T steps (Ho et al. 2020, Algorithm 2).

    Args:
        buffers: the schedule's constants by name (``schedule_buffers``).
        clip_denoised: clamp the x0 estimate to [-1, 1]; for models of pixels only.

    The other arguments and the result are those of ``ddim_sample``.
    """
    x = x_T
    num_timesteps = len(buffers["betas"])
    for timestep in reversed(range(num_timesteps)):
        t = torch.full((len(x),), timestep, device=x.device, dtype=torch.long)
        if inpainting is not None:
            x = _keep_known(x, inpainting, buffers["alphas_cumprod"][timestep])
        eps = denoise(x, t)
        scale, noise_scale = buffers["sqrt_recip_alphas_cumprod"], buffers["sqrt_recipm1_alphas_cumprod"]
        pred_x0 = extract(scale, t, x) * x - extract(noise_scale, t, x) * eps
        if clip_denoised:
            pred_x0 = pred_x0.clamp(-1, 1)
        if quantize_x0 is not None:
            pred_x0 = quantize_x0(pred_x0)
        mean = (
            extract(buffers["posterior_mean_coef1"], t, x) * pred_x0
            + extract(buffers["posterior_mean_coef2"], t, x) * x
        )
        x = mean
        if timestep > 0:
            deviation = torch.exp(0.5 * extract(buffers["posterior_log_variance_clipped"], t, x))
            x = x + deviation * temperature * torch.randn_like(x)
        if callback is not None:
            callback(SamplerStep(timestep, timestep, x, pred_x0))
    return x


def _keep_known(x: Tensor, inpainting: Inpainting, alpha: Tensor) -> Tensor:
    """Replace the known part of x_t by the given image noised to the same level."""
    known = torch.sqrt(alpha) * inpainting.x0 + torch.sqrt(1 - alpha) * torch.randn_like(x)
    return known * inpainting.mask + (1 - inpainting.mask) * x
