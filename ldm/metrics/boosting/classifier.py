"""Gradient-boosted classification trees, equal to scikit-learn's ``GradientBoostingClassifier()`` and much faster.

Friedman, "Greedy Function Approximation" (2001), Algorithm 6 for log loss with scikit-learn's defaults: 100 stages,
learning rate 0.1, one tree of depth 3 per class and stage (one tree for two classes), all samples, all thresholds.
Importances and predictions equal scikit-learn's up to rounding, unless two splits of a node are equally good: then
scikit-learn's choice depends on its seed and on rounding, ours on a fixed rule that prefers no unit
(``trees._consider``).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
    """Fitted classifier of C classes from K units; R = C rows of trees, or one row for two classes."""

    importances: np.ndarray  # (K,) shares in the decrease of the squared error, which sum to 1; 0 without any split
    classes: np.ndarray  # (C,) labels, ascending
    fitted: np.ndarray  # (n,) predicted labels of the training samples
    prior: np.ndarray  # (R,) raw predictions before the first stage
    feature: np.ndarray  # (stages, R, 8) unit that splits each node, -1 for leaves
    threshold: np.ndarray  # (stages, R, 8) thresholds of the splits
    value: np.ndarray  # (stages, R, 16) steps of the leaves

    def predict(self, codes: np.ndarray) -> np.ndarray:
        """Return the labels (m,) of codes (m, K); raise a ``MetricError`` for other or not finite codes."""
        columns = checked_codes(codes)
        if columns.shape[1] != len(self.importances):
            raise MetricError(f"boosted trees: expected {len(self.importances)} units, got codes {columns.shape}.")
        raw = np.repeat(self.prior[:, None], len(columns), axis=1)
        trees.add_trees(columns, LEARNING_RATE, self.feature, self.threshold, self.value, raw)
        return self.classes[_winners(raw)]


def fit_boosted_trees(codes: SortedCodes, labels: np.ndarray, num_threads: int | None = None) -> BoostedTrees:
    """Fit the classifier.

    Args:
        codes: n samples, from ``sort_codes``.
        labels: (n,) of at least two distinct values.
        num_threads: threads that share the trees of a stage (``default_threads``); the result does not depend on it.

    Raises:
        MetricError: the labels have another length, or a single value.
    """
    num_units, num = codes.codes.shape
    if labels.shape != (num,):
        raise MetricError(f"boosted trees: expected labels of shape ({num},), got {labels.shape}.")
    classes, encoded = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise MetricError(f"boosted trees: expected at least two classes, but all {num} labels are {classes[0]}.")
    prior = _prior_predictions(np.bincount(encoded) / num)
    rows = len(prior)
    raw = np.repeat(prior[:, None], num, axis=1)
    feature = np.full((NUM_STAGES, rows, LEAVES), -1)
    threshold = np.zeros((NUM_STAGES, rows, LEAVES))
    value = np.zeros((NUM_STAGES, rows, 2 * LEAVES))
    importance = np.zeros((rows, num_units))
    residuals = np.empty_like(raw)
    scale = 1.0 if rows == 1 else (rows - 1) / rows
    num_threads = min(rows, max(1, num_threads or default_threads()))
    shares_of_rows = [np.arange(first, rows, num_threads) for first in range(num_threads)]
    spaces = [workspace(codes) for _ in range(num_threads)]

    def grow(share: np.ndarray, space: Workspace, stage: int) -> None:
        outputs = feature[stage], threshold[stage], value[stage], importance
        trees.grow_trees(share, codes, space, residuals, raw, LEARNING_RATE, scale, stage, *outputs)

    with ThreadPoolExecutor(num_threads) as pool:
        for stage in range(NUM_STAGES):
            _residuals(encoded, raw, residuals)
            if num_threads == 1:  # a pool costs a tenth of the time
                grow(shares_of_rows[0], spaces[0], stage)
            else:
                list(pool.map(grow, shares_of_rows, spaces, [stage] * num_threads))
    total = importance.sum()
    shares = importance.sum(axis=0) / total if total > 0 else np.zeros(num_units)
    return BoostedTrees(shares, classes, classes[_winners(raw)], prior, feature, threshold, value)


def default_threads() -> int:
    """Return the number of cores, or less if NUMBA_NUM_THREADS or OMP_NUM_THREADS is set, as in workers of scores."""
    limits = [os.environ.get(name, "") for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS")]
    return min([os.cpu_count() or 1, *(int(limit) for limit in limits if limit.isdigit())])


def _prior_predictions(shares: np.ndarray) -> np.ndarray:
    """Return the raw predictions (R,) whose probabilities are the shares (C,) of the classes."""
    tiny = np.finfo(np.float64).eps
    logs = np.log(np.clip(shares, tiny, 1 - tiny))
    return logs[1:] - logs[:1] if len(shares) == 2 else logs - logs.mean()


def _residuals(encoded: np.ndarray, raw: np.ndarray, out: np.ndarray) -> None:
    """Subtract the softmax of raw predictions (R, n), or the logistic function of a single row, from 0 or 1.

    Args:
        encoded: (n,) class numbers of the samples: their rows are subtracted from 1.
    """
    if len(raw) == 1:
        with np.errstate(over="ignore"):  # exp(-raw) may be infinite: probability 0
            np.subtract(encoded, 1.0 / (1.0 + np.exp(-raw)), out=out)
        return
    np.subtract(raw, raw.max(axis=0), out=out)
    np.exp(out, out=out)
    np.divide(out, -out.sum(axis=0), out=out)
    out[encoded, np.arange(len(encoded))] += 1.0


def _winners(raw: np.ndarray) -> np.ndarray:
    """Return the class numbers (n,) of raw predictions (R, n)."""
    return raw.argmax(axis=0) if len(raw) > 1 else (raw[0] >= 0).astype(np.int64)
