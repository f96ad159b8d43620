"""Unsupervised scores (Locatello et al., 2019): how strongly do the units depend on one another?"""

from __future__ import annotations

import numpy as np

from ldm.metrics.common import (
    FactorSampler,
    MetricError,
    Representation,
    factor_codes,
    histogram_codes,
    mutual_information,
    require_units,
)


def unsupervised(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_bins: int = 20,
) -> dict[str, float]:
    """Total correlation and Wasserstein correlation of a Gaussian fit, and the units' mean mutual information.

    Locatello et al.: Challenging common assumptions in the unsupervised learning of disentangled representations,
    ICML 2019, section 5.1 and appendix. Labels are not used. Lower means less dependent; independent units need not
    be disentangled ones. Milliseconds, growing with K squared.

    Args:
        representation: (N, K) codes of the whole data set, or a function of row indices.
        sampler: the data set's factors; they only decide which rows are drawn.
        random_state: fresh generator; the published protocol uses seed 0.
        num_train: codes drawn.
        num_bins: histogram bins each unit is cut into.

    Returns:
        ``gaussian_total_correlation`` in nats, at least 0 and infinite where a unit is a sum of others;
        ``gaussian_wasserstein_correlation``, at least 0, on the scale of the codes' variance;
        ``gaussian_wasserstein_correlation_norm``, the same divided by the total variance;
        ``mutual_info_score`` in nats, mean over pairs of units, at least 0.

    Raises:
        MetricError: a single unit, or a unit that never varies.
    """
    codes, _ = factor_codes(representation, sampler, num_train, random_state)
    num_units = require_units(codes, "the unsupervised scores")
    constant = np.flatnonzero(np.all(codes == codes[0], axis=0))
    if constant.size:
        raise MetricError(
            f"the unsupervised scores need units that vary, but unit {constant[0]} ({constant.size} of {num_units}) "
            f"has one value in {len(codes)} codes, and its correlation with others is not defined; leave it out."
        )
    covariance = np.cov(codes.T)
    distance = gaussian_wasserstein_correlation(covariance)
    binned = histogram_codes(codes, num_bins)
    information = mutual_information(binned, binned)
    np.fill_diagonal(information, 0.0)
    return {
        "gaussian_total_correlation": gaussian_total_correlation(covariance),
        "gaussian_wasserstein_correlation": distance,
        "gaussian_wasserstein_correlation_norm": distance / float(np.trace(covariance)),
        "mutual_info_score": float(information.sum() / (num_units**2 - num_units)),
    }


def gaussian_total_correlation(covariance: np.ndarray) -> float:
    """Kullback-Leibler divergence in nats of a Gaussian (K, K) from the product of its marginals."""
    return float(0.5 * (np.log(np.diag(covariance)).sum() - np.linalg.slogdet(covariance)[1]))


def gaussian_wasserstein_correlation(covariance: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of a Gaussian (K, K) from the product of its marginals.

    2 tr S - 2 tr (D S)^(1/2) with D the diagonal of S. D S has the eigenvalues of D^(1/2) S D^(1/2), which is
    symmetric, so that its root needs no complex numbers.
    """
    root = np.sqrt(np.diag(covariance))
    eigenvalues = np.linalg.eigvalsh(covariance * np.outer(root, root))
    return float(2 * np.trace(covariance) - 2 * np.sqrt(np.clip(eigenvalues, 0.0, None)).sum())
