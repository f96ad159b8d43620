"""The representation of a whole data set as a file, the input of the disentanglement metrics.

Dimensions: N images of the data set, B images of a batch, U units, D width of a unit's code.
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
from ldm.data.traits import position_space_of
from ldm.evaluation.test_pass import TestPassCallback
from ldm.models.contracts import HasRepresentation, HasUnits
from ldm.util import UserError, atomic_write

logger = logging.getLogger(__name__)

_SHUFFLED = (
    "representation: expected a test loader that keeps the data set's order, got one that shuffles. Set "
    "data.params.shuffle_test_loader to false"
)


def save_representation(path: Path, latents: np.ndarray, num_samples: int, **arrays: Any) -> None:
    """Write the representation file ``<run>/dis_repre/epoch=NNNNNN.npz`` in one step.

    ``latents`` are (N, U, D) or (N, U) float32, in the order of the data set; ``num_samples`` is DisDiff's name of the
    number of optimizer steps; ``arrays`` are further arrays by name.
    """
    with atomic_write(path, "wb") as stream:
        np.savez(stream, latents=latents, num_samples=np.int64(num_samples), **arrays)


class RepresentationWriter(TestPassCallback):
    """Writes the outputs of ``test_step`` to ``<run>/dis_repre/epoch=NNNNNN.npz`` after the test pass.

    ``test_step`` returns ``encode_representation(batch)``, (B, U, D) or (B, U) for scalar units; for a model without a
    representation it returns None, and nothing is written. The file contains ``latents`` float32 (N, U, D) or (N, U) in
    the order of the data set, ``num_samples`` (the global step) and, where they are known, ``factor_names``,
    ``factor_sizes``, ``factor_space`` (JSON) and the model's ``unit_names``.
    """

    def check_run(self, data: Any, model: pl.LightningModule) -> None:
        """Raise a ``UserError`` if the test loader of a model with a representation shuffles."""
        if "test" in data.dataset_configs and data.shuffle_test_loader and isinstance(model, HasRepresentation):
            raise UserError(_SHUFFLED)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepare an empty representation.

        Raises:
            UserError: the test loader shuffles.
        """
        self._latents: np.ndarray | None = None
        self._filled = 0
        self._is_wanted = self.is_whole(trainer)
        if self._is_wanted and isinstance(self.test_loader(trainer).sampler, RandomSampler):
            raise UserError(_SHUFFLED)

    def on_test_batch_end(self, trainer: pl.Trainer, _: pl.LightningModule, outputs: Tensor | None, *__: Any) -> None:
        """Store the units of one batch.

        Raises:
            UserError: more rows than the data set has images, or another shape than (B, U, D) or (B, U).
        """
        if not self._is_wanted or not isinstance(outputs, Tensor):
            return
        expected = len(self.test_loader(trainer).dataset)
        if outputs.ndim not in (2, 3):
            raise UserError(f"test_step: expected units of shape (B, U, D) or (B, U), got {tuple(outputs.shape)}")
        if self._latents is None:
            self._latents = np.empty((expected, *outputs.shape[1:]), dtype=np.float32)
        end = self._filled + len(outputs)
        if end > expected:
            raise UserError(f"representation: expected {expected} rows, one per image of the data set, got {end}")
        self._latents[self._filled : end] = outputs.detach().to("cpu", torch.float32).numpy()
        self._filled = end

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file.

        Raises:
            UserError: fewer rows than the data set has images.
        """
        if self._latents is None:
            return
        latents, self._latents = self._latents, None  # frees the memory early
        if self._filled != len(latents):
            raise UserError(
                f"representation: expected {len(latents)} rows, one per image of the data set, got {self._filled} rows."
                " Use a test loader with drop_last=False, such as the data module's"
            )
        num_bad = int((~np.isfinite(latents)).sum())
        if num_bad:
            logger.warning("%d of %d numbers of the representation are not finite", num_bad, latents.size)
        progress = self.progress(trainer)
        path = self.run_dir(trainer) / "dis_repre" / f"epoch={progress.epoch:06d}.npz"
        space = position_space_of(self.test_loader(trainer).dataset)
        arrays = {} if space is None else factor_arrays(space)
        if isinstance(pl_module, HasUnits) and pl_module.unit_names is not None:
            arrays["unit_names"] = np.array(pl_module.unit_names, dtype=str)
        save_representation(path, latents, progress.step, **arrays)
        logger.info("wrote the representation, shape %s: %s", latents.shape, path)


def factor_arrays(space: FactorSpace) -> dict[str, np.ndarray]:
    """Return a representation file's arrays on the factors: the whole space, and the factors to recover."""
    return {
        "factor_space": np.array(json.dumps(space.to_dict())),
        "factor_names": np.array(space.factor_names, dtype=str),
        "factor_sizes": np.array(space.factors_num_values, dtype=np.int64),
    }
