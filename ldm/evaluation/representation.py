"""The representation of a whole data set, written down for the disentanglement metrics.

Dims: N images of the data set, B images of a batch, U units, D width of a unit.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from ldm.data.factors import FactorSpace
from ldm.evaluation.test_pass import Progress, TestPassCallback
from ldm.util import UserError, atomic_write

log = logging.getLogger(__name__)


def save_representation(path: Path, latents: np.ndarray, num_samples: int, **names: Any) -> None:
    """Write a representation file, whole or not at all.

    Args:
        path: ``<run>/dis_repre/epoch=NNNNNN.npz``.
        latents: (N, U, D) or (N, U) float32, row i belongs to image i of the data set.
        num_samples: Optimizer steps of the weights (the name is DisDiff's).
        **names: Further arrays by name.
    """
    with atomic_write(path, "wb") as stream:
        np.savez(stream, latents=latents, num_samples=np.int64(num_samples), **names)


class RepresentationWriter(TestPassCallback):
    """Collects what ``test_step`` returns and writes ``<run>/dis_repre/epoch=NNNNNN.npz`` after the test pass.

    The model's ``test_step`` returns ``encode_representation(batch)``, (B, U, D) float or (B, U) for scalar units, or
    None for a model that has no representation, and then nothing is written. Rows keep the order of the data set,
    which must not be shuffled. The file holds ``latents`` float32 (N, U, D) or (N, U), ``num_samples`` (= global
    step) and, as far as they are known, ``factor_names``, ``factor_sizes`` and ``factor_space`` (JSON; the space that
    the rows make, the data set's ``position_space`` or ``space``) and ``unit_names`` (the model's).
    """

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start anew.

        Raises:
            UserError: The test loader shuffles.
        """
        self._latents: np.ndarray | None = None
        self._filled = 0
        self._is_wanted = self.is_whole(trainer)
        if self._is_wanted and isinstance(self.test_loader(trainer).sampler, RandomSampler):
            raise UserError(
                "The test loader shuffles, so rows of the representation could not be told apart: "
                "set data.params.shuffle_test_loader to false."
            )

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Tensor | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Put one batch in its place.

        Raises:
            UserError: More rows than the data set has images, or units of another shape than (U, D) or (U,).
        """
        if not self._is_wanted or not isinstance(outputs, Tensor):
            return
        expected = len(self.test_loader(trainer).dataset)
        if outputs.ndim not in (2, 3):
            raise UserError(f"test_step must return units of shape (B, U, D) or (B, U), found {tuple(outputs.shape)}.")
        if self._latents is None:
            self._latents = np.empty((expected, *outputs.shape[1:]), dtype=np.float32)
        end = self._filled + len(outputs)
        if end > expected:
            raise UserError(f"The test pass gave {end} or more rows, but its data set has {expected} images.")
        self._latents[self._filled : end] = outputs.detach().to("cpu", torch.float32).numpy()
        self._filled = end

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file.

        Raises:
            UserError: Fewer rows than the data set has images.
        """
        if self._latents is None:
            return
        latents, self._latents = self._latents, None  # half a gigabyte is not kept longer than needed
        if self._filled != len(latents):
            raise UserError(
                f"The test pass gave {self._filled} rows, but its data set has {len(latents)} images: the loader drops "
                "some. Use the data module's test loader, which keeps all in order."
            )
        num_bad = int((~np.isfinite(latents)).sum())
        if num_bad:
            log.warning("%d of %d numbers of the representation are not finite.", num_bad, latents.size)
        progress = self.progress(trainer)
        path = self.path(trainer, progress)
        dataset = self.test_loader(trainer).dataset
        save_representation(path, latents, progress.step, **_names(dataset, pl_module))
        log.info("Representation of %s (images, units, width of vector units): %s", latents.shape, path)

    def path(self, trainer: pl.Trainer, progress: Progress) -> Path:
        """Where the representation of these weights belongs."""
        return self.run_dir(trainer) / "dis_repre" / f"epoch={progress.epoch:06d}.npz"


def factor_arrays(space: FactorSpace) -> dict[str, np.ndarray]:
    """What a representation file says of its factors: the whole space, names and sizes of those to be recovered."""
    return {
        "factor_space": np.array(json.dumps(space.to_dict())),
        "factor_names": np.array(space.factor_names, dtype=str),
        "factor_sizes": np.array(space.factors_num_values, dtype=np.int64),
    }


def _names(dataset: Any, model: Any) -> dict[str, np.ndarray]:
    """Names and sizes of the factors, names of the units, where known."""
    space = getattr(dataset, "position_space", None) or getattr(dataset, "space", None)
    names = {} if space is None else factor_arrays(space)
    unit_names = getattr(model, "unit_names", None)
    if unit_names is not None:
        names["unit_names"] = np.array(unit_names, dtype=str)
    return names
