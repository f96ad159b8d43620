"""Pictures of an EncDiff model: swaps, traversals, and where each unit is attended to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.samplers import Sampler
from ldm.models.diffusion.methods.encdiff.attention import CrossAttentionMaps, light_up
from ldm.models.diffusion.pictures import INPUTS_AND_SAMPLES, Pictures, chosen_pictures, latent_diffusion_pictures
from ldm.models.diffusion.traversal import decode_in_parts, traversal_grid, unit_captions
from ldm.models.inputs import images_from_batch
from ldm.pictures.grid import CaptionedGrid


def encdiff_pictures(
    model: Any,
    batch: Mapping[str, Any],
    N: int = 8,
    sampler: Sampler | Mapping[str, Any] | str | None = None,
    points: int = 7,
    plot_swapped_concepts: bool = True,
    plot_traversals: bool = True,
    plot_attention: bool = True,
    sample_swap: bool | None = None,
    return_keys: Sequence[str] | None = None,
    **options: Any,
) -> Pictures:
    """Draw inputs, samples of their units, and the effect of each unit.

    Args:
        model: an ``EncDiff``, its averaged weights in place.
        batch: images, as returned by the data loader; all of them determine the ranges of the units.
        N: maximum number of images.
        sampler: see ``build_sampler``; a deterministic one keeps in place what a unit does not change.
        points: columns of the traversals.
        plot_swapped_concepts: one row per unit, in which every sample takes that unit of the first image.
        plot_traversals: one row per unit, which moves over its range on the first image.
        plot_attention: one column per unit, each image lit where the unit is attended to.
        sample_swap: the reference's name of ``plot_swapped_concepts``; it has precedence.
        return_keys: only pictures of these names; all if none of them exists.
        **options: of ``latent_diffusion_pictures``, whose other pictures are omitted by default.

    Returns:
        name -> images (n, 3, H, W) in [-1, 1] or a captioned grid.
    """
    images = images_from_batch(batch, model.cond_stage_key)
    codes = model.encode_units(images)
    shown, base = images[:N], codes[:N]
    shape = (model.input_options.channels, *model.size_of_latents(batch))
    x_T = torch.randn(len(base), *shape, device=images.device)
    chosen = model.choose_sampler(sampler, *model.picture_steps_and_eta)
    pictures = latent_diffusion_pictures(model, batch, N=N, sampler=chosen, **{**INPUTS_AND_SAMPLES, **options})
    if plot_swapped_concepts if sample_swap is None else sample_swap:
        pictures["samples_swapping"] = _swap_grid(model, shown, base, x_T, chosen)
    if plot_traversals:
        pictures["traversals"] = traversal_grid(model, codes, base[:1], x_T[:1], points=points, sampler=chosen)
    if plot_attention:
        pictures["attention"] = attention_grid(model, shown, x_T, chosen)
    return chosen_pictures(pictures, return_keys)


def _swap_grid(model: Any, images: Tensor, codes: Tensor, x_T: Tensor, sampler: Sampler) -> CaptionedGrid:
    """Return images, their samples, and one row per unit that all samples take from the first image."""
    rows = [codes]
    for unit in range(model.latent_unit):
        swapped = codes.clone()
        swapped[:, unit] = codes[0, unit]
        rows.append(swapped)
    samples = decode_in_parts(model, torch.cat(rows), x_T.repeat(len(rows), 1, 1, 1), sampler=sampler)
    captions = ["image", "sample of its units", *unit_captions(model, range(model.latent_unit))]
    return CaptionedGrid(torch.cat([images, samples]), captions, [], "each row: that unit from the first image")


def attention_grid(model: Any, images: Tensor, x_T: Tensor, sampler: Sampler) -> CaptionedGrid:
    """Each image lit where each unit is attended to, averaged over the time steps of sampling it (the paper's figure).

    Args:
        model: an ``EncDiff``, its averaged weights in place.
        images: (N, 3, H, W) in [-1, 1].
        x_T: (N, C, H, W) noise.
        sampler: the sampler.

    Returns:
        one row per image; a unit's caption contains its share of all attention.
    """
    with CrossAttentionMaps(model.model.diffusion_model, x_T.shape[2:]) as recorder:
        model.decode_units(model.encode_units(images), x_T, sampler=sampler)
    maps = recorder.mean()  # (N, U, h, w)
    lit = [light_up(images, unit_maps) for unit_maps in maps.unbind(1)]
    shares = maps.mean(dim=(0, 2, 3)).tolist()
    captions = unit_captions(model, range(model.latent_unit))
    columns = ["image", *(f"{caption}\n{share:.0%}" for caption, share in zip(captions, shares))]
    rows = torch.stack([images, *lit], dim=1).flatten(0, 1)  # (N * (1 + U), 3, H, W)
    title = "where each unit is attended to, and its share of all attention (mean over time steps, layers and heads)"
    return CaptionedGrid(rows, [""] * len(images), columns, title)
