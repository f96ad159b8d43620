"""Scoring a representation with several metrics in one call."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ldm.metrics.common import FactorSampler, Representation
from ldm.metrics.protocols import select_metrics
from ldm.metrics.registry import Metric

PROTOCOL_SEED = 0  # every metric gets a fresh RandomState(0): no metric shifts the draws of another


def score(
    representation: Representation,
    sampler: FactorSampler,
    metrics: Mapping[str, Metric] | None = None,
    seed: int = PROTOCOL_SEED,
) -> dict[str, dict[str, float]]:
    """Score one representation (N, K) with every metric, one after the other.

    Args:
        representation: (N, K) codes of the whole data set, or a function of row indices.
        sampler: the data set's factors.
        metrics: what to run, such as ``select_metrics`` returns; None means DisDiff's protocol.
        seed: of every metric's random generator.

    Returns:
        ``{JSON key: result dict}``, the content of a score file.

    Raises:
        MetricError: one of the metrics cannot be computed.
    """
    return {
        metric.key: metric.function(representation, sampler, np.random.RandomState(seed), **metric.protocol)
        for metric in (select_metrics() if metrics is None else metrics).values()
    }
