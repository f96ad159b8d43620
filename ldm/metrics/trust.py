"""Replicates and variants of a representation, which show how far its scores can be trusted.

A *replicate* computes a metric again with another seed and, if the rows of a factor table are a sample of images, on a
bootstrap sample of them (Efron, 1979; ``FactorTable.bootstrap``). A *variant* is another representation of the same
images: a baseline with as many units (random codes, PCA), or the same units in another order, scale or number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ldm.metrics.common import FactorSampler, Representation, as_lookup
from ldm.metrics.representation import BLOCK_VALUES, standardize
from ldm.metrics.sampling.table import FactorTable

REPLICATE = "replicate"
PCA, RANDOM, REMOVED = "pca", "random", "removed"  # variants that need special treatment
SHARE = 0.95  # confidence of intervals
MOST_VALUES = 32_000_000  # numbers (256 MB) from which means, deviations and axes are estimated: evenly spaced rows
NEGLIGIBLE = 1e-10  # share of the largest variance below which a principal component is rounding noise


class Variant(NamedTuple):
    """Another representation of the same images.

    Attributes:
        heading: heading in tables.
        kind: what is changed; variants of one kind share a colour.
        change: ``(codes (N, K), seed) -> representation``.
    """

    heading: str
    kind: str
    change: Callable[[np.ndarray, int], Representation]


def random_codes(codes: np.ndarray, seed: int) -> np.ndarray:
    """Return independent standard normal codes of the shape of ``codes``, float32: what a metric gives by chance."""
    return np.random.default_rng(seed).standard_normal(codes.shape, dtype=np.float32)


def without_one_unit(codes: np.ndarray, seed: int) -> np.ndarray:
    """Return codes (n, K) without one unit, which the seed determines."""
    return np.delete(codes, np.random.RandomState(seed).randint(codes.shape[1]), axis=1)


def _by_rows(change: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[np.ndarray, int], Representation]:
    """Return a change of whole representations that is made for the rows which a metric looks up."""

    def change_all(codes: np.ndarray, seed: int) -> Representation:
        lookup = as_lookup(codes)
        return lambda rows: np.ascontiguousarray(change(lookup(rows), seed))

    return change_all


def principal_components(latents: np.ndarray, num_units: int) -> np.ndarray:
    """Return the first principal components of latents (N, K) or (N, U, D), all their numbers taken together.

    They contain what is linearly most of the latents, but not the units that were learned.

    Args:
        latents: may be memory-mapped; large ones are read in blocks, and the axes are those of evenly spaced rows.
        num_units: number of components.

    Returns:
        (N, num_units) float64, fewer units if N is smaller; components without variance are 0.
    """
    from sklearn.decomposition import PCA as PrincipalComponents  # takes seconds to import

    rows = latents.reshape(len(latents), -1)
    sample = _evenly_spaced(rows)
    pca = PrincipalComponents(min(num_units, *sample.shape), random_state=0).fit(sample)
    varies = pca.explained_variance_ > NEGLIGIBLE * pca.explained_variance_[0]
    codes = np.zeros((len(rows), len(varies)))
    step = max(1, BLOCK_VALUES // rows.shape[1])
    for start in range(0, len(rows), step):
        block = pca.transform(rows[start : start + step].astype(np.float64))
        codes[start : start + step, varies] = block[:, varies]
    return codes


def _evenly_spaced(codes: np.ndarray) -> np.ndarray:
    """Return float64 copies of evenly spaced rows of codes (N, K), at most ``MOST_VALUES`` numbers."""
    return codes[:: -(-codes.size // MOST_VALUES)].astype(np.float64)


VARIANTS: dict[str, Variant] = {
    RANDOM: Variant("random codes", "random codes", random_codes),
    PCA: Variant("PCA of the latents", "PCA of the latents", lambda codes, seed: codes),  # of principal_components
    "order": Variant("units reversed", "order", _by_rows(lambda codes, seed: codes[:, ::-1])),
    "scale=0.1": Variant("codes x 0.1", "scale", _by_rows(lambda codes, seed: codes * 0.1)),
    "scale=10": Variant("codes x 10", "scale", _by_rows(lambda codes, seed: codes * 10.0)),
    "standardized": Variant("standardized", "scale", lambda codes, seed: standardize(codes)),
    REMOVED: Variant("one unit removed", "number of units", _by_rows(without_one_unit)),
    "doubled": Variant("every unit twice", "number of units", _by_rows(lambda codes, seed: np.tile(codes, 2))),
}


def varied(variant: str, codes: np.ndarray, sampler: FactorSampler, seed: int) -> tuple[Representation, FactorSampler]:
    """Return representation and sampler of a replicate or variant.

    A replicate has a bootstrap sample of a table's rows. Factor spaces, and tables with one row for every combination
    of values, contain all images that exist, so that only the draws of the metric vary.

    Args:
        variant: ``REPLICATE``, a key of ``VARIANTS``, or "" for none.
        codes: (N, K); for ``PCA`` the components.
        sampler: factors of the rows.
        seed: seed of the change.
    """
    if variant == REPLICATE:
        is_table = isinstance(sampler, FactorTable)
        return codes, sampler.bootstrap(np.random.RandomState([seed, 1])) if is_table else sampler
    return VARIANTS[variant].change(codes, seed) if variant else codes, sampler


def interval(figure: float, replicates: Sequence[float]) -> tuple[float, float]:
    """Return the standard bootstrap interval, figure ± t s, which contains the expected figure in 95 % of all cases.

    Efron, Tibshirani: An introduction to the bootstrap, 1993, chapter 12: s is the standard deviation of the
    replicates, t the quantile of Student's distribution for their number. Unlike quantiles of the replicates, it does
    not need hundreds of them, and does not depend on their mean: a bootstrap sample has fewer different rows than the
    table (63 %), which shifts metrics that depend on the number of rows.

    Args:
        figure: the score, or the difference of two scores.
        replicates: at least two replicates of it.

    Example:
        >>> interval(0.5, [0.5, 0.52, 0.48, 0.5])
        (0.448030869455, 0.551969130545)
    """
    reach = student(len(replicates) - 1) * np.std(replicates, ddof=1)
    return round(float(figure - reach), 12), round(float(figure + reach), 12)


def difference_of_means(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two means over runs with different variances (Welch, 1947)."""
    difference = float(np.mean(first) - np.mean(second))
    shares = [np.var(values, ddof=1) / len(values) for values in (first, second)]
    freedom = sum(share**2 / (len(values) - 1) for share, values in zip(shares, (first, second)))
    reach = student(float(sum(shares) ** 2 / freedom)) * np.sqrt(sum(shares)) if freedom > 0 else 0.0
    return float(difference - reach), float(difference + reach)


def student(freedom: float) -> float:
    """Return the quantile of Student's distribution that a share of 95 % lies within."""
    from scipy.stats import t  # takes a second to import

    return float(t.ppf((1 + SHARE) / 2, freedom))
