"""Similarity of images (PSNR, SSIM, LPIPS), and attributes of faces in a representation (TAD).

Dimensions: B batch, n images, H W space, L numbers of a representation, A attributes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.metrics import tad
from ldm.metrics.tad import CELEBA_ATTRIBUTES
from ldm.models.autoencoder import psnr
from ldm.models.contexts import evaluating
from ldm.models.contracts import HasUnits, require
from ldm.util import UserError

SSIM_WINDOW = 11  # pixels of the Gaussian window, of deviation 1.5, as in Wang et al. (2004)


class ReconstructionScores:
    """Mean distances between images and their reconstructions.

    Args:
        lpips: perceptual distance ``(images, reconstructions) -> (B, 1, 1, 1)`` on [-1, 1], such as
            ``ldm.modules.lpips.AlexLPIPS``; ``None`` omits it.
    """

    def __init__(self, lpips: nn.Module | None = None) -> None:
        self._lpips = lpips
        self._sums: dict[str, float] = {}
        self._num_images = 0

    @torch.no_grad()
    def add(self, images: Tensor, reconstructions: Tensor) -> None:
        """Add a batch of images (B, 3, H, W) in [-1, 1] and of their reconstructions, which are clamped to [-1, 1].

        Raises:
            UserError: the shapes differ, or images are smaller than the window of SSIM.
        """
        if images.shape != reconstructions.shape or images.ndim != 4:
            raise UserError(
                f"reconstructions: expected the shape of the images, (B, C, H, W), got images of {tuple(images.shape)} "
                f"and reconstructions of {tuple(reconstructions.shape)}"
            )
        reconstructions = reconstructions.clamp(-1, 1)
        values = image_distances(images, reconstructions)
        if self._lpips is not None:
            values["lpips"] = self._lpips(images, reconstructions).flatten()
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.double().sum())
        self._num_images += len(images)

    def result(self) -> dict[str, float]:
        """Return the means of ``psnr`` in dB, ``ssim``, ``mse`` on [0, 1], and ``lpips`` if given, over all images."""
        if not self._num_images:
            raise UserError("reconstructions: expected at least one image, got none")
        return {name: total / self._num_images for name, total in self._sums.items()}


def image_distances(images: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Return ``psnr`` in dB, ``ssim`` and ``mse`` of each image, (B,) each, on images mapped to [0, 1].

    Both are (B, C, H, W) in [-1, 1]. SSIM is torchmetrics' (a window around every pixel, mirrored edges); the
    references pass channels last, so that their windows cover rows and colors.

    Raises:
        UserError: images are smaller than the window of SSIM.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    if min(images.shape[2:]) < SSIM_WINDOW:
        raise UserError(f"SSIM: expected images of at least {SSIM_WINDOW} pixels a side, got {tuple(images.shape[2:])}")
    first, second = (images.float() + 1) / 2, (others.float() + 1) / 2
    similarity = ssim(second, first, sigma=1.5, kernel_size=SSIM_WINDOW, data_range=1.0, reduction="none")
    return {
        "psnr": psnr(others, images),
        "ssim": similarity.reshape(len(images)),
        "mse": (first - second).square().flatten(1).mean(dim=1),
    }


@torch.no_grad()
def image_tad(
    model: nn.Module, batches: Iterable[Tensor], attributes: np.ndarray, tad_range: str = "signed", **options: Any
) -> dict[str, Any]:
    """Return the TAD of a model with units in evaluation mode, see ``ldm.metrics.tad``; every number is a unit.

    Args:
        model: implements ``HasUnits``.
        batches: images (B, 3, H, W) in [-1, 1], n in all.
        attributes: (n, A) of 0 and 1; 40 attributes are named as CelebA's, in its order.
        tad_range: "signed" encodes images in [-1, 1]; "unit" in [0, 1], as the references do although their encoders
            are trained on [-1, 1].
        **options: of ``ldm.metrics.tad``.

    Raises:
        UserError: the model has no units, ``tad_range`` is unknown, or there are no images.
        MetricError: see ``ldm.metrics.tad``.
    """
    require(model, HasUnits, "TAD")
    if tad_range not in ("signed", "unit"):
        raise UserError(f"tad_range: expected 'signed' ([-1, 1]) or 'unit' ([0, 1]), got {tad_range!r}")
    with evaluating(model):
        shown = (images if tad_range == "signed" else (images + 1) / 2 for images in batches)
        codes = [model.encode_units(images).flatten(1).float().cpu().numpy() for images in shown]
    if not codes:
        raise UserError("TAD: expected at least one image, got none")
    if attributes.ndim == 2 and attributes.shape[1] == len(CELEBA_ATTRIBUTES):
        options = {"names": CELEBA_ATTRIBUTES, **options}
    return tad(np.concatenate(codes), attributes, **options)
