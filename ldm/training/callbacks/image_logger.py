"""Pictures of training and validation batches, logged during training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from torch import Tensor

from ldm.data.module import DataModuleFromConfig
from ldm.models.contexts import evaluating
from ldm.pictures.draw import draw_grid, draw_images
from ldm.pictures.grid import CaptionedGrid
from ldm.ranges import Count, PositiveFloat
from ldm.util import ConfigError, instantiate_from_config

if TYPE_CHECKING:
    from PIL import Image


@runtime_checkable
class LogsImages(Protocol):
    """A model that draws pictures of a batch."""

    def log_images(self, batch: Any, **options: Any) -> dict[str, Any]:
        """Return images (B, 3, H, W) in [-1, 1], or captioned grids, by name."""


@runtime_checkable
class ShowsImages(Protocol):
    """A logger that displays pictures (Weights & Biases)."""

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Log pictures under a name."""


class ImageLogger(Callback):
    """Calls ``log_images`` of the model on the schedule of LDM and writes the pictures.

    Pictures are written to ``<run>/images/<split>/<key>_gs-%06d_e-%06d_b-%06d.png``, TensorBoard and W&B.

    Args:
        batch_frequency: steps between two pictures.
        max_images: maximum number of images of a tensor.
        clamp: clamp values to [-1, 1].
        increase_log_steps: also log at steps 1, 2, 4, ... up to ``batch_frequency``.
        rescale: images are in [-1, 1]; False if they are in [0, 1].
        disabled: log nothing.
        log_on_batch_idx: count batches of the epoch instead of steps of the run.
        log_first_step: also log at step 0.
        log_images_kwargs: keyword arguments of ``log_images``.
        log_config: ``{target, params}`` of a ``Record`` of the losses (EncDiff).
    """

    def __init__(
        self,
        batch_frequency: PositiveFloat,
        max_images: Count,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_on_batch_idx: bool = False,
        log_first_step: bool = False,
        log_images_kwargs: Mapping[str, Any] | None = None,
        log_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.batch_frequency = batch_frequency
        self.max_images = max_images
        self.clamp = clamp
        self.rescale = rescale
        self.disabled = disabled
        self.log_on_batch_idx = log_on_batch_idx
        self.log_first_step = log_first_step
        self.log_images_kwargs = dict(log_images_kwargs or {})
        powers = int(np.log2(batch_frequency)) + 1 if increase_log_steps else 0
        self._early = {split: [2**power for power in range(powers)] for split in ("train", "val")}
        self.record = instantiate_from_config(log_config) if log_config else None

    def check_run(self, data: Any, model: Any) -> None:
        """Raise a ``ConfigError`` for options that the model does not accept; the config check knows our own models."""
        if isinstance(model, LogsImages) and not self.disabled:
            try:
                inspect.signature(model.log_images).bind(None, **self._options("train"))
            except TypeError as error:
                key = "lightning.callbacks.image_logger.params.log_images_kwargs"
                message = f"{type(model).__name__}.log_images: {error}. Correct or remove the option"
                raise ConfigError(f"{key}: {message}") from error

    def is_due(self, index: int, split: str = "train") -> bool:
        """Return whether pictures are due at this step; each early step is due once."""
        if index % self.batch_frequency == 0:
            return index > 0 or self.log_first_step
        if index in self._early[split]:
            self._early[split].remove(index)
            return True
        return False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log training images on schedule."""
        if trainer.fit_loop._should_accumulate() and not self.log_on_batch_idx:
            return  # the step is not done
        self._log(trainer, pl_module, batch, batch_idx, "train")
        if self.record is not None and trainer.is_global_zero:
            self.record.write(trainer.default_root_dir, _steps(trainer), trainer.callback_metrics)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Log the first validation batch on schedule."""
        if batch_idx == 0 and not trainer.sanity_checking:
            self._log(trainer, pl_module, batch, batch_idx, "val")

    def _log(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, split: str) -> None:
        step = _steps(trainer)
        index = batch_idx if self.log_on_batch_idx else step
        is_due = not self.disabled and self.is_due(index, split)
        if not is_due or not isinstance(pl_module, LogsImages) or not trainer.is_global_zero:
            return
        if isinstance(trainer.datamodule, DataModuleFromConfig):
            batch = trainer.datamodule.with_images(batch, "train" if split == "train" else "validation")
        stamp = f"gs-{step:06}_e-{trainer.current_epoch:06}_b-{batch_idx:06}"
        for key, picture in self._draw(pl_module, batch, split).items():
            path = Path(trainer.default_root_dir) / "images" / split / f"{key}_{stamp}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            for run_logger in trainer.loggers:
                _send(run_logger, f"{split}/{key}", picture, step)

    def _options(self, split: str) -> dict[str, Any]:
        return {"split": split, "N": self.max_images, **self.log_images_kwargs}

    def _draw(self, pl_module: LightningModule, batch: Any, split: str) -> dict[str, Image.Image]:
        """Return the pictures of the model in evaluation mode; its mode and the random state are restored."""
        with torch.no_grad(), evaluating(pl_module, pl_module.device):
            images = pl_module.log_images(batch, **self._options(split))
        return {key: self._picture(key, value) for key, value in images.items()}

    def _picture(self, key: str, value: Tensor | CaptionedGrid) -> Image.Image:
        if isinstance(value, CaptionedGrid):
            return draw_grid(value._replace(images=self._shown(value.images)))
        return draw_images(self._shown(value[: self.max_images]), title=key)

    def _shown(self, images: Tensor) -> Tensor:
        images = images.detach().float().cpu()
        if not self.rescale:
            images = images * 2 - 1
        return images.clamp(-1, 1) if self.clamp else images


def _steps(trainer: Trainer) -> int:
    """Return the number of optimizer steps; that of the last batch is counted after its hooks and validation."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped + (not trainer.fit_loop._should_accumulate())


def _send(run_logger: Logger, tag: str, picture: Image.Image, step: int) -> None:
    if isinstance(run_logger, TensorBoardLogger):
        run_logger.experiment.add_image(tag, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
    elif isinstance(run_logger, ShowsImages):
        run_logger.log_image(tag, [picture], step=step)
