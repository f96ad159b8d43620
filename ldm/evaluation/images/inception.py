"""Distances of two sets of images in the features of InceptionV3: FID and KID.

The network is torch-fidelity's (extra ``fid``), which gives the figures of the original TensorFlow code. Its weights
are looked for on this machine and never downloaded: the path given, the variable ``INCEPTION_WEIGHTS``, torch's cache.

The references feed it images of 0 to 255 where it expects 0 to 1, and count unfilled rows where there are fewer than
10,000 images; figures taken with that code compare with none taken properly, and it is not repeated here.

Dims: B batch, n images, D = 2048 features.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.modules.weights import find_weights, read_state_dict
from ldm.util import UserError, atomic_write

INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_VARIABLE = "INCEPTION_WEIGHTS"
LAYER = "2048"  # the pooled features
SLACK = 0.02  # a decoder may leave [-1, 1] by so much of its width; more is another range


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of the features of a set of images: all FID needs.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64.
    """

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Moments of features (n, D).

        Raises:
            UserError: fewer than two images.
        """
        if len(features) < 2:
            raise UserError(f"FID needs at least 2 images of each kind, found {len(features)}.")
        features = features.astype(np.float64)
        return cls(features.mean(axis=0), np.cov(features, rowvar=False))

    @classmethod
    def read(cls, path: str | os.PathLike) -> Moments:
        """Read what ``write`` or pytorch-fid wrote: an npz of ``mu`` and ``sigma``.

        Raises:
            UserError: the file is absent, damaged, or holds something else.
        """
        try:
            with np.load(path) as archive:
                return cls(archive["mu"].astype(np.float64), archive["sigma"].astype(np.float64))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} holds no statistics for FID (npz of mu and sigma): {error}") from error

    def write(self, path: str | os.PathLike) -> None:
        """Keep them as npz of ``mu`` and ``sigma``."""
        with atomic_write(path, "wb") as stream:
            np.savez(stream, mu=self.mean, sigma=self.covariance)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as whole numbers 0 to 255.

    Args:
        images: (B, 3, H, W) float in [-1, 1], or uint8, which stay as they are.

    Raises:
        UserError: another shape, or values clearly outside [-1, 1].
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"expected images of shape (B, 3, H, W), found {tuple(images.shape)}.")
    if images.dtype == torch.uint8:
        return images
    low, high = images.min().item(), images.max().item()
    if not (-1 - 2 * SLACK <= low and high <= 1 + 2 * SLACK):
        raise UserError(f"expected images in [-1, 1], found values from {low:.3g} to {high:.3g}: scale them first.")
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Inception:
    """InceptionV3's pooled features.

    Args:
        weights: path of the weights; None looks in the places named above.
        device: where it runs.

    Raises:
        UserError: torch-fidelity is not installed, there are no weights, or they are others.
    """

    def __init__(self, weights: str | os.PathLike | None = None, device: str | torch.device = "cpu") -> None:
        path = find_inception(weights)
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UserError("FID and KID need torch-fidelity: pip install -e .[fid]") from error
        buffer = io.BytesIO()  # torch-fidelity unpickles what it is given, so it is given tensors only
        torch.save(read_state_dict(path), buffer)
        buffer.seek(0)
        try:
            self._network = FeatureExtractorInceptionV3("inception", [LAYER], buffer).to(device)
        except RuntimeError as error:
            first_line = " ".join(str(error).split())[:200]
            raise UserError(f"{path} is not InceptionV3 of FID, expected {INCEPTION_FILES[0]}: {first_line}") from error
        self._device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> np.ndarray:
        """Features (B, D) float32 of images (B, 3, H, W) in [-1, 1] or uint8."""
        return self._network(to_bytes(images).to(self._device))[0].cpu().numpy()

    def features(self, batches: Iterable[Tensor]) -> np.ndarray:
        """Features (n, D) of all images of the batches.

        Raises:
            UserError: there are no images.
        """
        parts = [self(images) for images in batches]
        if not parts:
            raise UserError("there are no images to take features of.")
        return np.concatenate(parts)


def find_inception(path: str | os.PathLike | None = None) -> Path:
    """Where InceptionV3's weights are.

    Raises:
        UserError: they are nowhere; the message says which file to put where.
    """
    what, source = "FID and KID need InceptionV3's weights", "torch-fidelity's release v0.2.0"
    return find_weights(path, what, INCEPTION_FILES, INCEPTION_VARIABLE, source, " or with --inception")


def frechet_distance(first: Moments, second: Moments) -> float:
    """FID: squared Frechet distance of two Gaussians (Heusel et al., 2017, equation 6); at least 0, lower is better.

    The trace of (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric.

    Raises:
        UserError: of different widths.
    """
    if first.mean.shape != second.mean.shape:
        raise UserError(f"statistics of {len(first.mean)} and {len(second.mean)} features are of different networks.")
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    product = np.linalg.eigvalsh(root @ second.covariance @ root)
    cross = np.sqrt(np.clip(product, 0.0, None)).sum()
    distance = np.sum((first.mean - second.mean) ** 2) + np.trace(first.covariance) + np.trace(second.covariance)
    return float(max(0.0, distance - 2 * cross))


def kernel_distance(
    first: np.ndarray, second: np.ndarray, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID: mean and deviation over random subsets of the squared maximum mean discrepancy; lower is better.

    Binkowski et al. (2018): kernel (x y / D + 1)^3, estimated without bias, so that it may be slightly negative.

    Args:
        first, second: features (n, D), (m, D).
        num_subsets: subsets drawn of each.
        subset_size: images of each subset; fewer where there are fewer.
        seed: of the subsets.

    Raises:
        UserError: fewer than two images of a kind.
    """
    size = min(subset_size, len(first), len(second))
    if size < 2:
        raise UserError(f"KID needs at least 2 images of each kind, found {len(first)} and {len(second)}.")
    draws = np.random.default_rng(seed)
    distances = []
    for _ in range(num_subsets):
        x, y = (features[draws.choice(len(features), size, replace=False)] for features in (first, second))
        distances.append(_discrepancy(x.astype(np.float64), y.astype(np.float64)))
    return float(np.mean(distances)), float(np.std(distances))


def _discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of two samples (m, D)."""
    size, width = x.shape

    def kernel(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return (one @ other.T / width + 1) ** 3

    within = sum(matrix.sum() - np.trace(matrix) for matrix in (kernel(x, x), kernel(y, y)))
    return float(within / (size * (size - 1)) - 2 * kernel(x, y).mean())
