"""Samples of every condition under every strength of the guidance, in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.diffusion.conditions import TensorCondition
from ldm.diffusion.samplers import SamplerStep

STRENGTHS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)  # strengths w of the reference code


def sample_strengths(
    sample: Callable[..., Tensor], conditions: Tensor, strengths: Sequence[float], x_T: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Sample N conditions under each of W strengths w of the guidance (1 + w) e_cond - w e_null.

    Args:
        sample: function (x_T, condition, guidance_scale=, callback=) -> samples.
        conditions: (N, D).
        strengths: W values of w; 0 is the condition itself, -1 no condition, and below the opposite of it.
        x_T: (W N, C, H, W) standard normal noise.

    Returns:
        samples (W N, C, H, W) of which row w N + n has strength w and condition n, and the states after the time steps
        t with t % 10 == 0 or t < 10, latest t first, each (W N, C, H, W).
    """
    scales = [1.0 + w for w in strengths]
    scale: float | Tensor = scales[0]
    if len(set(scales)) > 1:
        scale = torch.tensor(scales).repeat_interleave(len(conditions)).to(conditions)
    frames: list[Tensor] = []

    def keep(step: SamplerStep) -> None:
        if step.timestep % 10 == 0 or step.timestep < 10:
            frames.append(step.x)

    repeated = TensorCondition(conditions.repeat(len(scales), 1))
    return sample(x_T, repeated, guidance_scale=scale, callback=keep), frames
