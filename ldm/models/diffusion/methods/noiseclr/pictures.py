"""Pictures of learned directions while they train: samples with and without each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.directions import Edit
from ldm.diffusion.samplers import DDIMSampler, Sampler, build_sampler
from ldm.models.diffusion.methods.noiseclr.denoiser import FrozenDenoiser
from ldm.models.diffusion.methods.noiseclr.directions import DirectionSet
from ldm.pictures.grid import CaptionedGrid


def direction_grid(
    denoiser: FrozenDenoiser,
    directions: DirectionSet,
    num_images: int = 4,
    num_directions: int = 8,
    strength: float = 2.0,
    sampler: Sampler | Mapping[str, Any] | str | None = None,
) -> CaptionedGrid:
    """Return samples without an edit, and one row for each of the first directions, from the same noise.

    Args:
        denoiser: the denoiser of the directions.
        directions: the directions.
        num_images: columns.
        num_directions: rows below the first one.
        strength: strength of every direction, over all steps.
        sampler: see ``build_sampler``; by default DDIM with 20 steps.
    """
    chosen = DDIMSampler(20) if sampler is None else build_sampler(sampler)
    schedule = denoiser.schedule
    shown = range(min(num_directions, len(directions)))
    x_T = torch.randn(num_images, *denoiser.latent_shape, device=schedule.betas.device)
    images: list[Tensor] = []
    for index, factor in ((0, 0.0), *((index, strength) for index in shown)):
        denoise = directions.edited(denoiser, [Edit(index, factor)], chosen, num_images)
        images.append(denoiser.decode(chosen.sample(denoise, x_T, schedule)))
    captions = ["no edit", *(directions.names[index] for index in shown)]
    return CaptionedGrid(torch.cat(images).clamp(-1, 1), captions, [], f"directions at strength {strength:g}")
