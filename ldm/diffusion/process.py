"""The diffusion process of a model: its schedule as buffers, and the maps between x_t, x_0 and eps."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.diffusion.schedule import extract, schedule_buffers, vlb_weights

_log = logging.getLogger(__name__)

# Constants of a schedule that some family's models keep in their checkpoints and others do not.
_NOT_EVERYWHERE = ("shift_coef", "ddim_coef", "alphas_cumprod_next")


class DiffusionProcess(nn.Module):
    """Mixin of a model that denoises. All maps take x (B, C, H, W) and time steps t (B,) int64.

    Attributes:
        kept_constants: constants beside LDM's that stand in checkpoints of this model: those of its own family.
    """

    kept_constants: tuple[str, ...] = ("shift_coef", "ddim_coef")

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
        if "alphas_cumprod_next" in self.kept_constants:
            abar = buffers["alphas_cumprod"]
            buffers["alphas_cumprod_next"] = torch.cat([abar[1:], abar[-1:]])
        self.schedule_names = tuple(buffers)
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=name not in _NOT_EVERYWHERE or name in self.kept_constants)
        self.register_buffer("lvlb_weights", vlb_weights(buffers, parameterization), persistent=False)
        self.register_load_state_dict_pre_hook(_match_schedule)

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


def _match_schedule(module: DiffusionProcess, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let checkpoints of any family load: the config's schedule stands, and what a file has more or less is no matter.

    A schedule that differs from the config's is named, because the weights were trained with it.
    """
    found, own = state_dict.get(f"{prefix}betas"), module.betas
    if found is None:
        differs = False
    else:
        same_length = found.shape == own.shape
        differs = not (same_length and torch.allclose(found.to(own), own, rtol=1e-4, atol=1e-8))
    if differs:
        _log.warning(
            "the checkpoint was trained with another noise schedule (%s) than the config's (%s), which is used: set "
            "timesteps, beta_schedule, linear_start and linear_end of model.params to the checkpoint's",
            _describe(found),
            _describe(own),
        )
    for name in {*module.schedule_names, *_NOT_EVERYWHERE}:
        key, mine = prefix + name, module._buffers.get(name)
        if mine is None or name in module._non_persistent_buffers_set:
            state_dict.pop(key, None)
        elif differs or key not in state_dict:
            state_dict[key] = mine


def _describe(betas: Tensor) -> str:
    return f"{len(betas)} steps, betas {betas[0].item():.4g} to {betas[-1].item():.4g}"
