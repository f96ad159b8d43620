"""From latents (N, U, D) to the scalar units (N, U) that the metrics score: first principal component per unit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ldm.metrics.common import MetricError

BLOCK_VALUES = 4_000_000  # float64 values held at once (32 MB), so that memory-mapped latents stay on disk
MOST_UNITS = 4096  # more are refused: metrics compare units pair by pair, and such latents are mostly transposed


def check_latents(shape: tuple[int, ...], num_images: int) -> None:
    """Refuse latents whose shape cannot be right, before anything is read.

    Args:
        shape: of the latents, (N, U, D) or (N, K).
        num_images: rows that the factors have.

    Raises:
        MetricError: another number of axes or of rows, or more than 4096 units; says so if they look transposed.
    """
    if len(shape) not in (2, 3) or 0 in shape:
        raise MetricError(f"latents must have shape (N, U, D) or (N, K) and not be empty; found {shape}.")
    if shape[0] != num_images:
        raise MetricError(
            f"latents hold {shape[0]} rows, but the factors {num_images}." + _length_hint(shape, num_images)
        )
    if shape[1] > MOST_UNITS:
        raise MetricError(
            f"latents of shape {shape} have {shape[1]} units for {shape[0]} images, and more than {MOST_UNITS} units "
            "are not scored. If the images stand in the columns, (K, N), pass latents.T; if not, reduce them first."
        )


def _length_hint(shape: tuple[int, ...], num_images: int) -> str:
    if num_images in shape[1:]:
        return f" Their shape {shape} looks like (K, N), images in the columns: pass latents.T."
    if shape[0] > num_images and shape[0] % num_images == 0:
        return (
            f" That is every image {shape[0] // num_images} times: keep one row of each, or give the factors as a "
            "table with a row for each row of the latents."
        )
    return " Encode every image of the data set once, in order."


def scalar_units(latents: np.ndarray) -> np.ndarray:
    """One number per unit and image, as DisDiff's protocol asks.

    Args:
        latents: (N, U, D) vectors per unit, each replaced by its first principal component over all N rows,
            or (N, U) scalars, used as they are. May be memory-mapped: it is read in blocks of rows.

    Returns:
        (N, U): float64 components, sign such that the largest loading is positive (a unit that never varies
        gives zeros), or the (N, U) input itself.

    Raises:
        MetricError: another number of axes, no rows, no numbers, a value that is not finite (unit and first row
            named), or no unit that varies.
    """
    check_latents(latents.shape, latents.shape[0] if latents.ndim else 0)
    if latents.dtype.kind not in "fiub":
        raise MetricError(f"latents must be real numbers; found {latents.dtype}.")
    vectors = latents[:, :, None] if latents.ndim == 2 else latents
    mean, varies = _mean_and_variation(vectors)
    if not varies.any():
        raise MetricError(
            f"no unit varies: all {len(latents)} images have the same latents, so there is nothing to score. Look for "
            "a collapsed encoder, or a file written before encoding was done."
        )
    if latents.ndim == 2:
        return latents
    axes = np.where(varies[:, None], _principal_axes(vectors, mean), 0.0)  # (U, D)
    components = np.empty(latents.shape[:2])
    for start, block in _row_blocks(vectors):
        components[start : start + len(block)] = np.einsum("nud,ud->nu", block - mean, axes)
    return components


def _row_blocks(vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, float64 copy of a block of rows)."""
    rows = max(1, BLOCK_VALUES // (vectors.shape[1] * vectors.shape[2]))
    for start in range(0, len(vectors), rows):
        yield start, vectors[start : start + rows].astype(np.float64)


def _mean_and_variation(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (U, D) over the rows and whether each unit varies at all (U,); refuses values that are not finite."""
    total = np.zeros(vectors.shape[1:])
    varies = np.zeros(vectors.shape[1], dtype=bool)
    first_row = np.asarray(vectors[0], dtype=np.float64)
    for start, block in _row_blocks(vectors):
        total += block.sum(axis=0)
        if not np.isfinite(total).all():
            _raise_not_finite(start, block)
        varies |= (block != first_row).any(axis=(0, 2))
    return total / len(vectors), varies


def _raise_not_finite(start: int, block: np.ndarray) -> None:
    """Name the unit and the first row of a block whose sum is not finite."""
    bad = ~np.isfinite(block).all(axis=2)  # (rows, U)
    row = int(np.argmax(bad.any(axis=1)))
    unit = int(np.argmax(bad[row]))
    value = block[row, unit][~np.isfinite(block[row, unit])]
    found = value[0] if value.size else "a sum beyond the range of float64"
    raise MetricError(
        f"latents hold {found} in unit {unit}, first in row {start + row}; every value must be finite. "
        "Look for a diverged training run, then encode the data set again."
    )


def _principal_axes(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """First principal axis of each unit, (U, D) unit vectors whose largest entry by magnitude is positive."""
    num_units, width = mean.shape
    covariance = np.zeros((num_units, width, width))
    for _, block in _row_blocks(vectors):
        by_unit = (block - mean).transpose(1, 0, 2)  # (U, rows, D)
        covariance += by_unit.transpose(0, 2, 1) @ by_unit
    axes = np.linalg.eigh(covariance)[1][:, :, -1]  # eigenvalues ascend: the last is the first component
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
    return axes * np.sign(largest)
