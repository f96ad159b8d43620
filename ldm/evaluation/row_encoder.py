"""Units of the images that a metric asks for, instead of those of a whole data set.

Dimensions: N images of the data set, n rows, U units, D width of a unit's code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities import move_data_to_device

from ldm.data.dataset import ImageDataset
from ldm.data.factors import FactorSpace
from ldm.data.traits import position_space_of, space_of, unwrap
from ldm.models.contracts import HasRepresentation
from ldm.util import UserError

PROBE = 2000  # images on which the principal axis of a vector unit is computed


def whole_set(dataset: Any) -> ImageDataset:
    """Return a view of all images of a data set with known factors, independent of its split.

    Raises:
        UserError: the data set has no factors.
    """
    images = unwrap(dataset)
    if space_of(images) is None or not isinstance(images, ImageDataset):
        raise UserError(
            f"scores: expected a data set with known factors, got {type(images).__name__}. Use a data set with factors "
            "(ldm.data.world, shapes3d, mpi3d, cars3d, ...), or remove the callback (lightning.callbacks.scores=null)"
        )
    return images.whole()


class RowEncoder:
    """Representation for the metrics: a function of rows (n,) that returns one number per unit, (n, U) float64.

    Each image is encoded once. Vector units are reduced to their first principal component, computed on a fixed
    sample of ``PROBE`` images; the published protocol uses all N.

    Args:
        model: the model in evaluation mode.
        dataset: a data set with known factors.
        batch_size: images encoded at once.
        device: device of the model.

    Attributes:
        space: factor space of the rows.

    Raises:
        UserError: the data set has no factors.
    """

    def __init__(
        self, model: HasRepresentation, dataset: Any, batch_size: int = 512, device: torch.device | str = "cpu"
    ) -> None:
        self._model, self._batch_size, self._device = model, batch_size, torch.device(device)
        self._dataset = whole_set(dataset)
        self.space: FactorSpace = position_space_of(self._dataset)
        self._position = np.full(self.space.size, -1, dtype=np.int64)  # of each row in ``_units``
        self._units = np.empty((0, 0))
        self._axes: np.ndarray | None = None

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return the units (n, U) of rows (n,) in any order; repeats are allowed."""
        rows = np.asarray(rows, dtype=np.int64)
        wanted = np.unique(rows)
        new = wanted[self._position[wanted] < 0]
        if len(new):
            units = self._reduced(self._encode(new))
            self._position[new] = len(self._units) + np.arange(len(new))
            self._units = np.concatenate([self._units, units]) if len(self._units) else units
        return self._units[self._position[rows]]

    @torch.no_grad()
    def _encode(self, rows: np.ndarray) -> np.ndarray:
        """Return (n, U) or (n, U, D) float64."""
        parts = []
        for start in range(0, len(rows), self._batch_size):
            batch = self._dataset.__getitems__(rows[start : start + self._batch_size])
            units = self._model.encode_representation(move_data_to_device(batch, self._device))
            parts.append(units.double().cpu().numpy())
        return np.concatenate(parts)

    def _reduced(self, latents: np.ndarray) -> np.ndarray:
        """Return one number per unit, (n, U); its sign and origin do not affect the metrics."""
        if latents.ndim == 2:
            return latents
        if self._axes is None:
            probe = np.random.RandomState(0).choice(self.space.size, min(PROBE, self.space.size), replace=False)
            by_unit = self._encode(np.sort(probe)).transpose(1, 0, 2)  # (U, n, D)
            centred = by_unit - by_unit.mean(axis=1, keepdims=True)
            self._axes = np.linalg.svd(centred, full_matrices=False)[2][:, 0]  # (U, D)
        return np.einsum("nud,ud->nu", latents, self._axes)
