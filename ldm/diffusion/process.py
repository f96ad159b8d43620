"""The diffusion process of a model: its noise schedule as buffers, and its parameterization."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.diffusion.parameterization import Parameterization
from ldm.diffusion.schedule import NoiseSchedule

logger = logging.getLogger(__name__)

_CONSTANTS = tuple(field.name for field in fields(NoiseSchedule))
# Constants that the models of one family keep in their checkpoints and those of another do not.
_OF_FAMILIES = ("shift_coef", "ddim_coef", "alphas_cumprod_next")


class DiffusionProcess(nn.Module):
    """Mixin of a model that denoises. All maps take x (B, C, H, W) and time steps t (B,) int64.

    Attributes:
        kept_constants: constants beside LDM's that are part of this model's checkpoints: those of its own family.
        parameterization: what the network predicts.
        num_timesteps: T.
    """

    kept_constants: tuple[str, ...] = ("shift_coef", "ddim_coef")
    parameterization: Parameterization
    num_timesteps: int

    def register_schedule(self, betas: np.ndarray, v_posterior: float, kind: Parameterization) -> None:
        """Keep the schedule's constants as buffers under LDM's names.

        Args:
            betas: (T,) float64.
            v_posterior: see ``NoiseSchedule.from_betas``.
            kind: what the network predicts.
        """
        self.parameterization = kind
        schedule = NoiseSchedule.from_betas(betas, v_posterior)
        self.num_timesteps = schedule.num_timesteps
        buffers = schedule.constants()
        if "alphas_cumprod_next" in self.kept_constants:
            abar = schedule.alphas_cumprod
            buffers["alphas_cumprod_next"] = torch.cat([abar[1:], abar[-1:]])
        self.schedule_names = tuple(buffers)
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=name not in _OF_FAMILIES or name in self.kept_constants)
        self.register_buffer("lvlb_weights", kind.vlb_weights(schedule), persistent=False)
        self.register_load_state_dict_pre_hook(_match_schedule)

    @property
    def schedule(self) -> NoiseSchedule:
        """The constants on the model's device."""
        return NoiseSchedule(**{name: self.get_buffer(name) for name in _CONSTANTS})

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; without ``noise``, eps is drawn."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return self.schedule.q_sample(x_start, t, noise)

    def start_from_prediction(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """Return the estimate of x_0 that corresponds to a network output."""
        return self.parameterization.to_x0(self.schedule, x_t, t, prediction)


def _match_schedule(module: DiffusionProcess, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let checkpoints of any family load: the config's schedule is used, missing or extra constants are ignored.

    A schedule that differs from the config's is reported, because the weights were trained with it.
    """
    found, own = state_dict.get(f"{prefix}betas"), module.get_buffer("betas")
    differs = found is not None and not (
        found.shape == own.shape and torch.allclose(found.to(own), own.to(found).to(own), rtol=1e-4, atol=1e-8)
    )
    if found is not None and differs:
        logger.warning(
            "the checkpoint was trained with another noise schedule (%s) than the config's (%s), which is used: set "
            "timesteps, beta_schedule, linear_start and linear_end of model.params to the checkpoint's",
            _describe(found),
            _describe(own),
        )
    for name in {*module.schedule_names, *_OF_FAMILIES}:
        key, mine = prefix + name, module._buffers.get(name)
        if mine is None or name in module._non_persistent_buffers_set:
            state_dict.pop(key, None)
        elif differs or key not in state_dict or state_dict[key].dtype != mine.dtype:  # half precision is too coarse
            state_dict[key] = mine


def _describe(betas: Tensor) -> str:
    return f"{len(betas)} steps, betas {betas[0].item():.4g} to {betas[-1].item():.4g}"
