"""Gradient-boosted classification trees: what scikit-learn's ``GradientBoostingClassifier()`` fits, many times faster.

Friedman, "Greedy Function Approximation" (2001), Algorithm 6 for log loss with scikit-learn's defaults: 100 stages,
learning rate 0.1, one tree of depth 3 per class and stage (one tree for two classes), all samples, all thresholds.
Importances, and predictions with them, equal scikit-learn's to rounding unless two splits of a node are equally
good; then scikit-learn's choice depends on its seed and on rounding, ours on a fixed rule that favours no unit
(``trees._consider``).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm.metrics.boosting import trees
from ldm.metrics.boosting.codes import checked_codes, sort_codes, workspace
from ldm.metrics.boosting.trees import LEAVES, SortedCodes, Workspace
from ldm.metrics.common import MetricError

__all__ = ["BoostedTrees", "fit_boosted_trees", "sort_codes"]

NUM_STAGES = 100
LEARNING_RATE = 0.1


@dataclass(frozen=True)
class BoostedTrees:
    """A fitted classifier of C classes from K units; R = C rows of trees, or one row for two classes.

    Attributes:
        importances: (K,) shares of the fall of the squared error, summing to 1; zeros if no tree has a split.
        classes: (C,) labels, rising.
        fitted: (n,) predicted labels of the samples that were fitted.
        prior: (R,) raw predictions before the first stage.
        feature: (stages, R, 8) unit that splits each node, -1 for leaves.
        threshold: (stages, R, 8).
        value: (stages, R, 16) steps of the leaves.
    """

    importances: np.ndarray
    classes: np.ndarray
    fitted: np.ndarray
    prior: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    value: np.ndarray

    def predict(self, codes: np.ndarray) -> np.ndarray:
        """Labels (m,) of codes (m, K).

        Raises:
            MetricError: codes that are not finite, or of another number of units than were fitted.
        """
        columns = checked_codes(codes)
        if columns.shape[1] != len(self.importances):
            raise MetricError(f"these trees tell {len(self.importances)} units; found codes {columns.shape}.")
        raw = np.repeat(self.prior[:, None], len(columns), axis=1)
        trees.add_trees(columns, LEARNING_RATE, self.feature, self.threshold, self.value, raw)
        return self.classes[_winners(raw)]


def fit_boosted_trees(codes: SortedCodes, labels: np.ndarray, num_threads: int = 1) -> BoostedTrees:
    """Fit the classifier.

    Args:
        codes: n samples, from ``sort_codes``.
        labels: (n,) of at least two distinct values.
        num_threads: threads that share the trees of a stage; the result does not depend on it.

    Raises:
        MetricError: labels of another length, or of one value only.
    """
    num_units, num = codes.codes.shape
    if labels.shape != (num,):
        raise MetricError(f"boosted trees: {num} codes but labels of shape {labels.shape}.")
    classes, encoded = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise MetricError(f"boosted trees tell classes apart, but all {num} labels are {classes[0]}.")
    is_class = (encoded == np.arange(len(classes))[:, None]).astype(np.float64)  # (C, n)
    prior = _prior_predictions(is_class.mean(axis=1))
    targets = is_class if len(classes) > 2 else is_class[1:]  # (R, n)
    rows = len(targets)
    raw = np.repeat(prior[:, None], num, axis=1)
    feature = np.full((NUM_STAGES, rows, LEAVES), -1)
    threshold = np.zeros((NUM_STAGES, rows, LEAVES))
    value = np.zeros((NUM_STAGES, rows, 2 * LEAVES))
    importance = np.zeros((rows, num_units))
    residuals = np.empty_like(raw)
    scale = 1.0 if rows == 1 else (rows - 1) / rows
    with _Workers(codes, rows, num_threads) as workers:
        for stage in range(NUM_STAGES):
            _residuals(targets, raw, residuals)
            outputs = feature[stage], threshold[stage], value[stage], importance
            workers.grow(residuals, raw, LEARNING_RATE, scale, stage, *outputs)
    total = importance.sum()
    shares = importance.sum(axis=0) / total if total > 0 else np.zeros(num_units)
    return BoostedTrees(shares, classes, classes[_winners(raw)], prior, feature, threshold, value)


class _Workers:
    """Threads that share the rows of trees of each stage; with a single one, the caller's own."""

    def __init__(self, codes: SortedCodes, rows: int, num_threads: int) -> None:
        num = min(rows, max(1, num_threads))
        self.codes = codes
        self.shares = [np.arange(first, rows, num) for first in range(num)]
        self.spaces = [workspace(codes) for _ in range(num)]
        self.pool = ThreadPoolExecutor(num) if num > 1 else None

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()

    def grow(self, *stage: Any) -> None:
        """Grow all trees of a stage; takes the arguments of ``trees.grow_trees`` from ``residuals`` on."""

        def grow_share(share: np.ndarray, space: Workspace) -> None:
            trees.grow_trees(share, self.codes, space, *stage)

        list((self.pool.map if self.pool else map)(grow_share, self.shares, self.spaces))


def _prior_predictions(shares: np.ndarray) -> np.ndarray:
    """Raw predictions (R,) that give every sample the classes' shares (C,)."""
    tiny = np.finfo(np.float64).eps
    logs = np.log(np.clip(shares, tiny, 1 - tiny))
    return logs[1:] - logs[:1] if len(shares) == 2 else logs - logs.mean()


def _residuals(targets: np.ndarray, raw: np.ndarray, out: np.ndarray) -> None:
    """Targets less the softmax over the rows of raw predictions (R, n), or the logistic function of a single row."""
    if len(raw) == 1:
        with np.errstate(over="ignore"):  # exp(-raw) may be infinite: probability 0
            np.subtract(targets, 1.0 / (1.0 + np.exp(-raw)), out=out)
        return
    np.subtract(raw, raw.max(axis=0), out=out)
    np.exp(out, out=out)
    np.divide(out, out.sum(axis=0), out=out)
    np.subtract(targets, out, out=out)


def _winners(raw: np.ndarray) -> np.ndarray:
    """Class numbers (n,) of raw predictions (R, n)."""
    return raw.argmax(axis=0) if len(raw) > 1 else (raw[0] >= 0).astype(np.int64)
