"""Samplers with the call signatures of LDM's; today's samplers do the work.

Scripts import them from ``ldm.models.diffusion.ddim``, ``ldm.models.diffusion.plms`` and
``ldm.models.diffusion.dpm_solver``. Dimensions: B batch, C channels, H W space, S visited time steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.util import UserError, get_obj_from_str

_SAMPLERS = "ldm.diffusion.samplers"


class DDIMSampler:
    """DDIM for a diffusion model; ``schedule`` and other arguments have no effect, as in LDM."""

    name = "ddim"  # of today's sampler

    def __init__(self, model: Any, schedule: str = "linear", **_: Any) -> None:
        self.model, self.schedule, self.ddpm_num_timesteps = model, schedule, model.num_timesteps

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Set ``ddim_timesteps`` (S,); raise ``ConfigError`` for options that do not fit."""
        options = {"num_steps": ddim_num_steps, "spacing": ddim_discretize, "eta": ddim_eta or None}
        self._sampler = get_obj_from_str(f"{_SAMPLERS}.named_sampler")(self.name, **options)
        self.ddim_timesteps = self._sampler.timesteps(self.ddpm_num_timesteps)

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Any = None,
        callback: Callable[[int], Any] | None = None,
        img_callback: Callable[[Tensor, int], Any] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        **others: Any,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Return samples (B, C, H, W), and ``x_inter`` and ``pred_x0``: the start and every ``log_every_t``-th step.

        ``mask`` (B, 1, H, W) is 1 where ``x0`` (B, C, H, W) is kept. Callbacks get the number of the step, from 0.

        Raises:
            UserError: an option that is not supported.
        """
        if unsupported := [name for name, value in others.items() if value and name != "verbose"]:
            raise UserError(f"sampler {self.name}: {', '.join(unsupported)} not supported. Leave the arguments out")
        if (mask is None) != (x0 is None):
            raise UserError(f"sampler {self.name}: expected mask and x0 together, got one of them. Pass both")
        self.make_schedule(S, ddim_eta=eta)
        self._sampler.temperature = temperature
        x = torch.randn((batch_size, *shape), device=self.model.betas.device) if x_T is None else x_T
        kept, last = {"x_inter": [x], "pred_x0": [x]}, len(self.ddim_timesteps) - 1

        def after_step(step: Any) -> None:
            if callback:
                callback(last - step.position)
            if img_callback:
                img_callback(step.pred_x0, last - step.position)
            if step.position % log_every_t == 0 or step.position == last:
                kept["x_inter"].append(step.x)
                kept["pred_x0"].append(step.pred_x0)

        inpainting = None if mask is None else get_obj_from_str(f"{_SAMPLERS}.Inpainting")(mask, x0)
        hooks = get_obj_from_str(f"{_SAMPLERS}.Hooks")(self.model.quantize_latent if quantize_x0 else None, inpainting)
        guidance = unconditional_guidance_scale, unconditional_conditioning
        return self._run(x, conditioning, self._sampler, *guidance, callback=after_step, hooks=hooks), kept

    def _run(self, x: Tensor, cond: Any, sampler: Any, scale: float, null: Any, **options: Any) -> Tensor:
        """Sample; as in LDM, there is no guidance without a negative condition, whatever its scale."""
        return self.model.sample(x, cond, sampler, 1.0 if null is None else scale, null, **options)

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Return x0 (B, C, H, W) noised to the level of step t (B,) of ``make_schedule``, or to time step t."""
        steps = np.arange(self.ddpm_num_timesteps) if use_original_steps else self.ddim_timesteps
        if (highest := int(t.max())) >= len(steps):
            raise UserError(f"stochastic_encode: expected steps 0 to {len(steps) - 1}, got {highest}. Use fewer")
        return self.model.q_sample(x0, torch.from_numpy(steps).to(t.device)[t], noise)

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Any,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        use_original_steps: bool = False,
    ) -> Tensor:
        """Return the sample (B, C, H, W) that the first ``t_start`` steps of the schedule make of ``x_latent``."""
        sampler, steps = copy.copy(self._sampler), self.ddim_timesteps
        sampler.timesteps = lambda count: (np.arange(count) if use_original_steps else steps)[:t_start]
        return self._run(x_latent, cond, sampler, unconditional_guidance_scale, unconditional_conditioning)


class PLMSSampler(DDIMSampler):
    """PLMS for a diffusion model; eta is 0."""

    name = "plms"


class DPMSolverSampler(DDIMSampler):
    """DPM-Solver++(2M) for a diffusion model; eta is 0."""

    name = "dpm_solver"
