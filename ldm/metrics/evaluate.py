"""Scoring of a representation with several metrics in one call."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.metrics import representation
from ldm.metrics.common import ConstantFactors, FactorSampler, MetricError, Representation
from ldm.metrics.inputs import as_latents
from ldm.metrics.protocols import DEFAULT_PROTOCOL, select_metrics
from ldm.metrics.registry import Metric
from ldm.metrics.representation import check_latents, scalar_units, scale_note
from ldm.metrics.sampling.table import FactorTable

logger = logging.getLogger(__name__)

PROTOCOL_SEED = 0  # every metric gets a fresh RandomState(0), so that metrics do not affect each other
SCALED = ("factor_vae", "beta_vae", "sap")  # metrics that depend on the scale of the units
ERROR = "error"  # entry of a metric that cannot be computed: the reason


def evaluate(
    latents: Any,
    factors: Any,
    metrics: Sequence[str] | str | None = None,
    *,
    protocol: str = DEFAULT_PROTOCOL,
    seed: int = PROTOCOL_SEED,
    standardize: bool = False,
    missing: str = "error",
) -> dict[str, dict[str, Any]]:
    """Score a representation.

    Args:
        latents: (N, K) codes, used as they are, or (N, U, D) vectors per unit, each reduced to its first principal
            component; row i belongs to image i of the data set. May be memory-mapped.
        factors: a factor space, such as ``ldm.data.factors.factor_space("shapes3d")``, or a table (N, F) of the
            factor values of each image, see ``ldm.metrics.sampling.table``.
        metrics: names of metrics; ``"all"`` is every one; None takes those of the protocol.
        protocol: a key of ``PROTOCOLS``.
        seed: seed of each metric's random generator; published scores use 0.
        standardize: divide each unit by its standard deviation first. FactorVAE, beta-VAE and SAP depend on the scale.
        missing: "error", or "drop" to leave out rows of the table without a value of a factor.

    Returns:
        ``{JSON key: result dict}``, the content of a score file. A metric that cannot be computed has the entry
        ``{"error": reason}``, as long as another one can.

    Raises:
        MetricError: the latents or factors cannot be used (shape, length, values that are not finite, no unit that
            varies), or none of the metrics can be computed.
        ConfigError: the metric or protocol is unknown.

    Example:
        >>> factors = np.array([[hue, shape] for hue in range(10) for shape in range(4)])
        >>> evaluate(factors.astype(float), factors, "factor_vae", protocol="fast")["factor_VAE"]["eval_accuracy"]
        1.0
    """
    chosen = select_metrics(protocol, metrics)
    latents = as_latents(latents)
    sampler = as_sampler(factors, missing)
    check_latents(latents.shape, getattr(sampler, "size", len(latents) if latents.ndim else 0))
    units = scalar_units(latents)
    units, note = (representation.standardize(units), None) if standardize else (units, scale_note(units))
    for text in (note if chosen.keys() & SCALED else None, representation.size_note(*units.shape)):
        if text:
            logger.warning("latents: %s", text)
    scores: dict[str, dict[str, Any]] = {}
    for metric in chosen.values():
        codes = units if metric.reduce else latents.reshape(len(latents), -1)
        codes = representation.standardize(codes) if standardize and not metric.reduce else codes
        try:
            scores |= score(codes, sampler, {metric.key: metric}, seed)
        except MetricError as error:
            if len(chosen) == 1:
                raise
            logger.warning("%s was not computed: %s", metric.key, error)
            scores[metric.key] = {ERROR: str(error)}
    if all(ERROR in result for result in scores.values()):
        raise MetricError("; ".join(f"{key}: {result[ERROR]}" for key, result in scores.items()))
    return scores


def as_sampler(factors: Any, missing: str = "error") -> FactorSampler:
    """Return a factor space without its constant factors, and a table of factor values as a ``FactorTable``.

    Raises:
        MetricError: ``factors`` is neither.
    """
    if isinstance(factors, FactorSampler):
        return factors.without_constant() if isinstance(factors, ConstantFactors) else factors
    if isinstance(factors, str):
        raise MetricError(
            f"factors: expected a factor space or a table of values, got {factors!r}. For the space of a data set, use "
            f'ldm.data.factors.factor_space("{factors}").'
        )
    return FactorTable(factors, missing=missing)


def score(
    representation: Representation,
    sampler: FactorSampler,
    metrics: Mapping[str, Metric] | None = None,
    seed: int = PROTOCOL_SEED,
) -> dict[str, dict[str, float]]:
    """Score one representation (N, K) with several metrics in turn.

    Args:
        representation: (N, K) codes, or a function of row indices.
        sampler: factors of the data set.
        metrics: metrics to run, as returned by ``select_metrics``; None takes those of DisDiff's protocol.
        seed: seed of each metric's random generator.

    Returns:
        ``{JSON key: result dict}``, the content of a score file.

    Raises:
        MetricError: one of the metrics cannot be computed.
    """
    return {
        metric.key: metric.function(representation, sampler, np.random.RandomState(seed), **metric.protocol)
        for metric in (select_metrics() if metrics is None else metrics).values()
    }
