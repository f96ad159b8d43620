"""MED (Cao et al., 2022): DCI's scores with mutual information for tree importances, made for wide representations."""

from __future__ import annotations

from typing import Any

import numpy as np

from ldm.metrics.common import (
    FactorSampler,
    Representation,
    factor_codes,
    fit_logistic,
    histogram_codes,
    mutual_information,
    require_factors,
    require_units,
    require_varying,
)
from ldm.metrics.dci import scores_from_importances

EMPTY_SHARE = 1e-11  # added to shares before their entropy is taken, as in disentanglement_lib


def med(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_test: int = 10000,
    topk: int = 2,
    num_bins: int = 20,
) -> dict[str, float]:
    """DCI's disentanglement and completeness of each unit's share of a factor's mutual information.

    Cao et al.: An empirical study on disentanglement of negative-free contrastive learning, NeurIPS 2022. Vectors
    per unit are not reduced: every number of a latent is a unit of its own, (N, U * D). The top-k scores look only
    at the k most disentangled units of each factor. Higher is better. A second at 640 units.

    Args:
        representation: (N, K) codes of the whole data set, or a function of row indices.
        sampler: the data set's factors.
        random_state: fresh generator; the published protocol uses seed 0.
        num_train: labelled codes of the informations and of the fits.
        num_test: labelled codes of ``informativeness_test``.
        topk: units kept per factor for the top-k scores; 0 leaves these out.
        num_bins: histogram bins each unit is cut into.

    Returns:
        ``disentanglement``, ``completeness``, ``informativeness_train``, ``informativeness_test`` (accuracies of
        logistic regressions) and, for k = ``topk``, ``top<k>_disentanglement`` and ``top<k>_completeness``, all in
        [0, 1].

    Raises:
        MetricError: fewer than two factors or units, or a factor that takes one value only.
    """
    from sklearn.preprocessing import StandardScaler

    require_factors(sampler, "MED")
    train_codes, train_labels = factor_codes(representation, sampler, num_train, random_state)
    test_codes, test_labels = factor_codes(representation, sampler, num_test, random_state)
    require_units(train_codes, "MED")
    require_varying(train_labels, "MED fits a classifier per factor")
    shares = information_shares(mutual_information(histogram_codes(train_codes, num_bins), train_labels))
    scaler = StandardScaler().fit(train_codes)
    train_codes, test_codes = scaler.transform(train_codes), scaler.transform(test_codes)
    accuracies = [
        _accuracies(train_codes, train_labels[:, factor], test_codes, test_labels[:, factor])
        for factor in range(sampler.num_factors)
    ]
    scores = _scores(shares, accuracies)
    if topk < 1:
        return scores
    best = _scores(shares[most_disentangled(shares, topk)], accuracies)
    return scores | {f"top{topk}_{name}": best[name] for name in ("disentanglement", "completeness")}


def information_shares(information: np.ndarray) -> np.ndarray:
    """Divide each factor's informations (K, F) by their sum over the units; 0 where no unit knows of the factor."""
    total = information.sum(axis=0)
    return information / np.where(total > 0, total, 1.0)


def most_disentangled(shares: np.ndarray, topk: int) -> np.ndarray:
    """The ``topk`` units of least entropy among those that belong to each factor, from shares (K, F); rising.

    A unit belongs to the factor of which it has the largest share.
    """
    rows = shares + EMPTY_SHARE
    rows = rows / rows.sum(axis=1, keepdims=True)
    entropy = -np.sum(rows * np.log(rows), axis=1)
    owner = shares.argmax(axis=1)
    order = np.argsort(entropy, kind="stable")
    return np.sort(np.concatenate([order[owner[order] == factor][:topk] for factor in range(shares.shape[1])]))


def _scores(shares: np.ndarray, accuracies: list[tuple[float, float]]) -> dict[str, float]:
    parts: list[dict[str, Any]] = [
        {"importance": column.tolist(), "train_accuracy": train, "test_accuracy": test}
        for column, (train, test) in zip(shares.T, accuracies)
    ]
    if len(shares) == 1:  # base 1 has no logarithms; a factor told by the only unit is told by one unit
        parts = [{**part, "importance": part["importance"] + [0.0]} for part in parts]
    return scores_from_importances(parts)


def _accuracies(
    train_codes: np.ndarray, train_labels: np.ndarray, test_codes: np.ndarray, test_labels: np.ndarray
) -> tuple[float, float]:
    """Accuracies of a logistic regression of one factor on both samples."""
    classifier = fit_logistic(train_codes, train_labels)
    return (
        float(np.mean(classifier.predict(train_codes) == train_labels)),
        float(np.mean(classifier.predict(test_codes) == test_labels)),
    )
