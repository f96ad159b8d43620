"""Samples of a trained diffusion model: from noise alone, from the units of real images, or from texts.

What a model samples under is one of three things: nothing or LDM's condition, codes (methods with ``encode_units``
and ``decode_units``), or texts (``sample_edit``). Conditions come from images drawn at random from the config's data.

Dims: N samples, B of a batch, U units, C h w the latent, H W the image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ldm.data.collate import collate
from ldm.diffusion.samplers import ddim_timesteps
from ldm.evaluation.load_model import Trained
from ldm.evaluation.pictures import draw_grid, draw_images, save_png, to_pixels
from ldm.models.diffusion.pixel_diffusion import DDPM
from ldm.models.inputs import batch_value, images_from_batch
from ldm.models.pictures import CaptionedGrid
from ldm.training.run import build
from ldm.training.run_folder import write_json
from ldm.training.validation import validate
from ldm.util import ConfigError, UserError, atomic_write

_SECTIONS = ("test", "validation", "train")
_SHOWN = 64  # samples in the picture


@dataclass(frozen=True)
class Request:
    """What to sample.

    Attributes:
        count: N; with ``swap`` the number of columns.
        batch_size: samples at once.
        num_steps: DDIM steps; None samples all time steps by DDPM.
        eta: DDIM's; 0 deterministic, 1 as noisy as DDPM.
        seed: of the noise and of the images the conditions come from.
        unit: add this unit's gradient alone (from 0); None adds all.
        swap: show what each unit does: a row per unit, in which every sample takes that unit of the first one.
        texts: U strings per sample for models of texts, in turn; empty takes those of the data.
        guidance: factor of a text model's sub-gradients.
    """

    count: int = 16
    batch_size: int = 10
    num_steps: int | None = 50
    eta: float = 1.0
    seed: int = 23
    unit: int | None = None
    swap: bool = False
    texts: tuple[tuple[str, ...], ...] = ()
    guidance: float = 1.0

    def __post_init__(self) -> None:
        for name in ("count", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.eta < 0:
            raise ConfigError(f"eta is {self.eta}; expected 0 (deterministic) or more, 1 is as noisy as DDPM")


class Source(Protocol):
    """What a model samples under."""

    units: int

    def condition(self, batch: Mapping[str, Any] | None, rows: slice) -> Any:
        """The condition of a batch of data, or of those rows of the whole where no data are needed."""

    def decode(self, cond: Any, x_T: Tensor, only: Tensor | None) -> Tensor:
        """Images (B, 3, H, W) from noise (B, C, h, w)."""

    def swap(self, cond: Any, unit: int) -> Any:
        """The condition with one unit of the first sample in all."""


class FromCondition:
    """LDM: nothing, or whatever its condition stage makes of the data."""

    units = 0

    def __init__(self, model: DDPM, request: Request) -> None:
        self.model, self.request = model, request
        self.needs_data = getattr(model, "cond_stage_model", None) is not None

    def condition(self, batch: Mapping[str, Any] | None, rows: slice) -> Any:
        """See ``Source``."""
        return None if batch is None else self.model.get_condition(batch)

    def decode(self, cond: Any, x_T: Tensor, only: Tensor | None) -> Tensor:
        """See ``Source``."""
        return self.model.decode_first_stage(self.model.sample(x_T, cond, self.request.num_steps, self.request.eta))

    def swap(self, cond: Any, unit: int) -> Any:
        """There are no units to swap."""
        raise UserError(f"{type(self.model).__name__} has no units to swap")


class FromCodes:
    """DisDiff, EncDiff: the codes of real images."""

    needs_data = True

    def __init__(self, model: Any, request: Request) -> None:
        self.model, self.request, self.units = model, request, model.latent_unit

    def condition(self, batch: Mapping[str, Any] | None, rows: slice) -> Tensor:
        """See ``Source``: (B, U) or (B, U, D)."""
        return self.model.encode_units(images_from_batch(batch, self.model.first_stage_key))

    def decode(self, cond: Tensor, x_T: Tensor, only: Tensor | None) -> Tensor:
        """See ``Source``."""
        return self.model.decode_units(cond, x_T, self.request.num_steps, self.request.eta, only)

    def swap(self, cond: Tensor, unit: int) -> Tensor:
        """See ``Source``."""
        swapped = cond.clone()
        swapped[:, unit] = cond[0, unit]
        return swapped


class FromTexts:
    """CLIP-DisDiff: texts of the request or of the data."""

    def __init__(self, model: Any, request: Request) -> None:
        self.model, self.request, self.units = model, request, model.latent_unit
        self.needs_data = not request.texts
        for strings in request.texts:
            if len(strings) != self.units:
                raise UserError(
                    f"the text {' | '.join(strings)!r} has {len(strings)} attributes, the model {self.units} units: "
                    "give one for each, separated by |; an empty one leaves a unit unset"
                )

    def condition(self, batch: Mapping[str, Any] | None, rows: slice) -> list[list[str]]:
        """See ``Source``: B lists of U strings."""
        if batch is not None:
            return [list(strings) for strings in batch_value(batch, self.model.cond_stage_key)]
        texts = self.request.texts
        return [list(texts[row % len(texts)]) for row in range(rows.start, rows.stop)]

    def decode(self, cond: list[list[str]], x_T: Tensor, only: Tensor | None) -> Tensor:
        """See ``Source``."""
        steps, eta = self.request.num_steps, self.request.eta
        return self.model.sample_edit(cond, x_T, steps, eta, self.request.guidance, only)

    def swap(self, cond: list[list[str]], unit: int) -> list[list[str]]:
        """See ``Source``."""
        return [strings[:unit] + [cond[0][unit]] + strings[unit + 1 :] for strings in cond]


def source_of(model: DDPM, request: Request) -> FromCondition | FromCodes | FromTexts:
    """What a model samples under.

    Raises:
        UserError: the request asks for units or texts of a model that has none, or for a unit there is not.
    """
    kinds = {"decode_units": FromCodes, "sample_edit": FromTexts}
    kind = next((kind for method, kind in kinds.items() if hasattr(model, method)), FromCondition)
    source = kind(model, request)
    if request.texts and kind is not FromTexts:
        raise UserError(f"{type(model).__name__} does not sample from texts: leave out --text")
    if (request.unit is not None or request.swap) and not source.units:
        raise UserError(f"{type(model).__name__} has no units: leave out --unit and --swap")
    if request.unit is not None and not 0 <= request.unit < source.units:
        raise UserError(f"--unit {request.unit + 1}: the model has units 1 to {source.units}")
    return source


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


def split_text(word: str) -> tuple[str, ...]:
    """``"red floor | small object"`` -> one text per unit."""
    return tuple(part.strip() for part in word.split("|"))
