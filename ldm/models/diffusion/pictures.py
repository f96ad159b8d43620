"""Pictures of a diffusion model: inputs, reconstructions, samples, and the process between."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.samplers import Hooks, Inpainting, Sampler, SamplerStep
from ldm.models.inputs import images_from_batch
from ldm.pictures.grid import CaptionedGrid
from ldm.util import ConfigError, did_you_mean

Pictures = dict[str, Tensor | CaptionedGrid]

# Options of DisDiff's and EncDiff's pictures, which the family's configs of plain models contain as well.
OPTIONS_ELSEWHERE = ("plot_swapped_concepts", "plot_swapped_concepts_partial", "plot_decoded_xstart", "sample_swap")

# Defaults of methods that draw their own pictures beside inputs and samples.
INPUTS_AND_SAMPLES = dict.fromkeys("inpaint quantize_denoised plot_diffusion_rows plot_progressive_rows".split(), False)


class Trajectory:
    """A sampler callback that keeps the x0 estimates and noisy states of every ``every``-th visited step."""

    def __init__(self, every: int) -> None:
        self.every = max(every, 1)
        self.timesteps: list[int] = []
        self.states: list[Tensor] = []
        self.estimates: list[Tensor] = []

    def __call__(self, step: SamplerStep) -> None:
        """Keep every ``every``-th step, and the last one."""
        if step.position % self.every == 0:
            self.timesteps.append(step.timestep)
            self.states.append(step.x)
            self.estimates.append(step.pred_x0)


def latent_diffusion_pictures(
    model: Any,
    batch: Mapping[str, Any],
    N: int = 8,
    n_row: int = 4,
    sample: bool = True,
    sampler: Sampler | Mapping[str, Any] | str | None = None,
    quantize_denoised: bool = True,
    inpaint: bool = True,
    plot_diffusion_rows: bool = True,
    plot_denoise_rows: bool = False,
    plot_progressive_rows: bool = True,
    unconditional_guidance_scale: float = 1.0,
    unconditional_guidance_label: Sequence[str] | str | None = None,
    return_keys: Sequence[str] | None = None,
    **elsewhere: Any,
) -> Pictures:
    """Draw LDM's pictures under LDM's names.

    Args:
        model: a ``DDPM``, its averaged weights in place.
        batch: images (and conditions), as returned by the data loader.
        N: maximum number of images.
        n_row: number of rows of the pictures that show a process.
        sample: draw samples.
        sampler: see ``build_sampler``; by default that of the model, or DDIM as in LDM (200 steps, eta 1).
        quantize_denoised: also sample with each estimate on the codebook.
        inpaint: also fill in the middle, and all but the middle, of given images.
        plot_diffusion_rows: the forward process.
        plot_denoise_rows: x0 estimates along the way.
        plot_progressive_rows: noisy states along the way.
        unconditional_guidance_scale: above 1, also samples with classifier-free guidance of this scale.
        unconditional_guidance_label: one negative text of the guidance; by default no condition.
        return_keys: only pictures of these names; all if none of them exists.
        **elsewhere: options of other models of the family, which are ignored.

    Returns:
        name -> (n, 3, H, W) in about [-1, 1], or a captioned grid for processes and conditions in words.

    Raises:
        ConfigError: an option that no model of the family has.
    """
    _check_options(elsewhere)
    chosen = model.choose_sampler(sampler, *model.picture_steps_and_eta)
    batch = first_samples(batch, N)
    images = images_from_batch(batch, model.first_stage_key)
    z, cond = model.get_input(batch), model.get_condition(batch)
    pictures: Pictures = {"inputs": images, "reconstruction": model.decode_first_stage(z)}
    if plot_diffusion_rows:
        pictures["diffusion_row"] = _forward_process(model, z[:n_row])
    if not sample:
        return chosen_pictures(pictures, return_keys)
    noise = torch.randn_like(z)
    trajectory = Trajectory(chosen.num_evaluations(model.num_timesteps) // 8)
    latent = model.sample(noise, cond, chosen, callback=trajectory)
    pictures["samples"] = model.decode_first_stage(latent)
    if plot_denoise_rows:
        pictures["denoise_row"] = _process(model, trajectory.estimates, trajectory.timesteps, n_row)
    if plot_progressive_rows:
        pictures["progressive_row"] = _process(model, trajectory.states, trajectory.timesteps, n_row)
    if quantize_denoised and model.quantizes and chosen.takes_hooks:
        latent = model.sample(noise, cond, chosen, hooks=Hooks(quantize_x0=model.quantize_latent))
        pictures["samples_x0_quantized"] = model.decode_first_stage(latent)
    if inpaint and chosen.takes_hooks:
        pictures |= _inpainting(model, z, cond, chosen)
    pictures |= _conditioning(model, batch, images, pictures["samples"])
    if unconditional_guidance_scale > 1 and cond is not None:
        label = "".join(unconditional_guidance_label or "")
        null = model.condition_from_texts([label] * len(z), batch) if label else None
        latent = model.sample(noise, cond, chosen, guidance_scale=unconditional_guidance_scale, null=null)
        pictures[f"samples_cfg_scale_{unconditional_guidance_scale:.2f}"] = model.decode_first_stage(latent)
    return chosen_pictures(pictures, return_keys)


def first_samples(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the first samples of a batch's tensors and lists; entries of other types are left out."""
    return {key: value[:count] for key, value in batch.items() if isinstance(value, (Tensor, Sequence))}


def chosen_pictures(pictures: Pictures, names: Sequence[str] | None) -> Pictures:
    """Return the pictures of the given names; all if none of them exists."""
    return {key: pictures[key] for key in names or () if key in pictures} or pictures


def _check_options(options: Mapping[str, Any]) -> None:
    unknown = sorted(set(options) - set(OPTIONS_ELSEWHERE))
    if unknown:
        known = [*inspect.signature(latent_diffusion_pictures).parameters][2:-1]
        raise ConfigError(
            f"log_images_kwargs: unexpected option {unknown[0]!r}.{did_you_mean(unknown[0], known)} Accepted: "
            f"{', '.join(known)}"
        )


def _conditioning(model: Any, batch: Mapping[str, Any], images: Tensor, samples: Tensor) -> Pictures:
    """Return concatenated maps, and the condition where it is an image, else images and samples beside its words."""
    key = model.cond_stage_key
    maps = {f"concat_{name}": images_from_batch(batch, name) for name in model.concat_keys}
    pictures: Pictures = {name: shown.expand(-1, 3, -1, -1) for name, shown in maps.items() if shown.shape[1] in (1, 3)}
    if model.model.conditioning_key is None or key in (None, model.first_stage_key) or key not in batch:
        return pictures
    value = batch[key]
    if isinstance(value, Tensor) and value.ndim == 4:
        return pictures | {"conditioning": _in_color(images_from_batch(batch, key))}
    if isinstance(value, Tensor) and value.ndim > 1:
        return pictures
    words = batch.get("human_label", value) if isinstance(value, Tensor) else value
    words = words.tolist() if isinstance(words, Tensor) else words
    rows = [", ".join(word) if isinstance(word, (list, tuple)) else str(word) for word in words]
    pairs = torch.stack([images, samples], dim=1).flatten(0, 1)  # (2 n, 3, H, W)
    return pictures | {"conditioning": CaptionedGrid(pairs, rows, ["image", "sample"])}


def _in_color(maps: Tensor) -> Tensor:
    """Return images or maps (B, C, H, W) as (B, 3, H, W); more channels are mixed in fixed random colors, as in LDM."""
    count = maps.shape[1]
    if count in (1, 3):
        return maps.expand(-1, 3, -1, -1)
    colors = torch.randn(3, count, 1, 1, generator=torch.Generator().manual_seed(0)).to(maps)
    shown = F.conv2d(maps, colors)
    return 2 * (shown - shown.min()) / (shown.max() - shown.min()).clamp_min(1e-6) - 1


def _inpainting(model: Any, z: Tensor, cond: Any, sampler: Sampler) -> Pictures:
    """Fill in the middle, and the surroundings of the middle; ``mask`` is one where the image is given."""
    height, width = z.shape[-2:]
    given = torch.ones_like(z[:, :1])
    given[:, :, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 0.0
    pictures: Pictures = {"mask": given.expand(-1, 3, -1, -1) * 2 - 1}
    for name, mask in (("samples_inpainting", given), ("samples_outpainting", 1 - given)):
        latent = model.sample(torch.randn_like(z), cond, sampler, hooks=Hooks(inpainting=Inpainting(mask, z)))
        pictures[name] = model.decode_first_stage(latent)
    return pictures


def _forward_process(model: Any, z: Tensor) -> CaptionedGrid:
    """Return decoded x_t at every ``log_every_t``-th time step, one row per image."""
    timesteps = [
        t
        for t in range(model.num_timesteps)
        if t % model.input_options.log_every_t == 0 or t == model.num_timesteps - 1
    ]
    noise = torch.randn_like(z)
    states = [model.q_sample(z, torch.full((len(z),), t, device=z.device), noise) for t in timesteps]
    return _process(model, states, timesteps, len(z))


def _process(model: Any, states: list[Tensor], timesteps: list[int], rows: int) -> CaptionedGrid:
    rows = min(rows, len(states[0]))
    columns = [model.decode_first_stage(state[:rows]) for state in states]
    images = torch.stack(columns, dim=1).flatten(0, 1)  # (rows * columns, 3, H, W)
    return CaptionedGrid(images, [""] * rows, [f"t = {t}" for t in timesteps])
