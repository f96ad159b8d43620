"""Edits along latent directions while sampling (NoiseCLR, Dalva & Yanardag 2024, section 3.3).

A direction is a condition d of the denoiser, which adds s (eps(x, t, d) - eps(x, t, none)) to the predicted noise, or a
shift of the features at the bottleneck of the network. Several edits apply at once, each in an interval of steps.

Legend: B batch, E edits, T time steps of the schedule, S steps of the sampler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.conditions import Condition
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.samplers import Denoiser
from ldm.util import ConfigError

NoisePredictor = Callable[[Tensor, Tensor, Any, Tensor | None], Tensor]
"""(x (B, C, H, W), t (B,), condition, shift of the bottleneck or None) -> predicted noise (B, C, H, W)."""

Negative = Condition | Callable[[Tensor], Condition] | None
"""Negative condition of guidance; a function of t (B,) where it differs between time steps; None for no condition."""


@dataclass(frozen=True)
class Edit:
    """Strength of one direction, and the steps of the sampler in which it acts.

    Attributes:
        direction: position in the set of directions.
        strength: factor of the direction, negative for its opposite.
        start: first step, 0 for the noisiest one.
        end: last step, included; None for the last step of the sampler.
    """

    direction: int
    strength: float
    start: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or (self.end is not None and self.end < self.start):
            raise ConfigError(f"edit: expected 0 <= start <= end, got start {self.start} and end {self.end}")
        if not np.isfinite(self.strength):
            raise ConfigError(f"edit: expected a finite strength, got {self.strength}")


def step_weights(edits: Sequence[Edit], timesteps: np.ndarray, num_timesteps: int) -> Tensor:
    """Return the strength of each edit at each time step of the schedule, (E, T) float32.

    Args:
        edits: the edits.
        timesteps: (S,) time steps that the sampler visits, ascending.
        num_timesteps: T.
    """
    step = len(timesteps) - 1 - visited_positions(timesteps, num_timesteps)  # 0 for the noisiest
    weights = np.zeros((len(edits), num_timesteps), dtype=np.float32)
    for row, edit in zip(weights, edits):
        end = len(timesteps) - 1 if edit.end is None else edit.end
        row[(step >= edit.start) & (step <= end)] = edit.strength
    return torch.from_numpy(weights)


def visited_positions(timesteps: np.ndarray, num_timesteps: int) -> np.ndarray:
    """Return the position of each time step (T,) among the visited ones (S,): that of the last one before it."""
    return np.searchsorted(timesteps, np.arange(num_timesteps), side="right").clip(min=1) - 1


def strengths_at(weights: Tensor, t: Tensor) -> Tensor:
    """Return the strength of each edit for each sample, (E, B), of weights (E, T) or (E, B, T) at t (B,)."""
    if weights.ndim == 2:
        return weights[:, t]
    return weights.gather(2, t.expand(len(weights), -1)[..., None])[..., 0]


def edited_by_conditions(
    predict: NoisePredictor,
    cond: Condition | None,
    null: Condition,
    directions: Sequence[Condition],
    weights: Tensor,
    guidance_scale: float = 1.0,
    negative: Negative = None,
) -> Denoiser:
    """Return eps_guided + sum_k w_k(t) (eps(d_k) - eps(null)) as a function of x and t; one call of the network.

    Args:
        predict: the denoiser.
        cond: condition of the B samples; None samples without a condition.
        null: no condition, B samples.
        directions: E conditions of B samples each.
        weights: (E, T) or (E, B, T), see :func:`step_weights`, on the device of x.
        guidance_scale: of classifier-free guidance between ``negative`` and ``cond``; 1 for none.
        negative: negative condition, see ``Negative``.
    """
    is_guided = cond is not None and guidance_scale != 1
    parts = [null, *directions, *([] if cond is None else [cond])]
    joined = functools.reduce(lambda first, second: first.joined(second), parts)
    num_edits, count = len(directions), len(parts) + (is_guided and negative is not None)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        lower = _negative_at(negative, t) if is_guided else None
        every = joined if lower is None else joined.joined(lower)
        eps = predict(x.repeat(count, 1, 1, 1), t.repeat(count), every, None).unflatten(0, (count, len(x)))
        without, base = eps[0], eps[0] if cond is None else eps[num_edits + 1]
        if is_guided:
            away = without if lower is None else eps[-1]
            base = away + guidance_scale * (base - away)
        changes = eps[1 : num_edits + 1] - without
        return base + torch.einsum("eb,ebchw->bchw", strengths_at(weights, t).to(eps), changes)

    return denoise


def edited_by_shifts(
    predict: NoisePredictor,
    cond: Condition | None,
    null: Condition,
    shifts: Tensor,
    weights: Tensor,
    guidance_scale: float = 1.0,
    negative: Negative = None,
) -> Denoiser:
    """Return the guided prediction with sum_k w_k(t) v_k added to the features of the bottleneck.

    Args:
        predict, cond, null, weights, guidance_scale, negative: see :func:`edited_by_conditions`.
        shifts: (E, B, N) directions v_k, the features of the bottleneck as flat vectors.
    """
    base, scale = (null, 1.0) if cond is None else (cond, guidance_scale)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        shift = torch.einsum("eb,ebn->bn", strengths_at(weights, t).to(x), shifts.to(x))  # (B, N)

        def shifted(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            return predict(x, t, cond, shift.repeat(len(x) // len(shift), 1))

        return classifier_free(shifted, base, scale, _negative_at(negative, t) or null)(x, t)

    return denoise


def _negative_at(negative: Negative, t: Tensor) -> Condition | None:
    return negative if negative is None or isinstance(negative, Condition) else negative(t)
