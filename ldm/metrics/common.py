"""What the metrics share: the factor sampler's interface, batched draws, histogram codes, mutual information.

Every metric reads a representation of a whole data set, (N, K): row i is the code of image i, and a
*factor sampler* that knows which row belongs to which factor values. Random draws follow
disentanglement_lib call by call, so that equal seeds give equal scores; look-ups and sums are vectorised.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:  # loading scikit-learn takes seconds, so that functions do it when they need it
    from sklearn.linear_model import LogisticRegression

FACTOR_CODE_BATCH = 16  # draws per batch of factor_codes; another number is another random stream
LOOKUP_ROWS = 200_000  # rows looked up at once: bounds the memory of the vectorised metrics
MANY_DRAWS = 50_000  # from here on it pays to load the compiled sampler

Lookup = Callable[[np.ndarray], np.ndarray]
Representation = np.ndarray | Lookup


class MetricError(ValueError):
    """A representation or a factor space cannot be scored; the message says why and what to do."""


class FactorSampler(Protocol):
    """Ground truth of a data set whose observations are row indices (e.g. ``ldm.data.factors.FactorSpace``).

    May also have ``size``, the number of rows, which is checked then; ``product_sizes``, see ``draw_points``; and
    ``hold_fixed``, see the function of that name.
    """

    @property
    def num_factors(self) -> int:
        """Number of generative factors F."""

    @property
    def factors_num_values(self) -> Sequence[int]:
        """Number of values of each factor, length F."""

    def sample_factors(self, num: int, random_state: np.random.RandomState) -> np.ndarray:
        """Draw (num, F) integer factor values."""

    def sample_observations_from_factors(self, factors: np.ndarray, random_state: np.random.RandomState) -> np.ndarray:
        """Row indices (num,) of images that show the given factor values (num, F)."""


def as_lookup(representation: Representation) -> Lookup:
    """A function from row indices (n,) to codes (n, K).

    Codes keep their precision, float32 or float64, and whole numbers stay whole (int64): disentanglement_lib
    computes in the precision of the codes too, and a histogram's edges depend on it. Half precision is widened.

    Args:
        representation: (N, K) array (may be memory-mapped), or a function that already does the look-up.
    """
    if callable(representation):
        return lambda rows: _widened(np.asarray(representation(rows)))
    return lambda rows: _widened(np.asarray(representation[rows]))


def _widened(codes: np.ndarray) -> np.ndarray:
    if codes.dtype in (np.float32, np.float64):
        return codes
    return codes.astype(np.int64 if codes.dtype.kind in "iub" else np.float64)


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


def require_varying(labels: np.ndarray, what: str) -> None:
    """Refuse labels (n, F) of which a factor takes one value only.

    Args:
        labels: factor values.
        what: what the metric does with a factor, for the message ("DCI fits a classifier per factor").

    Raises:
        MetricError: names the first such factor.
    """
    constant = np.flatnonzero((labels == labels[0]).all(axis=0))
    if constant.size:
        raise MetricError(
            f"{what}, but factor {constant[0]} takes a single value in {len(labels)} samples; "
            "leave that factor out of the factor space."
        )


def hold_fixed(
    sampler: FactorSampler,
    factors: np.ndarray,
    factor: int,
    values: np.ndarray | int,
    random_state: np.random.RandomState,
) -> np.ndarray:
    """Give each of ``factors`` (n, F) the value ``values`` in one factor and leave the others as they are.

    A sampler whose data lack some combinations of values brings a ``hold_fixed(factors, factor, values,
    random_state)`` of its own, see ``ldm.metrics.table``.

    Returns:
        (n, F); ``factors`` itself is not changed.
    """
    own = getattr(sampler, "hold_fixed", None)
    if own is not None:
        return own(factors, factor, values, random_state)
    held = factors.copy()
    held[:, factor] = values
    return held


def standardised(train_codes: np.ndarray, test_codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both samples (n, K) less the training mean, over the training deviation; a unit that never varies gives zeros."""
    mean, deviation = train_codes.mean(axis=0), train_codes.std(axis=0)
    varies = (train_codes != train_codes[0]).any(axis=0)
    scale = np.where(varies, deviation, 1.0)
    return tuple(np.where(varies, (codes - mean) / scale, 0.0) for codes in (train_codes, test_codes))


def labelled_rows(
    sampler: FactorSampler, num: int, random_state: np.random.RandomState, batch_size: int = FACTOR_CODE_BATCH
) -> tuple[np.ndarray, np.ndarray]:
    """Draw rows (num,) and their labels (num, F) int64, ``batch_size`` at a time, which decides the random stream."""
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
    """Draw labelled codes, ``batch_size`` at a time (the batch size decides the random stream).

    Returns:
        codes (num, K) as ``as_lookup`` gives them and labels (num, F) int64.
    """
    rows, labels = labelled_rows(sampler, num, random_state, batch_size)
    return as_lookup(representation)(rows), labels


def fit_logistic(codes: np.ndarray, labels: np.ndarray, **options: Any) -> LogisticRegression:
    """Fit scikit-learn's logistic regression of labels (n,) from codes (n, K), with its defaults but for ``options``.

    The protocols take the classifier after its 100 iterations, converged or not, so nothing is said about that.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(**options).fit(codes, labels)


def point_blocks(num_points: int, batch_size: int) -> Iterator[int]:
    """Split ``num_points`` points of ``batch_size`` rows each into blocks of bounded memory; yields block sizes."""
    block = max(1, LOOKUP_ROWS // batch_size)
    for start in range(0, num_points, block):
        yield min(block, num_points - start)


def draw_points(
    sampler: FactorSampler, random_state: np.random.RandomState, num_points: int, num_sets: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """All draws of many points at once, for samplers that allow it, see ``ldm.metrics.draws.draw_points``.

    A sampler allows it by ``product_sizes``: the number of values of each factor, if ``sample_factors`` is
    ``randint(size, size=num)`` factor by factor and ``sample_observations_from_factors`` draws nothing.

    Returns:
        chosen factors (P,) and values (P, S, B, F); None where points have to be drawn one by one.
    """
    sizes = getattr(sampler, "product_sizes", None)
    if sizes is None or num_points * num_sets * batch_size < MANY_DRAWS:
        return None
    from ldm.metrics import draws  # loads numba

    return draws.draw_points(tuple(sizes), random_state, num_points, num_sets, batch_size)


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
    """Mutual information in nats between each unit's bin and each factor, from their contingency tables.

    Args:
        binned: (n, K) discrete codes.
        labels: (n, F) factor values.

    Returns:
        (K, F), at least 0.
    """
    columns = [_as_indices(column) for column in labels.T]
    information = np.empty((binned.shape[1], len(columns)))
    for unit, values in enumerate(binned.T):
        bins, num_bins = _as_indices(values)
        for factor, (indices, num_values) in enumerate(columns):
            table = np.bincount(bins * num_values + indices, minlength=num_bins * num_values)
            information[unit, factor] = _table_information(table.reshape(num_bins, num_values) / len(binned))
    return information


def _as_indices(column: np.ndarray) -> tuple[np.ndarray, int]:
    """Each entry's rank among the distinct values (n,), and the number of these."""
    values, indices = np.unique(column, return_inverse=True)
    return indices.reshape(-1), len(values)


def _table_information(joint: np.ndarray) -> float:
    """Mutual information in nats of a joint distribution (A, B); rounding never takes it below 0."""
    apart = np.outer(joint.sum(axis=1), joint.sum(axis=0))
    filled = joint > 0
    return max(0.0, float(np.sum(joint[filled] * np.log(joint[filled] / apart[filled]))))


def factor_entropies(labels: np.ndarray) -> np.ndarray:
    """Entropy in nats of each column of labels (n, F); shape (F,)."""
    shares = [np.unique(column, return_counts=True)[1] / len(column) for column in labels.T]
    return np.array([-np.sum(share * np.log(share)) for share in shares])
