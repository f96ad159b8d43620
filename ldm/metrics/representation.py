"""Reduction of latents (N, U, D) to scalar units (N, U), which the metrics score: first principal components."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from einops import rearrange

from ldm.metrics.common import MetricError

BLOCK_VALUES = 4_000_000  # float64 values in memory at once (32 MB), for memory-mapped latents
MOST = 1e15  # magnitude of codes: squares are finite in float32
PRUNED = 0.05  # standard deviation below which FactorVAE leaves out a unit
FEW_ROWS = 20  # rows per unit below which random codes have high scores
MOST_UNITS = 4096  # metrics compare units pair by pair, and latents with more units are mostly transposed


def check_latents(shape: tuple[int, ...], num_images: int) -> None:
    """Check the shape of latents before they are read.

    Args:
        shape: shape of the latents, (N, U, D) or (N, K).
        num_images: number of rows of the factors.

    Raises:
        MetricError: the number of axes or rows is wrong, or there are more than 4096 units.
    """
    if len(shape) not in (2, 3) or 0 in shape:
        raise MetricError(f"latents: expected shape (N, U, D) or (N, K), not empty; got {shape}.")
    if shape[0] != num_images:
        raise MetricError(
            f"latents have {shape[0]} rows, but the factors {num_images}. {_next_step(shape, num_images)}"
        )
    if shape[1] > MOST_UNITS:
        raise MetricError(
            f"latents: expected at most {MOST_UNITS} units, got {shape[1]} for {shape[0]} images. If the images are "
            "in the columns, (K, N), pass latents.T; otherwise reduce the latents first."
        )


def _next_step(shape: tuple[int, ...], num_images: int) -> str:
    if num_images in shape[1:]:
        return f"The shape {shape} looks like (K, N), images in the columns: pass latents.T."
    if shape[0] > num_images and shape[0] % num_images == 0:
        return (
            f"Every image seems to be there {shape[0] // num_images} times: keep one row of each, or pass the factors "
            "as a table with one row per row of the latents."
        )
    return "Encode every image of the data set once, in order."


def scalar_units(latents: np.ndarray) -> np.ndarray:
    """Return one number per unit and image, as in DisDiff's protocol.

    Args:
        latents: (N, U, D) vectors per unit, each replaced by its first principal component over all N rows,
            or (N, U) scalars, used as they are. May be memory-mapped: they are read in blocks of rows.

    Returns:
        (N, U): float64 components with the sign that makes the largest loading positive (zero for a unit that does not
        vary), or the (N, U) input.

    Raises:
        MetricError: the number of axes is wrong, there are no rows, values are not real and finite, or no unit varies.

    Example:
        >>> latents = np.array([[[0.0, 0.0]], [[3.0, 4.0]], [[6.0, 8.0]]])
        >>> scalar_units(latents).round(2).tolist()
        [[-5.0], [0.0], [5.0]]
    """
    check_latents(latents.shape, latents.shape[0] if latents.ndim else 0)
    if latents.dtype.kind not in "fiub":
        raise MetricError(f"latents: expected real numbers, got {latents.dtype}.")
    vectors = latents[:, :, None] if latents.ndim == 2 else latents
    mean, varies = _mean_and_variation(vectors)
    if not varies.any():
        raise MetricError(
            f"latents: no unit varies, all {len(latents)} images have the same latents. Check for a collapsed "
            "encoder, or a file that was written before encoding was finished."
        )
    if latents.ndim == 2:
        return latents
    axes = np.where(varies[:, None], _principal_axes(vectors, mean), 0.0)  # (U, D)
    components = np.empty(latents.shape[:2])
    for start, block in _row_blocks(vectors):
        components[start : start + len(block)] = np.einsum("nud,ud->nu", block - mean, axes)
    return components


def standardize(units: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Divide each of the units (N, U) by its standard deviation; units that do not vary become 0.

    Args:
        units: may be memory-mapped: they are read in blocks of rows.
        out: (N, U) array to write, such as a memory-mapped file; None makes one of float64.
    """
    out = np.empty(units.shape) if out is None else out
    mean, deviations = _moments(units)
    scale = np.where(deviations > 0, deviations, np.inf)
    for start, block in _row_blocks(units[:, :, None]):
        out[start : start + len(block)] = (block[:, :, 0] - mean) / scale
    return out


def size_note(num_rows: int, num_units: int) -> str | None:
    """Return a warning if metrics are high for random codes, too, because there are few rows."""
    if num_rows >= FEW_ROWS * num_units:
        return None
    return (
        f"{num_rows} rows are few for {num_units} units: FactorVAE, beta-VAE and DCI of random codes are also high. "
        "Compare with them (--trust)."
    )


def scale_note(units: np.ndarray) -> str | None:
    """Return a warning if FactorVAE, beta-VAE and SAP depend on the scale of the units (N, U), not on their content.

    FactorVAE leaves out units whose standard deviation is below 0.05, which is meant for units that carry nothing:
    those should also vary much less than the others.
    """
    deviations = _moments(units)[1]
    small = deviations < PRUNED
    if not (small & (deviations > PRUNED * deviations.max())).any():
        return None
    return (
        f"{np.count_nonzero(~small)} of {len(small)} units are active (standard deviation at least {PRUNED}), the "
        f"largest deviation is {deviations.max():.2g}: FactorVAE leaves out the others, and the classifiers of "
        "beta-VAE and SAP depend on the scale. Compare with the scores of standardized units (--standardize; "
        "standardize=True)."
    )


def _row_blocks(vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first row and a float64 copy of each block of rows."""
    rows = max(1, BLOCK_VALUES // (vectors.shape[1] * vectors.shape[2]))
    for start in range(0, len(vectors), rows):
        yield start, vectors[start : start + rows].astype(np.float64)


def _moments(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of units (N, U), both (U,) float64; 0 exactly for units that do not vary."""
    vectors = units[:, :, None]
    mean, varies = _mean_and_variation(vectors)
    squares = np.zeros(units.shape[1])
    for _, block in _row_blocks(vectors):
        squares += np.square(block - mean).sum(axis=(0, 2))
    return mean[:, 0], np.where(varies, np.sqrt(squares / len(units)), 0.0)


def _mean_and_variation(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean (U, D) over the rows, and whether each unit varies (U,); check that values are finite."""
    total = np.zeros(vectors.shape[1:])
    varies, largest = np.zeros(vectors.shape[1], dtype=bool), np.zeros(vectors.shape[1])
    first_row = np.asarray(vectors[0], dtype=np.float64)
    for start, block in _row_blocks(vectors):
        total += block.sum(axis=0)
        if not np.isfinite(total).all():
            _raise_not_finite(start, block)
        varies |= (block != first_row).any(axis=(0, 2))
        largest = np.maximum(largest, np.abs(block).max(axis=(0, 2)))
    _check_scale(largest)
    return total / len(vectors), varies


def _check_scale(largest: np.ndarray) -> None:
    """Raise for units whose values leave the range of float32 in the metrics, or if all values of all units do.

    Args:
        largest: (U,) the largest magnitude of each unit.
    """
    wrong = largest > MOST
    if 0 < largest.max() < 1 / MOST:
        wrong = largest > 0
    if wrong.any():
        units = ", ".join(map(str, np.flatnonzero(wrong)[:5]))
        raise MetricError(
            f"latents: expected magnitudes from {1 / MOST:.0e} to {MOST:.0e}, got {largest[wrong].max():.3g} in unit "
            f"{units}{', ...' if wrong.sum() > 5 else ''}. Divide the codes by a constant, then score them again."
        )


def _raise_not_finite(start: int, block: np.ndarray) -> None:
    """Raise the error for a block of rows whose sum is not finite."""
    bad = np.argwhere(~np.isfinite(block))  # (bad values, 3), sorted by row and unit
    row, unit = bad[0, :2].tolist() if len(bad) else (0, 0)
    found = block[tuple(bad[0])] if len(bad) else "a sum beyond the range of float64"
    raise MetricError(
        f"latents: expected finite values, got {found} in unit {unit}, first in row {start + row}. "
        "Check for a diverged training run, then encode the data set again."
    )


def _principal_axes(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return the first principal axis of each unit, (U, D) of length 1, largest entry by magnitude positive."""
    num_units, width = mean.shape
    covariance = np.zeros((num_units, width, width))
    for _, block in _row_blocks(vectors):
        by_unit = rearrange(block - mean, "rows u d -> u rows d")
        covariance += rearrange(by_unit, "u rows d -> u d rows") @ by_unit
    axes = np.linalg.eigh(covariance)[1][:, :, -1]  # eigenvalues ascend: the last is the first component
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
    return axes * np.sign(largest)
