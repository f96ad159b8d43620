"""Distances of two sets of images in the features of a network: FID and KID.

The features are those of ``ldm.modules.inception``. Dimensions: n images, D features.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass

import numpy as np

from ldm.errors import reason_of
from ldm.util import UserError, atomic_write


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of the features of a set of images, which determine FID."""

    mean: np.ndarray  # (D,) float64
    covariance: np.ndarray  # (D, D) float64

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Return the moments of features (n, D).

        Raises:
            UserError: fewer than two images.
        """
        if len(features) < 2:
            raise UserError(f"FID: expected at least 2 images in each set, got {len(features)}")
        features = features.astype(np.float64)
        return cls(features.mean(axis=0), np.cov(features, rowvar=False))

    @classmethod
    def read(cls, path: str | os.PathLike) -> Moments:
        """Read an npz of ``mu`` and ``sigma``, as ``write`` and pytorch-fid write it.

        Raises:
            UserError: the file does not exist, is damaged, or has other contents.
        """
        try:
            with np.load(path) as archive:
                return cls(archive["mu"].astype(np.float64), archive["sigma"].astype(np.float64))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path}: expected statistics for FID (npz of mu and sigma), got: {reason_of(error)}"
            ) from error

    def write(self, path: str | os.PathLike) -> None:
        """Write an npz of ``mu`` and ``sigma``."""
        with atomic_write(path, "wb") as stream:
            np.savez(stream, mu=self.mean, sigma=self.covariance)


def frechet_distance(first: Moments, second: Moments) -> float:
    """Return FID, the squared Frechet distance of two Gaussians (Heusel et al. 2017, Eq. 6); lower is better.

    The trace of (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric.

    Raises:
        UserError: the moments have different numbers of features.
    """
    if first.mean.shape != second.mean.shape:
        raise UserError(f"FID: expected features of one network, got {len(first.mean)} and {len(second.mean)} features")
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    product = np.linalg.eigvalsh(root @ second.covariance @ root)
    cross = np.sqrt(np.clip(product, 0.0, None)).sum()
    distance = np.sum((first.mean - second.mean) ** 2) + np.trace(first.covariance) + np.trace(second.covariance)
    return float(max(0.0, distance - 2 * cross))


def kernel_distance(
    first: np.ndarray, second: np.ndarray, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return KID, mean and deviation of the squared maximum mean discrepancy over random subsets; lower is better.

    Binkowski et al. (2018): kernel (x y / D + 1)^3 and an unbiased estimate, which may be slightly negative.

    Args:
        first, second: features (n, D), (m, D).
        num_subsets: number of subsets.
        subset_size: images of each subset; fewer if a set has fewer.
        seed: seed of the subsets.

    Raises:
        UserError: fewer than two images in a set.
    """
    size = min(subset_size, len(first), len(second))
    if size < 2:
        raise UserError(f"KID: expected at least 2 images in each set, got {len(first)} and {len(second)}")
    draws = np.random.default_rng(seed)
    distances = []
    for _ in range(num_subsets):
        x, y = (features[draws.choice(len(features), size, replace=False)] for features in (first, second))
        distances.append(_discrepancy(x.astype(np.float64), y.astype(np.float64)))
    return float(np.mean(distances)), float(np.std(distances))


def _discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """Return the unbiased squared maximum mean discrepancy of two samples (m, D)."""
    size, width = x.shape
    within_x, within_y, between = ((one @ other.T / width + 1) ** 3 for one, other in ((x, x), (y, y), (x, y)))
    within = sum(kernel.sum() - np.trace(kernel) for kernel in (within_x, within_y))
    return float(within / (size * (size - 1)) - 2 * between.mean())
