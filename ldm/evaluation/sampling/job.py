"""Samples of a trained diffusion model, and their files.

Conditions (``ldm.evaluation.sampling.sources``) that are read from images take these at random from the config's data.
Dimensions: N samples, B of a batch, U units, C h w the latent, H W the image.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ldm.data.collate import collate
from ldm.diffusion.noise import kept_random_state
from ldm.diffusion.samplers import Denoiser, Sampler
from ldm.evaluation.sampling.request import Request
from ldm.evaluation.sampling.sources import Source, source_of
from ldm.models.contexts import averaged
from ldm.models.contracts import HasUnits, Resizable, require
from ldm.models.diffusion.traversal import unit_captions
from ldm.pictures.draw import draw_grid, draw_images, save_png, to_pixels
from ldm.pictures.grid import CaptionedGrid
from ldm.runs.load import LoadedRun
from ldm.runs.records import write_json
from ldm.util import UserError, atomic_write

_SECTIONS = {"test": "test", "validation": "validate", "train": "fit"}  # of the data module -> stage of its set-up
_SHOWN = 64  # samples in the picture


class SamplingJob:
    """Draws the samples of a request.

    Args:
        run: the model and its config.
        request: what to sample.
        on_step: called with the number of denoising steps so far, once per step.
    """

    def __init__(self, run: LoadedRun, request: Request, on_step: Callable[[int], None] = lambda done: None) -> None:
        self.model, self.request = run.model, request
        self._on_step, self._done = on_step, 0
        self.source = source_of(run.model, dataclasses.replace(request, sampler=self._counted(request.sampler)))
        if self.source.needs_data and "data" not in run.config.content:
            self.source.without_data()
        self._dataset = _find_data(run, self.source) if self.source.needs_data else None

    @property
    def total_steps(self) -> int:
        """Denoising steps of the whole request."""
        num_batches = -(-self.request.count // self.request.batch_size)
        steps = self.request.sampler.num_evaluations(self.model.num_timesteps)
        return steps * num_batches * (1 + len(self._swapped_units()))

    @torch.no_grad()
    def samples(self) -> Tensor:
        """Return (N, 3, H, W) in [-1, 1] on the CPU."""
        with averaged(self.model):
            return torch.cat([self._decode(cond, x_T, self.request.unit) for cond, x_T in self._conditions()])

    @torch.no_grad()
    def swaps(self) -> CaptionedGrid:
        """Return a grid of N samples, and below them one row per unit with that unit of the first sample.

        All images of a column start from the same noise, and their sampler draws the same noise.
        """
        units, columns, first = self._swapped_units(), [], None
        with averaged(self.model):
            for cond, x_T in self._conditions():
                first = cond if first is None else first
                swapped = []
                for unit in units:
                    with kept_random_state(x_T.device):
                        swapped.append(self._decode(self.source.swap(cond, first, unit), x_T, self.request.unit))
                columns.append(torch.stack([self._decode(cond, x_T, None), *swapped]))  # (1 + K, B, 3, H, W)
        title = "each row: that unit from the first sample"
        title += "" if self.request.unit is None else ", its gradient alone"
        named = isinstance(self.model, HasUnits)
        captions = unit_captions(self.model, units) if named else [f"unit {unit + 1}" for unit in units]
        return CaptionedGrid(torch.cat(columns, dim=1).flatten(0, 1), ["samples", *captions], [], title)

    def _swapped_units(self) -> list[int]:
        if not self.request.swap:
            return []
        return list(range(self.source.units)) if self.request.unit is None else [self.request.unit]

    def _conditions(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield conditions and noise (B, C, h, w) of each batch; neither depends on the batch size."""
        request, device = self.request, self.model.device
        shape = self._latent_shape()  # before the seed is set, because reading an image may draw numbers
        torch.manual_seed(request.seed)
        noise = torch.randn(request.count, *shape)
        batches = iter(_draw_batches(self._dataset, request)) if self._dataset is not None else None
        for start in range(0, request.count, request.batch_size):
            rows = slice(start, min(start + request.batch_size, request.count))
            batch = None if batches is None else move_data_to_device(next(batches), device)
            yield self.source.condition(batch, rows), noise[rows].to(device)

    def _latent_shape(self) -> tuple[int, ...]:
        """Return (C, h, w): of the request's size, else of the images that conditions come from, else of the model."""
        model, size = self.model, self.request.size
        if size is not None:
            require(model, Resizable, "--size")
        elif self._dataset is not None and isinstance(model, Resizable):
            size = np.shape(self._dataset[0].get(model.first_stage_key, ()))[:2]
        return (model.latent_shape[0], *model.latent_size(*size)) if size else model.latent_shape

    def _decode(self, cond: Any, x_T: Tensor, unit: int | None) -> Tensor:
        only = None if unit is None else torch.full((len(x_T),), unit, device=x_T.device)
        return self.source.decode(cond, x_T, only).clamp(-1, 1).float().cpu()

    def _counted(self, sampler: Sampler) -> Sampler:
        """Return a copy of a sampler that counts every call of the denoiser as one step."""

        @functools.wraps(sampler.sample)
        def sample(denoise: Denoiser, *args: Any, **options: Any) -> Tensor:
            def counted(x: Tensor, t: Tensor) -> Tensor:
                self._done += 1
                self._on_step(self._done)
                return denoise(x, t)

            return sampler.sample(counted, *args, **options)

        counting = copy.copy(sampler)
        counting.sample = sample
        return counting


def _find_data(run: LoadedRun, source: Source) -> Any:
    """Return the first data set of test, validation and train from which the model's condition can be made."""
    module, reasons = run.build_data(), []
    for section, stage in _SECTIONS.items():
        if section not in module.dataset_configs:
            continue
        module.setup(stage)
        dataset = module.datasets[section]
        try:
            source.condition(move_data_to_device(collate([dataset[0]]), run.model.device), slice(0, 1))
        except UserError as error:
            reasons.append(f"{section}: {error}")
        else:
            return dataset
    raise UserError(
        f"data.params: expected a data set (test, validation or train) with the condition of {source.name}, got "
        f"{'; '.join(reasons) or 'none'}"
    )


def _draw_batches(dataset: Any, request: Request) -> DataLoader:
    """Return batches of random images, without repetition if there are enough."""
    rng = np.random.default_rng(request.seed)
    rows = rng.choice(len(dataset), request.count, replace=request.count > len(dataset))
    return DataLoader(Subset(dataset, rows.tolist()), batch_size=request.batch_size, collate_fn=collate)


def write_samples(folder: Path, images: Tensor, grid: CaptionedGrid | None, record: Mapping[str, Any]) -> list[Path]:
    """Write samples.

    Args:
        folder: the folder, created if needed.
        images: (N, 3, H, W) in [-1, 1].
        grid: drawn in place of the first images.
        record: settings as plain values.

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
