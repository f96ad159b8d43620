"""Mutual Information Gap (Chen et al., 2018): difference between the two most informative units of each factor."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ldm.metrics import common
from ldm.metrics.common import FactorSampler, Representation


def mig(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_bins: int = 20,
) -> dict[str, float]:
    """Return the mean over factors of (largest - second largest information of a unit) / entropy of the factor.

    Chen, Li, Grosse, Duvenaud: Isolating sources of disentanglement in VAEs, NeurIPS 2018, section 4. Milliseconds.

    Args:
        representation, sampler, random_state: see ``ldm.metrics.common``.
        num_train: labelled codes.
        num_bins: histogram bins per unit.

    Returns:
        ``discrete_mig`` in [0, 1].

    Raises:
        MetricError: there is a single unit, or a factor takes a single value.

    Example:
        >>> from ldm.data.factors import FactorSpace
        >>> space = FactorSpace(("hue", "shape"), (10, 4))
        >>> codes = space.factors_of(np.arange(space.size))
        >>> round(mig(codes, space, np.random.RandomState(0))["discrete_mig"], 2)
        1.0
    """
    codes, labels = common.factor_codes(representation, sampler, num_train, random_state)
    common.require_units(codes, "MIG")
    found = binned_information(codes, labels, num_bins, "MIG")
    ranked = np.sort(found.matrix, axis=0)  # (K, F)
    return {"discrete_mig": float(np.mean((ranked[-1] - ranked[-2]) / found.factors))}


class BinnedInformation(NamedTuple):
    """Information of the histogram bins of K units about F factors, in nats."""

    matrix: np.ndarray  # (K, F) mutual information
    factors: np.ndarray  # (F,) entropies, more than 0
    units: np.ndarray  # (K,) entropies of the bins


def binned_information(codes: np.ndarray, labels: np.ndarray, num_bins: int, metric: str) -> BinnedInformation:
    """Return the information from which MIG, MIG-sup, DCIMIG and JEMMIG are computed.

    Args:
        codes: (n, K).
        labels: (n, F) factor values.
        num_bins: histogram bins per unit.
        metric: name of the metric, for errors.

    Raises:
        MetricError: a factor takes a single value.
    """
    common.require_varying(labels, metric)
    binned = common.histogram_codes(codes, num_bins)
    matrix = common.mutual_information(binned, labels)
    return BinnedInformation(matrix, common.factor_entropies(labels), common.factor_entropies(binned))


def information(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_bins: int = 20,
) -> dict[str, Any]:
    """Return what the heat maps of reports show; not a score. Arguments as in :func:`mig`.

    Returns:
        ``mutual_information`` (K, F) and ``entropies`` (F,), both in nats, and ``deviations`` (K,) of the units.
    """
    codes, labels = common.factor_codes(representation, sampler, num_train, random_state)
    return {
        "mutual_information": common.mutual_information(common.histogram_codes(codes, num_bins), labels),
        "entropies": common.factor_entropies(labels),
        "deviations": codes.std(axis=0),
    }
