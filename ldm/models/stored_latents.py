"""Outputs of a frozen first stage for the images of a data set, computed once and read in every training step.

Means and variances of a KL autoencoder are stored, so that each step draws its own sample of them.

Dimensions: N images, n images of a batch, C channels of the latent (2C for means and log-variances), h, w its size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.dataset import ImageDataset
from ldm.data.rows import PerProcess
from ldm.models.inputs import images_from_batch
from ldm.modules.distributions.distributions import DiagonalGaussian
from ldm.util import UserError

ENTRY = "first_stage_latents"  # entry of a batch: stored values, or their rows in a table on the device


@dataclass(frozen=True)
class StoredLatents:
    """Stored outputs of a first stage.

    Attributes:
        is_gaussian: whether they are means and log-variances.
        image_size: height and width of the images.
        table: (N, C, h, w) float32 on the device of the model; None if batches contain the values themselves.
    """

    is_gaussian: bool
    image_size: tuple[int, int]
    table: Tensor | None = None

    def of(self, batch: Mapping[str, Any]) -> Tensor | DiagonalGaussian | None:
        """Return what ``encode`` of the first stage returned for a batch's images; None for images without."""
        if ENTRY not in batch:
            return None
        values = batch[ENTRY] if self.table is None else self.table[batch[ENTRY]]
        return DiagonalGaussian(values) if self.is_gaussian else values


class LatentLabels:
    """Entry ``ENTRY`` of a batch as a function of its rows, for ``ImageDataset.more_labels``.

    Args:
        rows: (N,) rows of the data set that have latents, rising.
        values: (N, C, h, w) float32 of these; None if the batches contain positions in a table.
        offset: position of the first one in the table.
    """

    def __init__(self, rows: np.ndarray, values: PerProcess | None, offset: int = 0) -> None:
        self._rows, self._values, self._offset = rows, values, offset

    def __call__(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return the entry, of n images; nothing if one of them has no latent."""
        positions = np.searchsorted(self._rows, rows).clip(max=len(self._rows) - 1)
        if (self._rows[positions] != rows).any():
            return {}
        if self._values is None:
            return {ENTRY: torch.from_numpy(positions + self._offset)}
        return {ENTRY: torch.from_numpy(np.asarray(self._values.get()[positions]))}


class ImageRows(Dataset):
    """Images of a data set without texts and other entries: ``{"image": (n, H, W, 3) uint8}``.

    Args:
        dataset: the data set.
        rows: (N,) its rows.
    """

    def __init__(self, dataset: ImageDataset, rows: np.ndarray) -> None:
        self._dataset, self._rows = dataset, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Any]:
        """Return a whole batch."""
        return {"image": torch.from_numpy(self._dataset.images(self._rows[positions]))}


@torch.no_grad()
def encode_images(model: Any, images: Tensor) -> tuple[Tensor, bool]:
    """Return what a model's first stage makes of images, to be stored: (n, C or 2C, h, w) float32 on the device.

    Args:
        model: latent diffusion model.
        images: (n, H, W, 3) uint8.

    Returns:
        The values, and whether they are means and log-variances.

    Raises:
        UserError: the first stage returns something else.
    """
    batch = {model.first_stage_key: images.to(model.device, non_blocking=True)}
    encoded = model.first_stage_model.encode(images_from_batch(batch, model.first_stage_key))
    if isinstance(encoded, DiagonalGaussian):
        return torch.cat([encoded.mean, encoded.logvar], dim=1).float(), True
    if isinstance(encoded, Tensor) and encoded.is_floating_point():
        return encoded.float(), False
    raise UserError(
        f"{type(model.first_stage_model).__name__}.encode: expected a float tensor or a DiagonalGaussian, got "
        f"{type(encoded).__name__}. Set lightning.callbacks.latent_cache=null"
    )
