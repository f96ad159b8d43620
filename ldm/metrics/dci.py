"""DCI (Eastwood & Williams, 2018): disentanglement, completeness and informativeness from tree importances.

Nearly all the time goes into one boosted classifier per factor (``ldm.metrics.boosting.classifier``). The factors are
independent, so the metric comes in two parts: ``factor_importance`` for one factor, and ``scores_from_importances``
over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm.metrics.boosting.classifier import fit_boosted_trees, sort_codes
from ldm.metrics.boosting.trees import SortedCodes
from ldm.metrics.common import FactorSampler, MetricError, Representation, factor_codes, require_factors, require_units

EMPTY_SHARE = 1e-11  # added to importances before they are normalised, as in disentanglement_lib


def dci(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_test: int = 5000,
    num_threads: int = 1,
) -> dict[str, float]:
    """All three DCI scores.

    One core takes about 15 ms, and 2 ms per unit, for each value of each factor.

    Args:
        representation: (N, K) codes of the whole data set, or a function of row indices.
        sampler: the data set's factors.
        random_state: fresh generator; the published protocol uses seed 0.
        num_train: labelled codes the classifiers are fitted on.
        num_test: labelled codes of ``informativeness_test``.
        num_threads: threads that share the classes of a factor; the scores do not depend on it.

    Returns:
        ``informativeness_train``, ``informativeness_test`` (mean accuracy over factors), ``disentanglement``
        and ``completeness``, all in [0, 1].

    Raises:
        MetricError: fewer than two factors or units, a factor that takes one value only, or codes that are not
            finite.
    """
    require_factors(sampler, "DCI")
    train, test = _draw(representation, sampler, random_state, num_train, num_test)
    codes = sort_codes(train[0])
    parts = [_fit_factor(codes, train[1], *test, factor, num_threads) for factor in range(sampler.num_factors)]
    return scores_from_importances(parts)


def dci_factor(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    factor: int,
    *,
    num_train: int = 10000,
    num_test: int = 5000,
    num_threads: int = 1,
) -> dict[str, Any]:
    """One factor's share of ``dci`` with the same draws: run one per process, then ``scores_from_importances``."""
    require_factors(sampler, "DCI")
    train, test = _draw(representation, sampler, random_state, num_train, num_test)
    return factor_importance(*train, *test, factor, num_threads)


def _draw(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    num_train: int,
    num_test: int,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    train = factor_codes(representation, sampler, num_train, random_state)
    require_units(train[0], "DCI")
    return train, factor_codes(representation, sampler, num_test, random_state)


def factor_importance(
    train_codes: np.ndarray,
    train_labels: np.ndarray,
    test_codes: np.ndarray,
    test_labels: np.ndarray,
    factor: int,
    num_threads: int = 1,
) -> dict[str, Any]:
    """Fit boosted trees (100 stages, depth 3, rate 0.1) that tell one factor from the codes.

    Args:
        train_codes: (n, K) float.
        train_labels: (n, F) int, of which column ``factor`` is learnt.
        test_codes: (m, K) float.
        test_labels: (m, F) int.
        factor: column of the labels.
        num_threads: threads that share the classes.

    Returns:
        ``importance``: list of K shares that sum to 1 (0 if no unit helps), ``train_accuracy`` and
        ``test_accuracy``; plain Python numbers, so that a part can be kept as JSON.

    Raises:
        MetricError: the factor takes a single value in the training sample, or codes are not finite.
    """
    return _fit_factor(sort_codes(train_codes), train_labels, test_codes, test_labels, factor, num_threads)


def _fit_factor(
    train_codes: SortedCodes,
    train_labels: np.ndarray,
    test_codes: np.ndarray,
    test_labels: np.ndarray,
    factor: int,
    num_threads: int,
) -> dict[str, Any]:
    labels = train_labels[:, factor]
    if np.all(labels == labels[0]):
        raise MetricError(
            f"DCI fits a classifier per factor, but factor {factor} takes a single value in {len(labels)} samples; "
            "leave that factor out of the factor space."
        )
    trees = fit_boosted_trees(train_codes, labels, num_threads)
    return {
        "importance": trees.importances.tolist(),
        "train_accuracy": float(np.mean(trees.fitted == labels)),
        "test_accuracy": float(np.mean(trees.predict(test_codes) == test_labels[:, factor])),
    }


def scores_from_importances(parts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Put the factors' parts (in factor order, from ``factor_importance``) together to the DCI scores."""
    importance = np.array([part["importance"] for part in parts]).T  # (K, F), R in the paper
    num_units, num_factors = importance.shape
    return {
        "informativeness_train": float(np.mean([part["train_accuracy"] for part in parts])),
        "informativeness_test": float(np.mean([part["test_accuracy"] for part in parts])),
        "disentanglement": _concentration(importance, base=num_factors),
        "completeness": _concentration(importance.T, base=num_units),
    }


def _concentration(rows: np.ndarray, base: int) -> float:
    """Mean over rows of 1 - H_base(row), each row weighted by its share of the total importance."""
    total = rows.sum()
    if total == 0:
        return 0.0  # no unit tells any factor
    shares = rows + EMPTY_SHARE
    shares = shares / shares.sum(axis=1, keepdims=True)
    entropy = -np.sum(shares * np.log(shares), axis=1) / np.log(base)
    return float(np.sum((1.0 - entropy) * rows.sum(axis=1) / total))
