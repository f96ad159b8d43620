"""Pictures of disentanglement: what each unit does to a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.models.inputs import batch_value, images_from_batch
from ldm.models.pictures import CaptionedGrid

if TYPE_CHECKING:
    from ldm.models.diffusion.clip_disdiff import CLIPDisDiff


def clip_disdiff_pictures(
    model: CLIPDisDiff,
    batch: Mapping[str, Any],
    N: int = 8,
    ddim_steps: int = 50,
    ddim_eta: float = 0.0,
    guidance_scale: float = 1.0,
    plot_swapped_concepts: bool = True,
    plot_swapped_concepts_partial: bool = True,
    plot_decoded_xstart: bool = False,
) -> dict[str, Tensor | CaptionedGrid]:
    """Inputs, samples of their text, and swap grids, all from one noise per column.

    Args:
        model: the model, its averaged weights in place.
        batch: images and texts.
        N: how many columns at most.
        ddim_steps: DDIM steps.
        ddim_eta: see ``ddim_sample``; 0 keeps what the text does not change in place.
        guidance_scale: factor of the sub-gradients.
        plot_swapped_concepts: one row per unit, in which every sample takes that unit's text of the first sample.
        plot_swapped_concepts_partial: the same texts, but only that unit's gradient is added to the base model.
        plot_decoded_xstart: predicted clean images from one noisy latent: base, each unit alone, all.

    Returns:
        name -> images (n, 3, H, W) in [-1, 1] or a captioned grid.
    """
    images = images_from_batch(batch, model.first_stage_key)[:N]
    texts = [list(strings) for strings in batch_value(batch, model.cond_stage_key)[:N]]
    z = model.encode_first_stage(images)
    x_T = torch.randn_like(z)
    options = {"num_steps": ddim_steps, "eta": ddim_eta, "guidance_scale": guidance_scale}
    samples = model.sample_edit(texts, x_T, **options)
    columns = ["\n".join(strings) for strings in texts]
    pictures: dict[str, Tensor | CaptionedGrid] = {
        "inputs": images,
        "reconstruction": model.decode_first_stage(z).clamp(-1, 1),
        "samples": CaptionedGrid(torch.cat([images, samples]), ["image", "sample of its text"], columns),
    }
    if plot_swapped_concepts:
        pictures["samples_swapping"] = _swap_grid(model, texts, samples, x_T, options, partial=False)
    if plot_swapped_concepts_partial:
        pictures["samples_swapping_partial"] = _swap_grid(model, texts, samples, x_T, options, partial=True)
    if plot_decoded_xstart:
        pictures |= _predicted_starts(model, texts, z)
    return pictures


def _swap_grid(
    model: CLIPDisDiff, texts: list[list[str]], samples: Tensor, x_T: Tensor, options: dict, partial: bool
) -> CaptionedGrid:
    """First row the samples themselves; row k the samples with the first sample's text in unit k."""
    rows, captions = [samples], ["own text"]
    for unit in range(model.latent_unit):
        swapped = [strings[:unit] + [texts[0][unit]] + strings[unit + 1 :] for strings in texts]
        only = torch.full((len(texts),), unit, device=x_T.device) if partial else None
        rows.append(model.sample_edit(swapped, x_T, only=only, **options))
        captions.append(f"unit {unit + 1}: {texts[0][unit] or 'unset'}")
    title = "one unit's gradient alone" if partial else "one attribute changed, all else equal"
    return CaptionedGrid(torch.cat(rows), captions, ["\n".join(strings) for strings in texts], title)


def _predicted_starts(model: CLIPDisDiff, texts: list[list[str]], z: Tensor) -> dict[str, CaptionedGrid]:
    """``predXstart``: decoded x0 estimates at falling noise from the base, each unit alone, and all units."""
    first, cond = z[:1], model.encode_text(texts[:1])
    timesteps = list(range(model.num_timesteps - 1, 0, -max(model.num_timesteps // 8, 1)))
    t = torch.tensor(timesteps, device=z.device)
    repeated = first.expand(len(t), -1, -1, -1)
    x_t = model.q_sample(repeated, t, torch.randn_like(first).expand_as(repeated))
    cond = cond._replace(codes=cond.codes.expand(len(t), -1, -1), mask=cond.mask.expand(len(t), -1))
    out = model.gradients(x_t, t, cond)
    scale = model.gradient_scale(t, out.pred)
    shifts = [torch.zeros_like(out.pred), *out.unit_grad.unbind(1), out.out_grad]
    estimates = [out.pred + scale * shift for shift in shifts]
    rows = [model.decode_first_stage(model.start_from_prediction(x_t, t, e)).clamp(-1, 1) for e in estimates]
    captions = ["base", *(string or "unset" for string in texts[0]), "all"]
    return {"predXstart": CaptionedGrid(torch.cat(rows), captions, [f"t = {step}" for step in timesteps])}
