"""What the metrics share: the factor sampler's interface, batched draws, histogram codes, mutual information.

Every metric reads a representation of a whole data set, (N, K): row i is the code of image i, and a
*factor sampler* that knows which row belongs to which factor values. Random draws follow
disentanglement_lib call by call, so that equal seeds give equal scores; look-ups and sums are vectorised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

FACTOR_CODE_BATCH = 16  # draws per batch of factor_codes; another number is another random stream
LOOKUP_ROWS = 200_000  # rows looked up at once: bounds the memory of the vectorised metrics

Lookup = Callable[[np.ndarray], np.ndarray]
Representation = np.ndarray | Lookup


class MetricError(ValueError):
    """A representation or a factor space cannot be scored; the message says why and what to do."""


class FactorSampler(Protocol):
    """Ground truth of a data set whose observations are row indices (e.g. ``ldm.data.factors.FactorSpace``)."""

    @property
    def num_factors(self) -> int:
        """Number of generative factors F."""

    @property
    def factors_num_values(self) -> Sequence[int]:
        """Number of values of each factor, length F."""

    def sample_factors(self, num: int, random_state: np.random.RandomState) -> np.ndarray:
        """Draw (num, F) integer factor values."""

    def sample_observations_from_factors(
        self, factors: np.ndarray, random_state: np.random.RandomState
    ) -> np.ndarray:
        """Row indices (num,) of images that show the given factor values (num, F)."""


def as_lookup(representation: Representation) -> Lookup:
    """A function from row indices (n,) to float64 codes (n, K).

    Args:
        representation: (N, K) array (may be memory-mapped), or a function that already does the look-up.
    """
    if callable(representation):
        return lambda rows: np.asarray(representation(rows), dtype=np.float64)
    return lambda rows: np.asarray(representation[rows], dtype=np.float64)


def require_factors(sampler: FactorSampler, metric: str) -> int:
    """Number of factors, at least two.

    Raises:
        MetricError: with fewer than two factors there is nothing to disentangle.
    """
    if sampler.num_factors < 2:
        raise MetricError(f"{metric} compares factors and needs at least 2; this space has {sampler.num_factors}.")
    return sampler.num_factors


def require_units(codes: np.ndarray, metric: str) -> int:
    """Number of units K of codes (n, K), at least two.

    Raises:
        MetricError: with a single unit the score is not defined.
    """
    if codes.shape[1] < 2:
        raise MetricError(f"{metric} compares units and needs at least 2; this representation has {codes.shape[1]}.")
    return codes.shape[1]


def factor_codes(
    representation: Representation,
    sampler: FactorSampler,
    num: int,
    random_state: np.random.RandomState,
    batch_size: int = FACTOR_CODE_BATCH,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw labelled codes, ``batch_size`` at a time (the batch size decides the random stream).

    Returns:
        codes (num, K) float64 and labels (num, F) int64.
    """
    factors, rows = [], []
    for start in range(0, num, batch_size):
        batch = sampler.sample_factors(min(batch_size, num - start), random_state)
        factors.append(batch)
        rows.append(sampler.sample_observations_from_factors(batch, random_state))
    return as_lookup(representation)(np.concatenate(rows)), np.concatenate(factors)


def point_blocks(num_points: int, batch_size: int) -> Iterator[int]:
    """Split ``num_points`` points of ``batch_size`` rows each into blocks of bounded memory; yields block sizes."""
    block = max(1, LOOKUP_ROWS // batch_size)
    for start in range(0, num_points, block):
        yield min(block, num_points - start)


def histogram_codes(codes: np.ndarray, num_bins: int = 20) -> np.ndarray:
    """Replace each unit's value by its histogram bin, 1 to ``num_bins``; equal-width bins over the unit's range.

    Args:
        codes: (n, K).

    Returns:
        (n, K) of the same dtype.
    """
    binned = np.zeros_like(codes)
    for unit in range(codes.shape[1]):
        edges = np.histogram(codes[:, unit], num_bins)[1]
        binned[:, unit] = np.digitize(codes[:, unit], edges[:-1])
    return binned


def mutual_information(binned: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mutual information in nats between each unit's bin and each factor.

    Args:
        binned: (n, K) discrete codes.
        labels: (n, F) factor values.

    Returns:
        (K, F).
    """
    from sklearn.metrics import mutual_info_score

    columns = range(labels.shape[1])
    return np.array([[mutual_info_score(labels[:, f], unit) for f in columns] for unit in binned.T])


def factor_entropies(labels: np.ndarray) -> np.ndarray:
    """Entropy in nats of each column of labels (n, F); shape (F,)."""
    shares = [np.unique(column, return_counts=True)[1] / len(column) for column in labels.T]
    return np.array([-np.sum(share * np.log(share)) for share in shares])
