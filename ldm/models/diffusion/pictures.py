"""Pictures of a diffusion model: what goes in, what comes out, and the way between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.diffusion.samplers import Inpainting, SamplerStep
from ldm.models.inputs import images_from_batch
from ldm.models.pictures import CaptionedGrid

if TYPE_CHECKING:
    from ldm.models.diffusion.pixel_diffusion import DDPM


class Trajectory:
    """A sampler callback that keeps the x0 estimates and noisy states of every ``every``-th visited step."""

    def __init__(self, every: int) -> None:
        self.every = max(every, 1)
        self.timesteps: list[int] = []
        self.states: list[Tensor] = []
        self.estimates: list[Tensor] = []

    def __call__(self, step: SamplerStep) -> None:
        """Keep the step if its turn has come, or if it is the last."""
        if step.position % self.every == 0:
            self.timesteps.append(step.timestep)
            self.states.append(step.x)
            self.estimates.append(step.pred_x0)


def latent_diffusion_pictures(
    model: DDPM,
    batch: Mapping[str, Any],
    N: int = 8,
    n_row: int = 4,
    sample: bool = True,
    ddim_steps: int | None = 200,
    ddim_eta: float = 1.0,
    quantize_denoised: bool = True,
    inpaint: bool = True,
    plot_diffusion_rows: bool = True,
    plot_denoise_rows: bool = False,
    plot_progressive_rows: bool = True,
) -> dict[str, Tensor | CaptionedGrid]:
    """LDM's pictures under LDM's names.

    Args:
        model: the model, its averaged weights in place.
        batch: images (and conditions) as the data room delivers them.
        N: how many images at most.
        n_row: rows of the pictures that show a process.
        sample: draw samples.
        ddim_steps: DDIM steps; None samples all T steps.
        ddim_eta: see ``ddim_sample``.
        quantize_denoised: also sample with each estimate on the codebook.
        inpaint: also fill in the middle, and all but the middle, of given images.
        plot_diffusion_rows: the forward process.
        plot_denoise_rows: x0 estimates along DDIM.
        plot_progressive_rows: noisy states along DDIM.

    Returns:
        name -> (n, 3, H, W) in about [-1, 1], or a captioned grid for processes.
    """
    batch = {key: value[:N] for key, value in batch.items() if hasattr(value, "__getitem__")}
    images = images_from_batch(batch, model.first_stage_key)
    z, cond = model.get_input(batch), model.get_condition(batch)
    pictures: dict[str, Tensor | CaptionedGrid] = {"inputs": images, "reconstruction": model.decode_first_stage(z)}
    if plot_diffusion_rows:
        pictures["diffusion_row"] = _forward_process(model, z[:n_row])
    if not sample:
        return pictures
    noise = torch.randn_like(z)
    steps = ddim_steps or model.num_timesteps
    trajectory = Trajectory(steps // 8)
    latent = model.sample(noise, cond, ddim_steps, ddim_eta, callback=trajectory)
    pictures["samples"] = model.decode_first_stage(latent)
    if plot_denoise_rows:
        pictures["denoise_row"] = _process(model, trajectory.estimates, trajectory.timesteps, n_row)
    if plot_progressive_rows:
        pictures["progressive_row"] = _process(model, trajectory.states, trajectory.timesteps, n_row)
    if quantize_denoised and getattr(model, "quantizes", False):
        latent = model.sample(noise, cond, ddim_steps, ddim_eta, quantize_denoised=True)
        pictures["samples_x0_quantized"] = model.decode_first_stage(latent)
    if inpaint:
        pictures |= _inpainting(model, z, cond, ddim_steps, ddim_eta)
    return pictures


def _inpainting(model: DDPM, z: Tensor, cond: Any, num_steps: int | None, eta: float) -> dict[str, Tensor]:
    """The middle filled in, and the surroundings of the middle; ``mask`` is one where the image was given."""
    height, width = z.shape[-2:]
    given = torch.ones_like(z[:, :1])
    given[:, :, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 0.0
    pictures = {"mask": given.expand(-1, 3, -1, -1) * 2 - 1}
    for name, mask in (("samples_inpainting", given), ("samples_outpainting", 1 - given)):
        latent = model.sample(torch.randn_like(z), cond, num_steps, eta, inpainting=Inpainting(mask, z))
        pictures[name] = model.decode_first_stage(latent)
    return pictures


def _forward_process(model: DDPM, z: Tensor) -> CaptionedGrid:
    """Decoded x_t at every ``log_every_t``-th time step, one row per image."""
    timesteps = [t for t in range(model.num_timesteps) if t % model.log_every_t == 0 or t == model.num_timesteps - 1]
    noise = torch.randn_like(z)
    states = [model.q_sample(z, torch.full((len(z),), t, device=z.device), noise) for t in timesteps]
    return _process(model, states, timesteps, len(z))


def _process(model: DDPM, states: list[Tensor], timesteps: list[int], rows: int) -> CaptionedGrid:
    rows = min(rows, len(states[0]))
    columns = [model.decode_first_stage(state[:rows]) for state in states]
    images = torch.stack(columns, dim=1).flatten(0, 1)  # (rows * columns, 3, H, W)
    return CaptionedGrid(images, [""] * rows, [f"t = {t}" for t in timesteps])
