"""Pictures of disentanglement: what each unit does to a sample. For every model that ``UnitDiffusion`` describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.models.diffusion.pictures import latent_diffusion_pictures
from ldm.models.inputs import images_from_batch
from ldm.pictures.grid import CaptionedGrid

if TYPE_CHECKING:
    from ldm.models.diffusion.units import UnitCodes, UnitDiffusion

Pictures = dict[str, Tensor | CaptionedGrid]

# Pictures of latent_diffusion_pictures that have to be sampled, with its defaults.
_SAMPLED = {"quantize_denoised": True, "inpaint": True, "plot_denoise_rows": False, "plot_progressive_rows": True}


def unit_pictures(
    model: UnitDiffusion,
    batch: Mapping[str, Any],
    N: int = 8,
    n_row: int = 8,
    sample: bool = True,
    ddim_steps: int | None = 200,
    ddim_eta: float = 1.0,
    guidance_scale: float = 1.0,
    plot_swapped_concepts: bool = False,
    plot_swapped_concepts_partial: bool = True,
    plot_decoded_xstart: bool = False,
    return_keys: Sequence[str] | None = None,
    **options: Any,
) -> Pictures:
    """LDM's pictures, samples, and swap grids, under the family's names.

    All samples of a column start from one noise and see the same noise on their way, so that they differ by their
    codes alone.

    Args:
        model: the model, its averaged weights in place.
        batch: images and whatever the codes are read from.
        N: how many columns at most.
        n_row: rows of the pictures that show a process.
        sample: draw samples; False leaves out all pictures that need them.
        ddim_steps: DDIM steps; None samples all T steps.
        ddim_eta: see ``ddim_sample``; 0 keeps what a unit does not change in place.
        guidance_scale: factor of the sub-gradients in samples and swaps, 1 as trained.
        plot_swapped_concepts: one row per unit, in which every sample takes that unit of the first sample.
        plot_swapped_concepts_partial: the same codes, but only that unit's gradient is added to the base model.
        plot_decoded_xstart: predicted clean images at falling noise: base, each unit alone, all.
        return_keys: only pictures of these names; all if there is none of them.
        **options: of ``latent_diffusion_pictures``, which this calls.

    Returns:
        name -> images (n, 3, H, W) in about [-1, 1], or a captioned grid.
    """
    batch = {key: value[:N] for key, value in batch.items() if hasattr(value, "__getitem__")}
    wanted = {**_SAMPLED, **options}
    pictures: Pictures = latent_diffusion_pictures(
        model,
        batch,
        N=N,
        n_row=n_row,
        sample=sample and any(wanted[name] for name in _SAMPLED),
        ddim_steps=ddim_steps,
        ddim_eta=ddim_eta,
        **options,
    )
    images, z = images_from_batch(batch, model.first_stage_key), model.get_input(batch)
    cond = model.get_condition(batch)._replace(guidance=guidance_scale)
    units, columns = model.unit_captions(batch)
    if sample:
        sampler = _Sampler(model, torch.randn_like(z), ddim_steps, ddim_eta)
        own = sampler(cond)
        pictures["samples"] = CaptionedGrid(torch.cat([images, own]), ["image", "sample"], columns)
        swaps = {"samples_swapping": plot_swapped_concepts, "samples_swapping_partial": plot_swapped_concepts_partial}
        for name, is_asked in swaps.items():
            is_partial = name.endswith("partial")
            if is_asked and (model.model.diffusion_model.is_separate or not is_partial):
                pictures[name] = _swap_grid(model, cond, sampler, own, units, columns, is_partial)
    if plot_decoded_xstart:
        pictures |= _predicted_starts(model, z[:n_row], cond.first(n_row), units)
    chosen = {key: pictures[key] for key in return_keys or () if key in pictures}
    return chosen or pictures


class _Sampler:
    """Samples of different codes from the same noise, at the start and on the way.

    Args:
        model: the model.
        x_T: (N, C, H, W) noise to start from.
        num_steps: DDIM steps, None for all T.
        eta: see ``ddim_sample``.
    """

    def __init__(self, model: UnitDiffusion, x_T: Tensor, num_steps: int | None, eta: float) -> None:
        self.model, self.x_T, self.num_steps, self.eta = model, x_T, num_steps, eta
        self._seed = int(torch.randint(2**31, ()))

    def __call__(self, cond: UnitCodes) -> Tensor:
        """(N, 3, H, W) in [-1, 1]."""
        devices = [self.x_T.device] if self.x_T.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self._seed)
            return self.model.decode_condition(cond, self.x_T, self.num_steps, self.eta)


def _swap_grid(
    model: UnitDiffusion,
    cond: UnitCodes,
    sampler: _Sampler,
    own: Tensor,
    units: Sequence[str],
    columns: list[str],
    is_partial: bool,
) -> CaptionedGrid:
    """First row the samples themselves; row k the samples with the first sample's unit k."""
    rows = [own]
    for unit in range(model.latent_unit):
        only = torch.full((len(own),), unit, device=own.device) if is_partial else None
        rows.append(sampler(cond.swapped(unit)._replace(only=only)))
    title = "that unit from the first sample, its gradient alone" if is_partial else "that unit from the first sample"
    return CaptionedGrid(torch.cat(rows), ["own units", *units], columns, title)


def _predicted_starts(model: UnitDiffusion, z: Tensor, cond: UnitCodes, units: Sequence[str]) -> Pictures:
    """``predXstart_*``: decoded x0 estimates of noisy images, one row per image, noise growing to the right.

    ``_st`` of the base model, ``_0``, ``_1``, ... with one unit's gradient added, ``_fl`` with all of them.
    """
    last, every = model.num_timesteps - 1, max(model.log_every_t // 2, 1)
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
