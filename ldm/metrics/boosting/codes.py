"""Sorting of codes for all trees: ranks, and buckets of neighbouring values between which a tree may split."""

from __future__ import annotations

import zlib
from collections import Counter

import numpy as np

from ldm.metrics.boosting.trees import LEAVES, MIN_GAP, NUM_SLOTS, SortedCodes, Workspace
from ldm.metrics.common import MetricError

BUCKET = 32  # samples per bucket; see ldm.metrics.boosting.trees
MAX_BUCKETS = 30_000  # approximate number per unit; at most twice as many result, whose numbers fit in 16 bits


def checked_codes(codes: np.ndarray) -> np.ndarray:
    """Return codes (n, K) as float32, in which scikit-learn's trees compare them, too.

    Raises:
        MetricError: there are no rows or units, or a value is not finite in float32.
    """
    if codes.ndim != 2 or 0 in codes.shape:
        raise MetricError(f"boosted trees: expected codes of shape (n, K), not empty; got {codes.shape}.")
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(codes, dtype=np.float32)
    is_bad = ~np.isfinite(single)
    if is_bad.any():
        unit = int(np.argmax(is_bad.any(axis=0)))
        sample = int(np.argmax(is_bad[:, unit]))
        raise MetricError(
            f"boosted trees: expected codes that are finite in float32, got {codes[sample, unit]} in unit {unit}, "
            f"first in sample {sample}. Check for a diverged training run, then encode the data set again."
        )
    return single


def sort_codes(codes: np.ndarray) -> SortedCodes:
    """Sort codes (n, K) and divide each unit into buckets; for errors see ``checked_codes``."""
    columns = np.ascontiguousarray(checked_codes(codes).T)
    num_units, num = columns.shape
    order = np.argsort(columns, axis=1, kind="stable").astype(np.uint32)
    values = np.take_along_axis(columns, order, axis=1)
    cuts = [bucket_starts(column, max(BUCKET, -(-num // MAX_BUCKETS))) for column in values]
    most = max(len(cut) for cut in cuts) - 1
    starts = np.full((num_units, most + 1), num, dtype=np.uint32)
    bucket = np.empty((num_units, num), dtype=np.uint16)
    splittable = np.zeros((num_units, most), dtype=np.bool_)
    for unit, cut in enumerate(cuts):
        starts[unit, : len(cut)] = cut
        bucket[unit, order[unit]] = np.repeat(np.arange(1, len(cut)), np.diff(cut))
        splittable[unit, : len(cut) - 1] = values[unit, cut[1:] - 1] > values[unit, cut[:-1]] + MIN_GAP
    num_buckets = np.array([len(cut) - 1 for cut in cuts])
    return SortedCodes(columns, order, values, bucket, starts, num_buckets, splittable, _marks(order, values))


def _marks(order: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return a number of each unit, (K,) int64, from its order (K, n) of the samples alone.

    It is the same wherever the unit stands, and for increasing functions of it; units of equal order are counted.
    """
    marks, seen = [], Counter()
    for samples, ascending in zip(order, values):
        ranks = np.empty(len(samples), dtype=np.uint32)
        ranks[samples] = np.concatenate([[0], np.cumsum(ascending[1:] > ascending[:-1])])
        checksum = zlib.crc32(ranks.data)
        marks.append((checksum + 0x9E3779B9 * seen[checksum]) & 0x7FFFFFFF)
        seen[checksum] += 1
    return np.array(marks, dtype=np.int64)


def bucket_starts(values: np.ndarray, size: int) -> np.ndarray:
    """Return the first ranks of the buckets of ascending ``values`` (n,), and n.

    Buckets end where neighbours are more than ``MIN_GAP`` apart, so that a threshold is possible between any two, and
    have more than ``size`` samples only if no such gap separates these.
    """
    joints = np.append(np.flatnonzero(values[1:] > values[:-1] + MIN_GAP) + 1, len(values))
    starts, before = [0], 0
    for joint in joints.tolist():  # samples before..joint - 1 are inseparable
        if joint - starts[-1] > size and before > starts[-1]:
            starts.append(before)
        before = joint
    return np.append(starts, len(values))


def workspace(codes: SortedCodes) -> Workspace:
    """Return arrays for ``trees.grow_trees``."""
    num_units, num = codes.codes.shape
    most = codes.splittable.shape[1]
    return Workspace(
        samples=np.empty(num, dtype=np.uint32),
        residuals=np.empty(num),
        spare_samples=np.empty(num, dtype=np.uint32),
        spare_residuals=np.empty(num),
        node=np.empty(num, dtype=np.uint8),
        sums=np.zeros((NUM_SLOTS, 3, num_units, most + 1)),
        promising=np.zeros(-(-most // 8) * 8, dtype=np.uint8),
        members=np.empty(num, dtype=np.uint32),
        starts=np.zeros(2 * LEAVES, dtype=np.int64),
        stops=np.zeros(2 * LEAVES, dtype=np.int64),
        wanted=np.zeros(LEAVES, dtype=np.bool_),
        means=np.zeros(2 * LEAVES),
        slots=np.zeros(LEAVES, dtype=np.int64),
    )
