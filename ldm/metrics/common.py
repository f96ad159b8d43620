"""Parts that the metrics share: interface of factor samplers, draws, checks, histogram codes, mutual information.

Every metric takes these arguments first:

* representation: (N, K) codes of the whole data set, row i of image i; or a function of row indices;
* sampler: a ``FactorSampler`` of the data set, which relates rows to factor values;
* random_state: a fresh ``RandomState``; published scores use seed 0.

Random draws follow disentanglement_lib call by call, so that equal seeds give equal scores.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from einops import rearrange

if TYPE_CHECKING:  # scikit-learn takes seconds to import: functions import it when they need it
    from sklearn.linear_model import LogisticRegression

FACTOR_CODE_BATCH = 16  # draws per batch of factor_codes; another number gives another random stream
LOOKUP_ROWS = 200_000  # rows looked up at once: limits the memory of the vectorized metrics
MANY_DRAWS = 50_000  # number of draws from which the compiled sampler is faster

Lookup = Callable[[np.ndarray], np.ndarray]
Representation = np.ndarray | Lookup


class MetricError(ValueError):
    """A representation or a factor space cannot be scored; the message names the reason and the next step."""


@runtime_checkable
class FactorSampler(Protocol):
    """Ground truth of a data set whose observations are row indices, such as ``ldm.data.factors.FactorSpace``."""

    @property
    def num_factors(self) -> int:
        """Number of generative factors F."""
        ...

    @property
    def factors_num_values(self) -> Sequence[int]:
        """Number of values of each factor, length F."""
        ...

    def sample_factors(self, num: int, random_state: np.random.RandomState) -> np.ndarray:
        """Draw (num, F) integer factor values."""
        ...

    def sample_observations_from_factors(self, factors: np.ndarray, random_state: np.random.RandomState) -> np.ndarray:
        """Return row indices (num,) of images with the given factor values (num, F)."""
        ...


@runtime_checkable
class ProductSampler(Protocol):
    """Factor sampler whose draws can be made in bulk, see ``draw_points``."""

    @property
    def product_sizes(self) -> Sequence[int] | None:
        """Number of values of each factor if ``sample_factors`` is ``randint(size, size=num)`` factor by factor and
        ``sample_observations_from_factors`` draws nothing; else None."""
        ...


@runtime_checkable
class ConditionalSampler(Protocol):
    """Factor sampler of data that lack some combinations of values, such as ``FactorTable``."""

    def hold_fixed(
        self, factors: np.ndarray, factor: int, values: np.ndarray | int, random_state: np.random.RandomState
    ) -> np.ndarray:
        """Return draws like ``factors`` (n, F) that have the given values in one factor."""
        ...


@runtime_checkable
class SplitSampler(Protocol):
    """Factor sampler whose training and test codes come from different images."""

    def split(self, random_state: np.random.RandomState) -> tuple[FactorSampler, FactorSampler]:
        """Return samplers of training and of test rows."""
        ...


@runtime_checkable
class ConstantFactors(Protocol):
    """Factor sampler that may have factors of a single value."""

    def without_constant(self) -> FactorSampler:
        """Return the sampler of the factors that vary, with a warning about the others: they would lower FactorVAE."""
        ...


def as_lookup(representation: Representation) -> Lookup:
    """Return a function from row indices (n,) to codes (n, K).

    Codes keep their precision, float32 or float64, and integers become int64: disentanglement_lib computes in the
    precision of the codes, too, and the edges of a histogram depend on it. Half precision is widened.

    Args:
        representation: (N, K) array (may be memory-mapped), or a function of row indices.
    """

    def lookup(rows: np.ndarray) -> np.ndarray:
        codes = np.asarray(representation(rows) if callable(representation) else representation[rows])
        if codes.dtype in (np.float32, np.float64):
            return codes
        return codes.astype(np.int64 if codes.dtype.kind in "iub" else np.float64)

    return lookup


def require_factors(sampler: FactorSampler, metric: str) -> int:
    """Return the number of factors; raise a ``MetricError`` if there are fewer than two."""
    if sampler.num_factors < 2:
        raise MetricError(f"{metric}: expected at least 2 factors to compare, got {sampler.num_factors}.")
    return sampler.num_factors


def require_units(codes: np.ndarray, metric: str) -> int:
    """Return the number of units K of codes (n, K); raise a ``MetricError`` if there are fewer than two."""
    if codes.shape[1] < 2:
        raise MetricError(f"{metric}: expected at least 2 units to compare, got {codes.shape[1]}.")
    return codes.shape[1]


def require_varying(labels: np.ndarray, metric: str) -> None:
    """Raise a ``MetricError`` if a factor takes a single value in labels (n, F)."""
    constant = np.flatnonzero((labels == labels[0]).all(axis=0))
    if constant.size:
        raise MetricError(
            f"{metric}: expected factors that vary, but factor {constant[0]} takes a single value in {len(labels)} "
            "samples. Leave that factor out of the factor space."
        )


def hold_fixed(
    sampler: FactorSampler,
    factors: np.ndarray,
    factor: int,
    values: np.ndarray | int,
    random_state: np.random.RandomState,
) -> np.ndarray:
    """Return ``factors`` (n, F) with ``values`` in one factor; a ``ConditionalSampler`` may redraw the others."""
    if isinstance(sampler, ConditionalSampler):
        return sampler.hold_fixed(factors, factor, values, random_state)
    held = factors.copy()
    held[:, factor] = values
    return held


def standardized(train_codes: np.ndarray, test_codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale both samples (n, K) by mean and deviation of the training sample; units that do not vary become 0."""
    mean, deviation = train_codes.mean(axis=0), train_codes.std(axis=0)
    varies = (train_codes != train_codes[0]).any(axis=0) & (deviation > 0)  # squares of tiny values may be 0
    scale = np.where(varies, deviation, 1.0)
    return np.where(varies, (train_codes - mean) / scale, 0.0), np.where(varies, (test_codes - mean) / scale, 0.0)


def labelled_rows(
    sampler: FactorSampler, num: int, random_state: np.random.RandomState, batch_size: int = FACTOR_CODE_BATCH
) -> tuple[np.ndarray, np.ndarray]:
    """Draw rows (num,) and their labels (num, F) int64, ``batch_size`` at a time, which fixes the random stream."""
    factors, rows = [], []
    for start in range(0, num, batch_size):
        batch = sampler.sample_factors(min(batch_size, num - start), random_state)
        factors.append(batch)
        rows.append(sampler.sample_observations_from_factors(batch, random_state))
    return np.concatenate(rows), np.concatenate(factors)


def factor_codes(
    representation: Representation,
    sampler: FactorSampler,
    num: int,
    random_state: np.random.RandomState,
    batch_size: int = FACTOR_CODE_BATCH,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw codes (num, K), as returned by ``as_lookup``, and labels (num, F) int64; see ``labelled_rows``."""
    rows, labels = labelled_rows(sampler, num, random_state, batch_size)
    return as_lookup(representation)(rows), labels


def train_test_codes(
    representation: Representation,
    sampler: FactorSampler,
    num_train: int,
    num_test: int,
    random_state: np.random.RandomState,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw training codes and labels, then test codes and labels; see ``factor_codes``.

    On a complete data set both are drawn from the same images, as in disentanglement_lib, where a test code is mostly
    also a training code. A ``SplitSampler`` draws them from disjoint rows.
    """
    sides = sampler.split(random_state) if isinstance(sampler, SplitSampler) else (sampler, sampler)
    train = factor_codes(representation, sides[0], num_train, random_state)
    return *train, *factor_codes(representation, sides[1], num_test, random_state)


def fit_logistic(codes: np.ndarray, labels: np.ndarray, **options: Any) -> LogisticRegression:
    """Fit scikit-learn's logistic regression of labels (n,) from codes (n, K), with its defaults except ``options``.

    The protocols use the classifier after its 100 iterations, converged or not; the warning is suppressed.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(**options).fit(codes, labels)


def point_blocks(num_points: int, batch_size: int) -> Iterator[int]:
    """Split ``num_points`` points of ``batch_size`` rows into blocks of limited memory; yield the block sizes."""
    block = max(1, LOOKUP_ROWS // batch_size)
    for start in range(0, num_points, block):
        yield min(block, num_points - start)


def draw_points(
    sampler: FactorSampler, random_state: np.random.RandomState, num_points: int, num_sets: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw points of ``num_sets`` (1 or 2) batches of rows in which one factor is fixed.

    With one batch, the factor has the same value in all its rows; with two, the rows agree in it pair by pair. The
    draws are those of disentanglement_lib; a ``ProductSampler`` makes many of them in one compiled loop.

    Returns:
        Fixed factors (P,) and rows (S, P * B).
    """
    sizes = sampler.product_sizes if isinstance(sampler, ProductSampler) else None
    if sizes is not None and num_points * num_sets * batch_size >= MANY_DRAWS:
        from ldm.metrics.sampling import draws  # imports numba

        fixed, values = draws.draw_points(tuple(sizes), random_state, num_points, num_sets, batch_size)
        points = np.arange(num_points)
        first = values[points, 0, :, fixed]  # (P, B)
        values[points, -1, :, fixed] = first if num_sets == 2 else first[:, :1]
        sets = rearrange(values, "p s b f -> s (p b) f")
        return fixed, np.stack([sampler.sample_observations_from_factors(each, random_state) for each in sets])
    fixed, rows = np.empty(num_points, dtype=np.int64), []
    for point in range(num_points):
        factor = fixed[point] = random_state.randint(sampler.num_factors)
        batches = [sampler.sample_factors(batch_size, random_state) for _ in range(num_sets)]
        values = batches[0][:, factor] if num_sets == 2 else batches[0][0, factor]
        batches[-1] = hold_fixed(sampler, batches[-1], factor, values, random_state)
        rows.append([sampler.sample_observations_from_factors(batch, random_state) for batch in batches])
    return fixed, rearrange(np.array(rows), "p s b -> s (p b)")


def histogram_codes(codes: np.ndarray, num_bins: int = 20) -> np.ndarray:
    """Replace the values of each unit by their histogram bins, 1 to ``num_bins``, of equal width over its range.

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
    """Return the mutual information in nats between the bins of each unit and each factor.

    Args:
        binned: (n, K) discrete codes.
        labels: (n, F) factor values.

    Returns:
        (K, F), at least 0.

    Example:
        >>> labels = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
        >>> mutual_information(labels[:, :1], labels).round(3)
        array([[0.693, 0.   ]])
    """
    columns = [_as_indices(column) for column in labels.T]
    information = np.empty((binned.shape[1], len(columns)))
    for unit, values in enumerate(binned.T):
        bins, num_bins = _as_indices(values)
        for factor, (indices, num_values) in enumerate(columns):
            counts = np.bincount(bins * num_values + indices, minlength=num_bins * num_values)
            joint = counts.reshape(num_bins, num_values) / len(binned)
            independent = np.outer(joint.sum(axis=1), joint.sum(axis=0))
            filled = joint > 0
            total = np.sum(joint[filled] * np.log(joint[filled] / independent[filled]))
            information[unit, factor] = max(0.0, total)  # rounding may give a negative sum
    return information


def _as_indices(column: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the rank of each entry among the distinct values (n,), and the number of these."""
    values, indices = np.unique(column, return_inverse=True)
    return indices.reshape(-1), len(values)


def factor_entropies(labels: np.ndarray) -> np.ndarray:
    """Return the entropy in nats of each column of labels (n, F): (F,)."""
    shares = [np.unique(column, return_counts=True)[1] / len(column) for column in labels.T]
    return np.array([-np.sum(share * np.log(share)) for share in shares])
