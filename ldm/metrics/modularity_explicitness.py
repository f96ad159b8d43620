"""Modularity and explicitness (Ridgeway & Mozer, 2018): one factor per unit, and linear readout of every factor."""

from __future__ import annotations

import numpy as np

from ldm.metrics import common
from ldm.metrics.common import FactorSampler, MetricError, Representation


def modularity_explicitness(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_test: int = 5000,
    num_bins: int = 20,
) -> dict[str, float]:
    """Return whether each unit depends on one factor only, and whether all units together give each factor linearly.

    Ridgeway, Mozer: Learning deep disentangled embeddings with the F-statistic loss, NeurIPS 2018, section 3.
    Modularity is the mean over units of 1 - (sum of squared informations but the largest) / (the largest * (F - 1)),
    0 for a unit without information. Explicitness is the mean over factors of the area under the ROC curve of a
    logistic regression, mean over its classes. Higher is better. Under a second at 20 units.

    Args:
        representation, sampler, random_state: see ``ldm.metrics.common``.
        num_train: labelled codes for mutual information and fits.
        num_test: labelled codes of ``explicitness_score_test``.
        num_bins: histogram bins per unit.

    Returns:
        ``modularity_score`` in [0, 1]; ``explicitness_score_train`` and ``explicitness_score_test`` in [0, 1], where
        0.5 is chance.

    Raises:
        MetricError: there are fewer than two factors, a factor takes a single value, or one of the two samples lacks a
            value of a factor.
    """
    common.require_factors(sampler, "modularity")
    train_codes, train_labels, test_codes, test_labels = common.train_test_codes(
        representation, sampler, num_train, num_test, random_state
    )
    common.require_varying(train_labels, "explicitness")
    _require_same_values(train_labels, test_labels)
    information = common.mutual_information(common.histogram_codes(train_codes, num_bins), train_labels)
    train_codes, test_codes = common.standardized(train_codes, test_codes)
    areas = [_areas(train_codes, train, test_codes, test) for train, test in zip(train_labels.T, test_labels.T)]
    train_area, test_area = np.mean(areas, axis=0)
    return {
        "modularity_score": modularity(information),
        "explicitness_score_train": float(train_area),
        "explicitness_score_test": float(test_area),
    }


def modularity(information: np.ndarray) -> float:
    """Return the modularity of the information (K, F) between units and factors, F at least 2.

    Example:
        >>> modularity(np.array([[1.0, 0.0], [1.0, 1.0]]))
        0.5
    """
    squared = np.square(information)
    largest = squared.max(axis=1)
    rest = squared.sum(axis=1) - largest
    informed = largest > 0
    scale = np.where(informed, largest, 1.0) * (squared.shape[1] - 1)
    return float(np.mean(np.where(informed, 1.0 - rest / scale, 0.0)))


def _areas(
    train_codes: np.ndarray, train_labels: np.ndarray, test_codes: np.ndarray, test_labels: np.ndarray
) -> tuple[float, float]:
    """Return the areas under the ROC curve of the classifier of a factor on both samples, mean over its values."""
    from sklearn.metrics import roc_auc_score

    classifier = common.fit_logistic(train_codes, train_labels)

    def area(codes: np.ndarray, labels: np.ndarray) -> float:
        return float(roc_auc_score(labels[:, None] == classifier.classes_, classifier.predict_proba(codes)))

    return area(train_codes, train_labels), area(test_codes, test_labels)


def _require_same_values(train_labels: np.ndarray, test_labels: np.ndarray) -> None:
    """Raise a ``MetricError`` if a value of a factor is in one sample only, where its ROC curve is not defined."""
    for factor, (train, test) in enumerate(zip(train_labels.T, test_labels.T)):
        missing = np.setxor1d(train, test)
        if missing.size:
            sample, num = ("test", len(test)) if missing[0] in train else ("training", len(train))
            raise MetricError(
                f"explicitness: expected every value of a factor in both samples, but value {missing[0]} of factor "
                f"{factor} is in none of the {num} {sample} codes. Draw more (num_train, num_test), or leave rare "
                "values out."
            )
