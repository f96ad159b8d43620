"""MED (Cao et al., 2022): scores of DCI with mutual information as importance, suited to wide representations."""

from __future__ import annotations

from typing import Any

import numpy as np

from ldm.metrics import common
from ldm.metrics.common import FactorSampler, Representation
from ldm.metrics.dci import EMPTY_SHARE, scores_from_importances


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
    """Return DCI's disentanglement and completeness of the units' shares of each factor's mutual information.

    Cao et al.: An empirical study on disentanglement of negative-free contrastive learning, NeurIPS 2022. Vectors
    per unit are not reduced: every number of a latent is a unit of its own, (N, U * D). The top-k scores consider
    only the k most disentangled units of each factor. Higher is better. A second at 640 units.

    Args:
        representation, sampler, random_state: see ``ldm.metrics.common``.
        num_train: labelled codes for mutual information and fits.
        num_test: labelled codes of ``informativeness_test``.
        topk: number of units per factor for the top-k scores; 0 omits these.
        num_bins: histogram bins per unit.

    Returns:
        ``disentanglement``, ``completeness``, ``informativeness_train``, ``informativeness_test`` (accuracies of
        logistic regressions) and for k = ``topk`` ``top<k>_disentanglement`` and ``top<k>_completeness`` in [0, 1].

    Raises:
        MetricError: there are fewer than two factors or units, or a factor takes a single value.
    """
    from sklearn.preprocessing import StandardScaler

    common.require_factors(sampler, "MED")
    train_codes, train_labels, test_codes, test_labels = common.train_test_codes(
        representation, sampler, num_train, num_test, random_state
    )
    common.require_units(train_codes, "MED")
    common.require_varying(train_labels, "MED")
    shares = information_shares(common.mutual_information(common.histogram_codes(train_codes, num_bins), train_labels))
    scaler = StandardScaler().fit(train_codes)
    train_codes, test_codes = np.asarray(scaler.transform(train_codes)), np.asarray(scaler.transform(test_codes))
    accuracies = []
    for train, test in zip(train_labels.T, test_labels.T):
        classifier = common.fit_logistic(train_codes, train)
        sides = ((train_codes, train), (test_codes, test))
        accuracies.append([float(np.mean(classifier.predict(codes) == labels)) for codes, labels in sides])
    scores = _scores(shares, accuracies)
    if topk < 1:
        return scores
    best = _scores(shares[most_disentangled(shares, topk)], accuracies)
    return scores | {f"top{topk}_{name}": best[name] for name in ("disentanglement", "completeness")}


def information_shares(information: np.ndarray) -> np.ndarray:
    """Divide the information (K, F) on each factor by its sum over the units; 0 if no unit is informative."""
    total = information.sum(axis=0)
    return information / np.where(total > 0, total, 1.0)


def most_disentangled(shares: np.ndarray, topk: int) -> np.ndarray:
    """Return the ``topk`` units of least entropy among the units of each factor, from shares (K, F); ascending.

    A unit is assigned to the factor of which it has the largest share.
    """
    rows = shares + EMPTY_SHARE
    rows = rows / rows.sum(axis=1, keepdims=True)
    entropy = -np.sum(rows * np.log(rows), axis=1)
    owner = shares.argmax(axis=1)
    order = np.argsort(entropy, kind="stable")
    return np.sort(np.concatenate([order[owner[order] == factor][:topk] for factor in range(shares.shape[1])]))


def _scores(shares: np.ndarray, accuracies: list[list[float]]) -> dict[str, float]:
    if len(shares) == 1:  # a logarithm of base 1 does not exist: add a unit without information
        shares = np.concatenate([shares, np.zeros_like(shares)])
    parts: list[dict[str, Any]] = [
        {"importance": column.tolist(), "train_accuracy": train, "test_accuracy": test}
        for column, (train, test) in zip(shares.T, accuracies)
    ]
    return scores_from_importances(parts)
