"""Pictures of disentanglement: what each unit changes in a sample, for every ``UnitDiffusion`` model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.conditions import UnitCodes
from ldm.diffusion.noise import fixed_noise
from ldm.diffusion.samplers import Sampler
from ldm.models.diffusion.pictures import Pictures, chosen_pictures, first_samples, latent_diffusion_pictures
from ldm.models.inputs import images_from_batch
from ldm.pictures.grid import CaptionedGrid

# Pictures of latent_diffusion_pictures that have to be sampled, with its defaults.
_SAMPLED = {"quantize_denoised": True, "inpaint": True, "plot_denoise_rows": False, "plot_progressive_rows": True}


def unit_pictures(
    model: Any,
    batch: Mapping[str, Any],
    N: int = 8,
    n_row: int = 8,
    sample: bool = True,
    sampler: Sampler | Mapping[str, Any] | str | None = None,
    guidance_scale: float = 1.0,
    plot_swapped_concepts: bool = False,
    plot_swapped_concepts_partial: bool = True,
    plot_decoded_xstart: bool = False,
    return_keys: Sequence[str] | None = None,
    **options: Any,
) -> Pictures:
    """Draw LDM's pictures, samples, and swap grids, under the family's names.

    All samples of a column start from one noise and see the same noise, so that they differ by their codes alone.

    Args:
        model: a ``UnitDiffusion``, its averaged weights in place.
        batch: images and the entries that codes are read from.
        N: maximum number of columns.
        n_row: number of rows of the pictures that show a process.
        sample: draw samples; False leaves out all pictures that need them.
        sampler: see ``build_sampler``; a deterministic one keeps in place what a unit does not change.
        guidance_scale: factor of the sub-gradients in samples and swaps, 1 as trained.
        plot_swapped_concepts: one row per unit, in which every sample takes that unit of the first sample.
        plot_swapped_concepts_partial: the same codes, but only that unit's gradient is added to the base model.
        plot_decoded_xstart: predicted clean images at falling noise: base, each unit alone, all.
        return_keys: only pictures of these names; all if none of them exists.
        **options: of ``latent_diffusion_pictures``, which this calls.

    Returns:
        name -> images (n, 3, H, W) in about [-1, 1], or a captioned grid.
    """
    batch, chosen = first_samples(batch, N), model.choose_sampler(sampler, *model.picture_steps_and_eta)
    wanted = {**_SAMPLED, **options}
    pictures = latent_diffusion_pictures(
        model,
        batch,
        N=N,
        n_row=n_row,
        sample=sample and any(wanted[key] for key in _SAMPLED),
        sampler=chosen,
        **options,
    )
    images, z = images_from_batch(batch, model.first_stage_key), model.get_input(batch)
    cond = replace(model.get_condition(batch), guidance=guidance_scale)
    units, columns = model.unit_captions(batch)
    if sample:
        draw = _SameNoise(model, torch.randn_like(z), chosen)
        own = draw(cond)
        pictures["samples"] = CaptionedGrid(torch.cat([images, own]), ["image", "sample"], columns)
        swaps = {"samples_swapping": plot_swapped_concepts, "samples_swapping_partial": plot_swapped_concepts_partial}
        for name, is_asked in swaps.items():
            is_partial = name.endswith("partial")
            if is_asked and (model.model.diffusion_model.is_separate or not is_partial):
                pictures[name] = _swap_grid(model, cond, draw, own, units, columns, is_partial)
    if plot_decoded_xstart:
        pictures |= _predicted_starts(model, z[:n_row], cond.first(n_row), units)
    return chosen_pictures(pictures, return_keys)


class _SameNoise:
    """Samples of different codes from the same noise, at the start and on the way.

    Args:
        model: the model.
        x_T: (N, C, H, W) noise to start from.
        sampler: the sampler.
    """

    def __init__(self, model: Any, x_T: Tensor, sampler: Sampler) -> None:
        self.model, self.x_T, self.sampler = model, x_T, sampler
        self._seed = int(torch.randint(2**31, ()))

    def __call__(self, cond: UnitCodes) -> Tensor:
        """Return (N, 3, H, W) in [-1, 1]."""
        with fixed_noise(self._seed, self.x_T.device):
            return self.model.decode_condition(cond, self.x_T, self.sampler)


def _swap_grid(
    model: Any, cond: UnitCodes, draw: _SameNoise, own: Tensor, units: Sequence[str], columns: list, is_partial: bool
) -> CaptionedGrid:
    """Return the samples themselves, and below them one row per unit, taken from the first sample."""
    rows = [own]
    for unit in range(model.latent_unit):
        only = torch.full((len(own),), unit, device=own.device) if is_partial else None
        rows.append(draw(replace(cond.swapped(unit), only=only)))
    title = "that unit from the first sample, its gradient alone" if is_partial else "that unit from the first sample"
    return CaptionedGrid(torch.cat(rows), ["own units", *units], columns, title)


def _predicted_starts(model: Any, z: Tensor, cond: UnitCodes, units: Sequence[str]) -> Pictures:
    """Return ``predXstart_*``: decoded x0 estimates of noisy images, one row per image, noise growing to the right.

    ``_st`` of the base model, ``_0``, ``_1``, ... with one unit's gradient added, ``_fl`` with all of them.
    """
    last, every = model.num_timesteps - 1, max(model.input_options.log_every_t // 2, 1)
    timesteps = [t for t in range(model.num_timesteps // 2, last) if t % every == 0] + [last]
    noise, columns = torch.randn_like(z), []
    for step in timesteps:
        t = torch.full((len(z),), step, device=z.device)
        x_t = model.q_sample(z, t, noise)
        out = model.gradients(x_t, t, cond)
        shifts = [torch.zeros_like(out.pred), out.out_grad, *out.unit_grad.unbind(1)]
        scale = model.gradient_scale(t, out.pred)
        starts = [model.start_from_prediction(x_t, t, out.pred + scale * shift) for shift in shifts]
        decoded = [model.decode_first_stage(start).clamp(-1, 1) for start in starts]
        columns.append(torch.stack(decoded))  # (2 + K, n, 3, H, W)
    by_shift = torch.stack(columns, dim=2).flatten(1, 2)  # (2 + K, n * steps, 3, H, W)
    named = {"predXstart_st": "base model", "predXstart_fl": "all units"}
    if model.model.diffusion_model.is_separate:
        named |= {f"predXstart_{unit}": f"{caption} alone" for unit, caption in enumerate(units)}
    captions = [f"t = {step}" for step in timesteps]
    return {
        name: CaptionedGrid(images, [""] * len(z), captions, f"predicted clean image, {title}")
        for (name, title), images in zip(named.items(), by_shift)
    }
