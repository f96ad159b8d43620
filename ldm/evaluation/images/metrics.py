"""How close images come to others (PSNR, SSIM, LPIPS), and what an encoder tells of a face (TAD).

Dims: B batch, n images, H W space, L numbers of a representation, A attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.metrics import tad
from ldm.metrics.tad import CELEBA_ATTRIBUTES
from ldm.models.autoencoder import psnr
from ldm.util import UserError

SSIM_WINDOW = 11  # pixels of the Gaussian window, of deviation 1.5, as in Wang et al. (2004)


class ReconstructionScores:
    """Means over images of the distances between images and their reconstructions.

    Args:
        lpips: perceptual distance ``(images, reconstructions) -> (B, 1, 1, 1)`` on [-1, 1], such as
            ``ldm.modules.lpips_alex.AlexLPIPS``; None leaves it out.
    """

    def __init__(self, lpips: nn.Module | None = None) -> None:
        self._lpips = lpips
        self._sums: dict[str, float] = {}
        self._num_images = 0

    @torch.no_grad()
    def add(self, images: Tensor, reconstructions: Tensor) -> None:
        """Take in a batch.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            reconstructions: the same shape; what leaves [-1, 1] is cut off.

        Raises:
            UserError: shapes differ, or images are smaller than the window of SSIM.
        """
        if images.shape != reconstructions.shape or images.ndim != 4:
            raise UserError(
                f"expected images and reconstructions of one shape (B, C, H, W), found {tuple(images.shape)} and "
                f"{tuple(reconstructions.shape)}."
            )
        reconstructions = reconstructions.clamp(-1, 1)
        values = image_distances(images, reconstructions)
        if self._lpips is not None:
            values["lpips"] = self._lpips(images, reconstructions).flatten()
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.double().sum())
        self._num_images += len(images)

    def result(self) -> dict[str, float]:
        """Means over all images.

        Returns:
            ``psnr`` in dB and ``ssim``, at most 1, of which higher is better; ``mse`` on [0, 1] and, if it was asked
            for, ``lpips``, of which lower is.

        Raises:
            UserError: no images were taken in.
        """
        if not self._num_images:
            raise UserError("there are no reconstructions to score.")
        return {name: total / self._num_images for name, total in self._sums.items()}


def image_distances(images: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Per image, (B,) each: ``psnr`` in dB, ``ssim`` and ``mse``, all on images mapped to [0, 1].

    SSIM is torchmetrics' (a window around every pixel, edges mirrored) and reads (B, C, H, W): the references feed
    channels last, so that there it slides over rows of colours.

    Args:
        images, others: (B, C, H, W) in [-1, 1].

    Raises:
        UserError: images are smaller than the window of SSIM.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    if min(images.shape[2:]) < SSIM_WINDOW:
        raise UserError(f"SSIM looks at {SSIM_WINDOW} pixels at once; found images of {tuple(images.shape[2:])}.")
    first, second = (images.float() + 1) / 2, (others.float() + 1) / 2
    similarity = ssim(second, first, sigma=1.5, kernel_size=SSIM_WINDOW, data_range=1.0, reduction="none")
    return {
        "psnr": psnr(others, images),
        "ssim": similarity.reshape(len(images)),
        "mse": (first - second).square().flatten(1).mean(dim=1),
    }


@torch.no_grad()
def encode_all(
    encode: Callable[[Tensor], Tensor], batches: Iterable[Tensor], as_unit_range: bool = False
) -> np.ndarray:
    """Codes of all images, every number a unit of its own: (n, L) float32.

    Args:
        encode: images (B, 3, H, W) in [-1, 1] -> codes (B, ...); of a model in eval mode.
        batches: images in [-1, 1].
        as_unit_range: hand the encoder images in [0, 1], as the references' TAD does to encoders trained on [-1, 1].

    Raises:
        UserError: there are no images.
    """
    codes = []
    for images in batches:
        shown = (images + 1) / 2 if as_unit_range else images
        codes.append(encode(shown).flatten(1).float().cpu().numpy())
    if not codes:
        raise UserError("there are no images to encode.")
    return np.concatenate(codes)


def image_tad(
    model: nn.Module, batches: Iterable[Tensor], attributes: np.ndarray, tad_range: str = "signed", **options: Any
) -> dict[str, Any]:
    """TAD of a model with units, see ``ldm.metrics.tad``.

    The model is put into eval mode for it; the references' code leaves it as it is.

    Args:
        model: has ``encode_units(images) -> (B, U[, D])``.
        batches: images (B, 3, H, W) in [-1, 1], n in all.
        attributes: (n, A) of 0 and 1; 40 of them are taken for CelebA's in its order.
        tad_range: "signed" encodes images in [-1, 1]; "unit" in [0, 1], as the references do.
        **options: of ``ldm.metrics.tad``.

    Raises:
        UserError: the model has no units, another ``tad_range``, or no images.
        MetricError: see ``ldm.metrics.tad``.
    """
    if not hasattr(model, "encode_units"):
        raise UserError(f"TAD looks at a model's units, but {type(model).__name__} has no encode_units.")
    if tad_range not in ("signed", "unit"):
        raise UserError(f"tad_range must be 'signed' ([-1, 1]) or 'unit' ([0, 1]), found {tad_range!r}.")
    was_training = model.training
    model.eval()
    try:
        codes = encode_all(model.encode_units, batches, as_unit_range=tad_range == "unit")
    finally:
        model.train(was_training)
    if attributes.ndim == 2 and attributes.shape[1] == len(CELEBA_ATTRIBUTES):
        options = {"names": CELEBA_ATTRIBUTES, **options}
    return tad(codes, attributes, **options)
