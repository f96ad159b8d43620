"""Samples of a trained diffusion model: from noise alone, from the units of real images, from texts or classes.

What a model samples under, ``ldm.evaluation.sampling.conditions`` says; where it comes from images, these are drawn
at random from the config's data.

Dims: N samples, B of a batch, U units, C h w the latent, H W the image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ldm.config.build import build
from ldm.config.validation import validate
from ldm.data.collate import collate
from ldm.diffusion.samplers import ddim_timesteps
from ldm.evaluation.sampling.conditions import Request, source_of
from ldm.pictures.draw import draw_grid, draw_images, save_png, to_pixels
from ldm.pictures.grid import CaptionedGrid
from ldm.runs.folder import write_json
from ldm.runs.load import Trained
from ldm.util import UserError, atomic_write

_SECTIONS = ("test", "validation", "train")
_SHOWN = 64  # samples in the picture


class Sampler:
    """Draws what a request asks for.

    Args:
        trained: the model.
        request: what to sample.
        on_step: called with the number of denoising steps so far, once a step.
    """

    def __init__(self, trained: Trained, request: Request, on_step: Callable[[int], None] = lambda done: None) -> None:
        self.model, self.request = trained.model, request
        self.source = source_of(trained.model, request)
        self._dataset = _data_of(trained) if self.source.needs_data else None
        self._on_step, self._done = on_step, 0

    @property
    def total_steps(self) -> int:
        """Denoising steps of the whole request."""
        steps, count = self.request.num_steps, self.request.count
        steps = self.model.num_timesteps if steps is None else len(ddim_timesteps(steps, self.model.num_timesteps))
        return steps * -(-count // self.request.batch_size) * (1 + len(self._swapped_units()))

    @torch.no_grad()
    def samples(self) -> Tensor:
        """(N, 3, H, W) in [-1, 1] on the CPU."""
        with self._counting():
            return torch.cat([self._decode(cond, x_T, self.request.unit) for cond, x_T in self._conditions()])

    @torch.no_grad()
    def swaps(self) -> CaptionedGrid:
        """N samples, and below them one row per unit in which it is that of the first sample."""
        units, rows = self._swapped_units(), []
        first: Any = None
        with self._counting():
            for cond, x_T in self._conditions():
                first = cond[:1] if first is None else first
                joined = torch.cat([first, cond]) if isinstance(cond, Tensor) else [*first, *cond]
                swapped = [self._decode(self.source.swap(joined, k)[1:], x_T, self.request.unit) for k in units]
                rows.append(torch.stack([self._decode(cond, x_T, None), *swapped]))  # (1 + K, B, 3, H, W)
        names = getattr(self.model, "unit_names", None) or [""] * self.source.units
        captions = [f"unit {unit + 1}" + (f": {names[unit]}" if names[unit] else "") for unit in units]
        title = "each row: that unit from the first sample"
        title += "" if self.request.unit is None else ", its gradient alone"
        return CaptionedGrid(torch.cat(rows, dim=1).flatten(0, 1), ["samples", *captions], [], title)

    def _swapped_units(self) -> list[int]:
        if not self.request.swap:
            return []
        return list(range(self.source.units)) if self.request.unit is None else [self.request.unit]

    def _conditions(self) -> Iterator[tuple[Any, Tensor]]:
        """Conditions and noise (B, C, h, w), batch by batch; neither depends on the size of the batches."""
        request, device = self.request, self.model.device
        torch.manual_seed(request.seed)
        noise = torch.randn(request.count, *self.model.latent_shape)
        batches = iter(_draw_batches(self._dataset, request)) if self._dataset is not None else None
        for start in range(0, request.count, request.batch_size):
            rows = slice(start, min(start + request.batch_size, request.count))
            batch = None if batches is None else _to(next(batches), device)
            yield self.source.condition(batch, rows), noise[rows].to(device)

    def _decode(self, cond: Any, x_T: Tensor, unit: int | None) -> Tensor:
        only = None if unit is None else torch.full((len(x_T),), unit, device=x_T.device)
        return self.source.decode(cond, x_T, only).clamp(-1, 1).float().cpu()

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """The averaged weights in place, and every call of the network counted as one step."""

        def count(*_: Any) -> None:
            self._done += 1
            self._on_step(self._done)

        handle = self.model.model.register_forward_hook(count)
        try:
            with self.model.ema_scope():
                yield
        finally:
            handle.remove()


def _data_of(trained: Trained) -> Any:
    """The data set that conditions come from: test, else validation, else training images."""
    if "data" not in trained.config.content:
        raise UserError(
            f"{type(trained.model).__name__} samples from images of a data set, but the config has no `data`: add one "
            "by --base"
        )
    validate(trained.config, check_files=False)
    module = build(trained.config, "data")
    section = next((name for name in _SECTIONS if name in module.dataset_configs), None)
    if section is None:
        raise UserError(f"data.params has none of {', '.join(_SECTIONS)}: add one, conditions are taken from it")
    module.setup({"test": "test", "validation": "validate", "train": "fit"}[section])
    return module.datasets[section]


def _draw_batches(dataset: Any, request: Request) -> DataLoader:
    """Batches of images drawn at random, without repetition as far as there are enough."""
    rng = np.random.default_rng(request.seed)
    rows = rng.choice(len(dataset), request.count, replace=request.count > len(dataset))
    return DataLoader(Subset(dataset, rows.tolist()), batch_size=request.batch_size, collate_fn=collate)


def _to(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def write_samples(folder: Path, images: Tensor, grid: CaptionedGrid | None, record: Mapping[str, Any]) -> list[Path]:
    """Write samples, whole or not at all.

    Args:
        folder: where to; made.
        images: (N, 3, H, W) in [-1, 1].
        grid: drawn in the place of a plain sheet of the first images.
        record: how they were made; plain values.

    Returns:
        ``<N>x<H>x<W>x3-samples.npz`` (``arr_0`` uint8, as latent-diffusion writes it), the picture, ``sampling.json``.
    """
    pixels = to_pixels(images)
    arrays = folder / ("x".join(map(str, pixels.shape)) + "-samples.npz")
    with atomic_write(arrays, "wb") as stream:
        np.savez(stream, pixels)
    picture = draw_images(images[:_SHOWN]) if grid is None else draw_grid(grid)
    drawn = save_png(picture, folder / ("samples.png" if grid is None else "swaps.png"))
    write_json(folder / "sampling.json", dict(record))
    return [arrays, drawn, folder / "sampling.json"]
