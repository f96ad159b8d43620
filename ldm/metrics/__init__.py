"""Disentanglement metrics: pure functions of a representation, a factor sampler and a random generator.

``METRICS`` lists them with the protocol DisDiff and CLIP-DisDiff published; ``score`` runs them all. To add a
metric: write its function in a file of its own and add a line to ``METRICS``.

Example:
    >>> sorted(METRICS)
    ['beta_vae', 'dci', 'factor_vae', 'mig']
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ldm.metrics.beta_vae import beta_vae
from ldm.metrics.common import FactorSampler, MetricError, Representation
from ldm.metrics.dci import dci, dci_factor, scores_from_importances
from ldm.metrics.factor_vae import factor_vae
from ldm.metrics.mig import mig

__all__ = ["METRICS", "PROTOCOL_SEED", "Metric", "MetricError", "beta_vae", "dci", "factor_vae", "mig", "score"]

PROTOCOL_SEED = 0  # every metric gets a fresh RandomState(0): no metric shifts the draws of another


@dataclass(frozen=True)
class Metric:
    """One metric and how the protocol runs it.

    Attributes:
        key: its name in score files.
        function: ``(representation, sampler, random_state, **protocol) -> dict``.
        figure: the entry of that dict which tables and papers show.
        protocol: keyword arguments of the published protocol.
        seconds: rough cost on one core, ``(number of units, values of a factor) -> s``; longest jobs go first.
        part: one factor's share, ``(representation, sampler, random_state, factor, **protocol) -> dict``, for a
            metric slow enough to be spread over processes factor by factor.
        join: the metric's dict from the parts of all factors, in factor order.
    """

    key: str
    function: Callable[..., dict[str, float]]
    figure: str
    protocol: Mapping[str, Any] = field(default_factory=dict)
    seconds: Callable[[int, int], float] = lambda units, values: 1.0
    part: Callable[..., dict[str, Any]] | None = None
    join: Callable[[Sequence[dict[str, Any]]], dict[str, float]] | None = None


METRICS: dict[str, Metric] = {
    "beta_vae": Metric(
        "beta_VAE", beta_vae, "eval_accuracy", {"num_train": 10000, "num_eval": 5000, "batch_size": 64}
    ),
    "dci": Metric(
        "dci",
        dci,
        "disentanglement",
        {"num_train": 10000, "num_test": 5000},
        seconds=lambda units, values: 0.2 * units * values,
        part=dci_factor,
        join=scores_from_importances,
    ),
    "mig": Metric("MIG", mig, "discrete_mig", {"num_train": 10000, "num_bins": 20}, seconds=lambda units, values: 0.1),
    "factor_vae": Metric(
        "factor_VAE",
        factor_vae,
        "eval_accuracy",
        {
            "num_train": 10000,
            "num_eval": 5000,
            "num_variance_estimate": 10000,
            "batch_size": 64,
            "prune_threshold": 0.05,
        },
    ),
}


def score(
    representation: Representation,
    sampler: FactorSampler,
    metrics: Mapping[str, Metric] = METRICS,
    seed: int = PROTOCOL_SEED,
) -> dict[str, dict[str, float]]:
    """Score one representation (N, K) with every metric, one after the other.

    Returns:
        ``{JSON key: result dict}``, the content of a score file.
    """
    return {
        metric.key: metric.function(representation, sampler, np.random.RandomState(seed), **metric.protocol)
        for metric in metrics.values()
    }
