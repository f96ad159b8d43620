"""Units of single images, encoded when a metric asks for them: a few thousand instead of a whole data set.

Dims: N images of the data set, n rows asked for, U units, D width of a vector unit, F factors.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ldm.data.factors import FactorSpace
from ldm.util import UserError

PROBE = 2000  # images that a vector unit's principal axis is found on


class RepresentationModel(Protocol):
    """What is asked of a model."""

    def encode_representation(self, batch: dict[str, Any]) -> Tensor:
        """A batch as the data room delivers it -> (B, U) or (B, U, D)."""


def whole_set(dataset: Any) -> Any:
    """A view of a data set with known factors that reaches every image, whatever split it was built for.

    Raises:
        UserError: the data set has no factors, or is not a whole grid of them.
    """
    dataset = getattr(dataset, "data", dataset)  # ``WrappedDataset``
    space = getattr(dataset, "space", None)
    if space is None or not hasattr(dataset, "rows"):
        raise UserError(
            f"scores need images with known factors, but {type(dataset).__name__} has none: train on a data set with "
            "factors (ldm.data.world, shapes3d, mpi3d, cars3d, ...), or remove the callback from lightning.callbacks"
        )
    return dataset.whole()


class RowEncoder:
    """A representation for the metrics: called with rows (n,), it returns one number per unit, (n, U) float64.

    Each image is encoded once. Vector units are reduced to their first principal component, found on a fixed sample
    of ``PROBE`` images (the published protocol takes all N).

    Args:
        model: in evaluation mode.
        dataset: with known factors.
        batch_size: images encoded at once.
        device: where the model is.

    Attributes:
        space: the data set's factors, those of a part where it shows only a part of them.

    Raises:
        UserError: the data set has no factors.
    """

    def __init__(
        self, model: RepresentationModel, dataset: Any, batch_size: int = 512, device: torch.device | str = "cpu"
    ) -> None:
        self._model, self._batch_size, self._device = model, batch_size, torch.device(device)
        self._dataset = whole_set(dataset)
        self.space: FactorSpace = self._dataset.position_space
        self._place = np.full(self.space.size, -1, dtype=np.int64)  # of a row among the encoded ones
        self._units = np.empty((0, 0))
        self._count = 0
        self._axes: np.ndarray | None = None

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Units of rows (n,) in any order, repeats allowed."""
        rows = np.asarray(rows, dtype=np.int64)
        wanted = np.unique(rows)
        new = wanted[self._place[wanted] < 0]
        if len(new):
            self._keep(new, self._reduced(self._encode(new)))
        return self._units[self._place[rows]]

    def _keep(self, rows: np.ndarray, units: np.ndarray) -> None:
        self._place[rows] = self._count + np.arange(len(rows))
        if not self._count:
            self._units = np.empty((0, units.shape[1]))
        self._units = np.concatenate([self._units, units])
        self._count += len(rows)

    @torch.no_grad()
    def _encode(self, rows: np.ndarray) -> np.ndarray:
        """(n, U) or (n, U, D) float64."""
        parts = []
        for start in range(0, len(rows), self._batch_size):
            batch = self._dataset.__getitems__(rows[start : start + self._batch_size])
            batch = {k: v.to(self._device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            parts.append(self._model.encode_representation(batch).double().cpu().numpy())
        return np.concatenate(parts)

    def _reduced(self, latents: np.ndarray) -> np.ndarray:
        """One number per unit; the place of zero and the sign mean nothing to the metrics."""
        if latents.ndim == 2:
            return latents
        if self._axes is None:
            probe = np.random.RandomState(0).choice(self.space.size, min(PROBE, self.space.size), replace=False)
            by_unit = self._encode(np.sort(probe)).transpose(1, 0, 2)  # (U, n, D)
            centred = by_unit - by_unit.mean(axis=1, keepdims=True)
            self._axes = np.linalg.svd(centred, full_matrices=False)[2][:, 0]  # (U, D)
        return np.einsum("nud,ud->nu", latents, self._axes)


class evaluating:
    """Within it a module is in evaluation mode and torch's random numbers are its own; afterwards all is as before."""

    def __init__(self, module: nn.Module, device: torch.device | str = "cpu") -> None:
        self._module = module
        device = torch.device(device)
        self._fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def __enter__(self) -> None:
        self._was_training = self._module.training
        self._fork.__enter__()
        self._module.eval()

    def __exit__(self, *error: Any) -> None:
        self._module.train(self._was_training)
        self._fork.__exit__(*error)
