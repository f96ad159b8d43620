"""Unsupervised scores (Locatello et al., 2019): statistical dependence between the units."""

from __future__ import annotations

import numpy as np

from ldm.metrics import common
from ldm.metrics.common import FactorSampler, MetricError, Representation


def unsupervised(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_bins: int = 20,
) -> dict[str, float]:
    """Return total correlation and Wasserstein correlation of a Gaussian fit, and mean mutual information of units.

    Locatello et al.: Challenging common assumptions in the unsupervised learning of disentangled representations,
    ICML 2019, section 5.1 and appendix. Lower is less dependent; independent units are not
    necessarily disentangled. Milliseconds, growing with K squared.

    Args:
        representation, sampler, random_state: see ``ldm.metrics.common``; labels are not used.
        num_train: codes drawn.
        num_bins: histogram bins per unit.

    Returns:
        ``gaussian_total_correlation`` in nats, at least 0, infinite if a unit is a sum of others;
        ``gaussian_wasserstein_correlation``, at least 0, on the scale of the codes' variance;
        ``gaussian_wasserstein_correlation_norm``, the same divided by the total variance;
        ``mutual_info_score`` in nats, mean over pairs of units, at least 0.

    Raises:
        MetricError: there is a single unit, or a unit does not vary.
    """
    codes, _ = common.factor_codes(representation, sampler, num_train, random_state)
    num_units = common.require_units(codes, "the unsupervised scores")
    constant = np.flatnonzero(np.all(codes == codes[0], axis=0))
    if constant.size:
        raise MetricError(
            f"the unsupervised scores: expected units that vary, but unit {constant[0]} ({constant.size} of "
            f"{num_units}) has one value in {len(codes)} codes, and its correlation is not defined. Leave it out."
        )
    covariance = np.cov(codes.T)
    distance = gaussian_wasserstein_correlation(covariance)
    binned = common.histogram_codes(codes, num_bins)
    information = common.mutual_information(binned, binned)
    np.fill_diagonal(information, 0.0)
    return {
        "gaussian_total_correlation": gaussian_total_correlation(covariance),
        "gaussian_wasserstein_correlation": distance,
        "gaussian_wasserstein_correlation_norm": distance / float(np.trace(covariance)),
        "mutual_info_score": float(information.sum() / (num_units**2 - num_units)),
    }


def gaussian_total_correlation(covariance: np.ndarray) -> float:
    """Return the Kullback-Leibler divergence in nats of a Gaussian (K, K) from the product of its marginals.

    Example:
        >>> round(gaussian_total_correlation(np.array([[1.0, 0.6], [0.6, 1.0]])), 3)
        0.223
    """
    return float(0.5 * (np.log(np.diag(covariance)).sum() - np.linalg.slogdet(covariance)[1]))


def gaussian_wasserstein_correlation(covariance: np.ndarray) -> float:
    """Return the squared 2-Wasserstein distance of a Gaussian (K, K) from the product of its marginals.

    It is 2 tr S - 2 tr (D S)^(1/2) with D the diagonal of S. D S has the eigenvalues of the symmetric
    D^(1/2) S D^(1/2), whose root needs no complex numbers.
    """
    root = np.sqrt(np.diag(covariance))
    eigenvalues = np.linalg.eigvalsh(covariance * np.outer(root, root))
    return float(2 * np.trace(covariance) - 2 * np.sqrt(np.clip(eigenvalues, 0.0, None)).sum())
