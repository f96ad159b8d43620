"""Modularity and explicitness (Ridgeway & Mozer, 2018): one factor per unit, and every factor told by a line."""

from __future__ import annotations

import numpy as np

from ldm.metrics.common import (
    FactorSampler,
    MetricError,
    Representation,
    factor_codes,
    fit_logistic,
    histogram_codes,
    mutual_information,
    require_factors,
    require_varying,
    standardised,
)


def modularity_explicitness(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_test: int = 5000,
    num_bins: int = 20,
) -> dict[str, float]:
    """Whether each unit tells one factor alone, and whether all units together tell each factor linearly.

    Ridgeway, Mozer: Learning deep disentangled embeddings with the F-statistic loss, NeurIPS 2018, section 3.
    Modularity is the mean over units of 1 - (sum of squared informations but the largest) / (the largest * (F - 1)),
    0 for a unit without information. Explicitness is the mean over factors of the area under the ROC curve of a
    logistic regression, mean over its classes. Higher is better. Under a second at 20 units.

    Args:
        representation: (N, K) codes of the whole data set, or a function of row indices.
        sampler: the data set's factors.
        random_state: fresh generator; the published protocol uses seed 0.
        num_train: labelled codes of the informations and of the fits.
        num_test: labelled codes of ``explicitness_score_test``.
        num_bins: histogram bins each unit is cut into.

    Returns:
        ``modularity_score`` in [0, 1]; ``explicitness_score_train`` and ``explicitness_score_test`` in [0, 1], of
        which 0.5 is chance.

    Raises:
        MetricError: fewer than two factors, a factor that takes one value only, or a value of a factor that one of
            the two samples lacks.
    """
    require_factors(sampler, "modularity")
    train_codes, train_labels = factor_codes(representation, sampler, num_train, random_state)
    test_codes, test_labels = factor_codes(representation, sampler, num_test, random_state)
    require_varying(train_labels, "explicitness fits a classifier per factor")
    _require_same_values(train_labels, test_labels)
    information = mutual_information(histogram_codes(train_codes, num_bins), train_labels)
    train_codes, test_codes = standardised(train_codes, test_codes)
    areas = [
        _areas(train_codes, train_labels[:, factor], test_codes, test_labels[:, factor])
        for factor in range(sampler.num_factors)
    ]
    train_area, test_area = np.mean(areas, axis=0)
    return {
        "modularity_score": modularity(information),
        "explicitness_score_train": float(train_area),
        "explicitness_score_test": float(test_area),
    }


def modularity(information: np.ndarray) -> float:
    """Modularity from the informations (K, F) between units and factors, F at least 2."""
    squared = np.square(information)
    largest = squared.max(axis=1)
    rest = squared.sum(axis=1) - largest
    informed = largest > 0
    scale = np.where(informed, largest, 1.0) * (squared.shape[1] - 1)
    return float(np.mean(np.where(informed, 1.0 - rest / scale, 0.0)))


def _areas(
    train_codes: np.ndarray, train_labels: np.ndarray, test_codes: np.ndarray, test_labels: np.ndarray
) -> tuple[float, float]:
    """Areas under the ROC curve of a factor's classifier on both samples, mean over the factor's values."""
    from sklearn.metrics import roc_auc_score

    classifier = fit_logistic(train_codes, train_labels)

    def area(codes: np.ndarray, labels: np.ndarray) -> float:
        return float(roc_auc_score(labels[:, None] == classifier.classes_, classifier.predict_proba(codes)))

    return area(train_codes, train_labels), area(test_codes, test_labels)


def _require_same_values(train_labels: np.ndarray, test_labels: np.ndarray) -> None:
    """Refuse a factor of which one sample shows a value that the other does not: its ROC curve is not defined."""
    for factor, (train, test) in enumerate(zip(train_labels.T, test_labels.T)):
        alone = np.setxor1d(train, test)
        if alone.size:
            lacking, num = ("test", len(test)) if alone[0] in train else ("training", len(train))
            raise MetricError(
                f"explicitness needs every value of a factor in both samples, but value {alone[0]} of factor {factor} "
                f"is in none of the {num} {lacking} codes; draw more (num_train, num_test) or leave rare values out."
            )
