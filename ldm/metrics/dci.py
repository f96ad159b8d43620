"""DCI (Eastwood & Williams, 2018): disentanglement, completeness and informativeness from tree importances.

The factors are independent: ``dci_factor`` computes the part of one, and ``scores_from_importances`` joins the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.metrics import common
from ldm.metrics.common import FactorSampler, Representation

if TYPE_CHECKING:  # numba is imported by the functions that need it
    from ldm.metrics.boosting.trees import SortedCodes

EMPTY_SHARE = 1e-11  # added to importances before they are normalized, as in disentanglement_lib


def dci(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_test: int = 5000,
    num_threads: int | None = None,
) -> dict[str, float]:
    """Return all three DCI scores.

    One core takes about 15 ms, and 2 ms per unit, for each value of each factor.

    Args:
        representation, sampler, random_state: see ``ldm.metrics.common``.
        num_train: labelled codes that the classifiers are fitted on.
        num_test: labelled codes of ``informativeness_test``.
        num_threads: threads that share the classes of a factor (all cores, or OMP_NUM_THREADS); the scores do not
            depend on it.

    Returns:
        ``informativeness_train``, ``informativeness_test`` (mean accuracy over factors), ``disentanglement``
        and ``completeness``, all in [0, 1].

    Raises:
        MetricError: there are fewer than two factors or units, a factor takes a single value, or codes are not finite.
    """
    samples = _draw(representation, sampler, num_train, num_test, random_state)
    parts = [factor_importance(*samples, factor, num_threads) for factor in range(sampler.num_factors)]
    return scores_from_importances(parts)


def dci_factor(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    factor: int,
    *,
    num_train: int = 10000,
    num_test: int = 5000,
    num_threads: int | None = None,
) -> dict[str, Any]:
    """Return the part of one factor in ``dci``, with the same draws, for ``scores_from_importances``."""
    samples = _draw(representation, sampler, num_train, num_test, random_state)
    return factor_importance(*samples, factor, num_threads)


def _draw(
    representation: Representation, sampler: FactorSampler, num_train: int, num_test: int, rs: np.random.RandomState
) -> tuple[SortedCodes, np.ndarray, np.ndarray, np.ndarray]:
    from ldm.metrics.boosting.classifier import sort_codes

    common.require_factors(sampler, "DCI")
    codes, labels, test_codes, test_labels = common.train_test_codes(representation, sampler, num_train, num_test, rs)
    common.require_units(codes, "DCI")
    common.require_varying(labels, "DCI")
    return sort_codes(codes), labels, test_codes, test_labels


def factor_importance(
    train_codes: SortedCodes,
    train_labels: np.ndarray,
    test_codes: np.ndarray,
    test_labels: np.ndarray,
    factor: int,
    num_threads: int | None = None,
) -> dict[str, Any]:
    """Fit boosted trees (100 stages, depth 3, rate 0.1) that predict one factor from the codes.

    Args:
        train_codes: n codes, from ``sort_codes``.
        train_labels: (n, F) int labels; column ``factor`` is predicted.
        test_codes: (m, K) float.
        test_labels: (m, F) int.
        factor: column of the labels.
        num_threads: threads that share the classes (all cores, or OMP_NUM_THREADS).

    Returns:
        ``importance``: list of K shares that sum to 1 (0 if no unit is informative), ``train_accuracy`` and
        ``test_accuracy``; plain Python numbers, ready for JSON.
    """
    from ldm.metrics.boosting.classifier import fit_boosted_trees

    labels = train_labels[:, factor]
    trees = fit_boosted_trees(train_codes, labels, num_threads)
    return {
        "importance": trees.importances.tolist(),
        "train_accuracy": float(np.mean(trees.fitted == labels)),
        "test_accuracy": float(np.mean(trees.predict(test_codes) == test_labels[:, factor])),
    }


def scores_from_importances(parts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the DCI scores from the parts of all factors, in factor order (``factor_importance``).

    Example:
        >>> perfect = [{"importance": [1, 0], "train_accuracy": 1}, {"importance": [0, 1], "train_accuracy": 1}]
        >>> scores = scores_from_importances([part | {"test_accuracy": 1} for part in perfect])
        >>> round(scores["disentanglement"], 6), round(scores["completeness"], 6)
        (1.0, 1.0)
    """
    importance = np.array([part["importance"] for part in parts]).T  # (K, F), R in the paper
    num_units, num_factors = importance.shape
    return {
        "informativeness_train": float(np.mean([part["train_accuracy"] for part in parts])),
        "informativeness_test": float(np.mean([part["test_accuracy"] for part in parts])),
        "disentanglement": _concentration(importance, base=num_factors),
        "completeness": _concentration(importance.T, base=num_units),
    }


def _concentration(rows: np.ndarray, base: int) -> float:
    """Return the mean over rows of 1 - H_base(row), weighted by the share of each row in the total importance."""
    total = rows.sum()
    if total == 0:
        return 0.0  # no unit is informative
    shares = rows + EMPTY_SHARE
    shares = shares / shares.sum(axis=1, keepdims=True)
    entropy = -np.sum(shares * np.log(shares), axis=1) / np.log(base)
    return float(np.sum((1.0 - entropy) * rows.sum(axis=1) / total))
