"""Noise of real images: DDIM inversion (Song et al. 2021), and null-text optimisation (Mokady et al. 2023).

DDIM is read backwards over the time steps of a sampler, so that sampling from the noise found gives the image again.
With guidance it does not; null-text optimisation learns a null condition for every step with which it does.

Legend: B batch, T time steps of the schedule, S steps of the sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.conditions import Condition, TensorCondition
from ldm.diffusion.directions import NoisePredictor, visited_positions
from ldm.diffusion.samplers import Denoiser
from ldm.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class ConditionsByStep:
    """Conditions that differ between the steps of a sampler; a function of the time step.

    Attributes:
        values: (S, B, ...) condition at each visited time step, ascending.
        positions: (T,) int64, index of the condition at each time step.
    """

    values: Tensor
    positions: Tensor

    def __call__(self, t: Tensor) -> TensorCondition:
        """Return the conditions of B samples at t (B,); no value is read on the host."""
        samples = torch.arange(len(t), device=t.device)
        return TensorCondition(self.values[self.positions[t], samples])


def ddim_step(x: Tensor, eps: Tensor, abar: Tensor, abar_next: Tensor) -> Tensor:
    """Return x (B, C, H, W) moved from cumulative alpha ``abar`` to ``abar_next`` without noise (DDIM, Eq. 12)."""
    x0 = (x - torch.sqrt(1 - abar) * eps) / torch.sqrt(abar)
    return torch.sqrt(abar_next) * x0 + torch.sqrt(1 - abar_next) * eps


def _step_alphas(schedule: NoiseSchedule, timesteps: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the cumulative alphas (S,) before and after each step of the inversion, as in ``SamplerState``."""
    return schedule.alphas_cumprod[[0, *timesteps[:-1]]], schedule.alphas_cumprod[timesteps]


@torch.no_grad()
def invert(denoise: Denoiser, x_0: Tensor, schedule: NoiseSchedule, timesteps: np.ndarray) -> Tensor:
    """Return the states from images to noise by DDIM inversion, (S + 1, B, C, H, W).

    The noise at the next time step is predicted from the state at the previous one. The error of this
    approximation falls with the number of steps.

    Args:
        denoise: predicted noise, without guidance.
        x_0: (B, C, H, W) images or latents.
        schedule: schedule of the denoiser, on the device of ``x_0``.
        timesteps: (S,) time steps of the sampler that starts from the last state, ascending.
    """
    states = [x_0]
    for t, abar, abar_next in zip(timesteps, *_step_alphas(schedule, timesteps)):
        eps = denoise(states[-1], torch.full((len(x_0),), int(t), device=x_0.device))
        states.append(ddim_step(states[-1], eps.to(x_0), abar, abar_next))
    return torch.stack(states)


def null_text(
    predict: NoisePredictor,
    cond: Condition,
    null: TensorCondition,
    states: Tensor,
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    guidance_scale: float = 7.5,
    num_iterations: int = 10,
    on_step: Callable[[], None] = lambda: None,
) -> ConditionsByStep:
    """Return null conditions with which guided sampling follows the states of an inversion (null-text optimisation).

    At step i from the noisiest, Adam with learning rate 0.01 (1 - i / 2S) minimises the squared distance to the state
    of the inversion, until it is below 1e-5 + 2e-5 i for all images. An image below it stays as it is, so that images
    of a batch do not depend on each other. Each step starts from the condition and the state of the step before it.

    Args:
        predict: the denoiser; gradients reach its condition.
        cond: conditions of the B images, used for the inversion.
        null: no condition, B samples.
        states: (S + 1, B, C, H, W) of :func:`invert`.
        schedule, timesteps: see :func:`invert`.
        guidance_scale: of the guidance between the null condition and ``cond``.
        num_iterations: largest number of iterations per step.
        on_step: called after each of the S steps.
    """
    num_steps, x = len(timesteps), states[-1]
    before, after = _step_alphas(schedule, timesteps)
    value, found = null.value.detach().clone(), []

    def sampled(current: Tensor, x: Tensor, t: Tensor, under: Tensor, position: int) -> Tensor:
        without = predict(x, t, TensorCondition(current, null.empty), None)
        eps = without + guidance_scale * (under - without)
        return ddim_step(x, eps.to(x), after[position], before[position])

    for i, position in enumerate(reversed(range(num_steps))):
        t = torch.full((len(x),), int(timesteps[position]), device=x.device)
        with torch.no_grad():
            under = predict(x, t, cond, None)
        parameter = value.clone().requires_grad_()
        optimizer = torch.optim.Adam([parameter], lr=1e-2 * (1 - i / (2 * num_steps)))
        for _ in range(num_iterations):
            with torch.enable_grad():
                difference = sampled(parameter, x, t, under, position) - states[position]
                loss = difference.square().flatten(1).mean(1)  # (B,)
            is_far = loss.detach() >= 1e-5 + 2e-5 * i
            if not is_far.any():
                break
            (parameter.grad,) = torch.autograd.grad(loss.sum(), [parameter])
            optimizer.step()
            value = torch.where(is_far.reshape(-1, *[1] * (value.ndim - 1)), parameter.detach(), value)
            parameter.data.copy_(value)
        with torch.no_grad():
            x = sampled(value, x, t, under, position)
        found.append(value)
        on_step()
    positions = torch.from_numpy(visited_positions(timesteps, schedule.num_timesteps)).to(x.device)
    return ConditionsByStep(torch.stack(found[::-1]), positions)
