"""Principal component analysis of the pixels: the baseline that a learned representation has to exceed.

Dimensions: N images, K components, P pixel values of an image.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from einops import rearrange
from torch import Tensor

from ldm.diffusion.noise import fixed_noise
from ldm.evaluation.representation import factor_arrays, save_representation
from ldm.evaluation.row_encoder import RowEncoder, whole_set
from ldm.evaluation.test_pass import TestPassCallback
from ldm.models.inputs import images_from_batch
from ldm.ranges import Count

logger = logging.getLogger(__name__)

FOLDER = "pixel_pca"  # a run folder of its own inside the run's
SAMPLE = 4096  # images on which the axes are computed
_ITERATIONS = 4  # of the randomized decomposition


class PixelPCA(NamedTuple):
    """Mean image and leading principal axes; encodes images like a model with K scalar units."""

    mean: Tensor  # (P,)
    axes: Tensor  # (P, K) orthonormal

    def encode_representation(self, batch: dict[str, Any]) -> Tensor:
        """Return the components (B, K) of a batch of the data loader."""
        return (_pixels(batch).cpu() - self.mean) @ self.axes


def pixel_axes(dataset: Any, num_components: int, seed: int = 0) -> PixelPCA:
    """Compute the axes on a random sample of a data set with known factors, independent of its split.

    Raises:
        UserError: the data set has no factors.
    """
    images = whole_set(dataset)
    rows = np.random.RandomState(seed).choice(len(images), min(SAMPLE, len(images)), replace=False)
    pixels = _pixels({"image": torch.from_numpy(images.images(images.rows[np.sort(rows)]))})
    mean = pixels.mean(dim=0)
    with fixed_noise(seed, mean.device):
        axes = torch.pca_lowrank(pixels - mean, q=num_components, center=False, niter=_ITERATIONS)[2]
    return PixelPCA(mean, axes)


class PixelBaseline(TestPassCallback):
    """Writes ``<run>/pixel_pca/dis_repre/epoch=000000.npz`` after the test pass, a PCA of the same images.

    Scoring the run's folder scores it by the same protocol, so that it appears beside the run in the table.

    Args:
        num_components: K; ``None`` uses the model's number of units.
    """

    def __init__(self, num_components: Count | None = None) -> None:
        self.num_components = num_components

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, in the first process only."""
        if trainer.fast_dev_run or not trainer.is_global_zero or not self.is_whole(trainer):
            return
        num_components = self.num_components or pl_module.latent_unit
        path = write_pixel_pca(self.test_loader(trainer).dataset, num_components, self.run_dir(trainer) / FOLDER)
        logger.info("wrote a PCA of the pixels with %d components for comparison: %s", num_components, path)


def write_pixel_pca(dataset: Any, num_components: int, run_dir: Path, seed: int = 0) -> Path:
    """Write a PCA of the pixels of a whole data set as the representation file of a run.

    Returns:
        ``<run_dir>/dis_repre/epoch=000000.npz``.

    Raises:
        UserError: the data set has no factors.
    """
    rows = RowEncoder(pixel_axes(dataset, num_components, seed), dataset, batch_size=2048)
    path = Path(run_dir) / "dis_repre" / "epoch=000000.npz"
    save_representation(path, rows(np.arange(rows.space.size)).astype(np.float32), 0, **factor_arrays(rows.space))
    return path


def _pixels(batch: dict[str, Any]) -> Tensor:
    """Return the pixels (B, P) in [-1, 1] of a batch."""
    return rearrange(images_from_batch(batch), "b c h w -> b (h w c)")
