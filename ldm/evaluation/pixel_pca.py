"""What a principal component analysis of the pixels scores: the line every learned representation has to beat.

Dims: N images, K components, P pixel values of an image.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.evaluation.representation import factor_arrays, save_representation
from ldm.evaluation.row_encoder import RowEncoder, whole_set
from ldm.evaluation.test_pass import TestPassCallback
from ldm.models.inputs import images_from_batch

log = logging.getLogger(__name__)

FOLDER = "pixel_pca"  # inside a run's folder; a run of its own to whoever scores

SAMPLE = 4096  # images the axes are found on
_ROUNDS = 4  # of the randomised decomposition; the leading axes of images are found to more digits than scores need


class PixelAxes(NamedTuple):
    """The mean image and the leading axes: ``mean`` (P,), ``axes`` (P, K) orthonormal."""

    mean: Tensor
    axes: Tensor


def pixel_axes(dataset: Any, num_components: int, seed: int = 0) -> PixelAxes:
    """Fit the axes on a random sample of a data set with known factors.

    Args:
        dataset: its ``images(rows)`` are used, whatever its split.
        num_components: K.
        seed: of the sample.

    Raises:
        UserError: the data set has no factors.
    """
    everything = whole_set(dataset)
    rows = np.random.RandomState(seed).choice(len(everything), min(SAMPLE, len(everything)), replace=False)
    pixels = _pixels(everything.images(everything.rows[np.sort(rows)]))
    mean = pixels.mean(dim=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        axes = torch.pca_lowrank(pixels - mean, q=num_components, center=False, niter=_ROUNDS)[2]
    return PixelAxes(mean, axes)


class PixelBaseline(TestPassCallback):
    """After the test pass writes ``<run>/pixel_pca/dis_repre/epoch=000000.npz``: the same images, told by a PCA.

    Scoring the run's folder scores it too, by the same protocol, so that it stands beside the run in the table.

    Args:
        num_components: K; None takes as many as the model has units.
    """

    def __init__(self, num_components: int | None = None) -> None:
        self.num_components = num_components

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, on the first process alone."""
        if trainer.fast_dev_run or not trainer.is_global_zero or not self.is_whole(trainer):
            return
        num_components = self.num_components or pl_module.latent_unit
        path = write_pixel_pca(self.test_loader(trainer).dataset, num_components, self.run_dir(trainer) / FOLDER)
        log.info("a PCA of the pixels with %d components, for comparison: %s", num_components, path)


def write_pixel_pca(dataset: Any, num_components: int, run_dir: Path, seed: int = 0) -> Path:
    """Write the representation file of a PCA of the pixels of a whole data set.

    Args:
        dataset: with known factors.
        num_components: K.
        run_dir: folder of its own, as if it were a run.
        seed: of the sample the axes are found on.

    Returns:
        ``<run_dir>/dis_repre/epoch=000000.npz``.

    Raises:
        UserError: the data set has no factors.
    """
    rows = RowEncoder(PixelPCA(pixel_axes(dataset, num_components, seed)), dataset, batch_size=2048)
    path = Path(run_dir) / "dis_repre" / "epoch=000000.npz"
    latents = rows(np.arange(rows.space.size)).astype(np.float32)
    save_representation(path, latents, 0, **factor_arrays(rows.space))
    return path


class PixelPCA(nn.Module):
    """A PCA of the pixels in the place of a model: ``encode_representation(batch)`` gives K scalars per image."""

    def __init__(self, fitted: PixelAxes) -> None:
        super().__init__()
        self.mean, self.axes = fitted

    def encode_representation(self, batch: dict[str, Any]) -> Tensor:
        """Batch as the data room delivers it -> (B, K)."""
        pixels = images_from_batch(batch).permute(0, 2, 3, 1).flatten(1)
        return (pixels.cpu() - self.mean) @ self.axes


def _pixels(images: np.ndarray) -> Tensor:
    """(n, H, W, C) uint8 -> (n, P) float32 in [-1, 1]."""
    return images_from_batch({"image": torch.from_numpy(images)}).permute(0, 2, 3, 1).flatten(1)
