"""MIG-sup, DCIMIG and JEMMIG: scores from the information between units and factors that MIG computes.

All have the arguments of ``ldm.metrics.mig.mig``, take milliseconds, and raise a ``MetricError`` if there are too few
units or factors to compare, or a factor takes a single value.
"""

from __future__ import annotations

import numpy as np

from ldm.metrics import common
from ldm.metrics.common import FactorSampler, Representation
from ldm.metrics.mig import binned_information

ROUNDING = 1e-12  # difference up to which informations are equal


def mig_sup(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_bins: int = 20,
) -> dict[str, float]:
    """Return ``mig_sup``, the mean over units of the gap between their two largest informations I(z; y) / H(y).

    Li, Murkute, Gyawali, Wang: Progressive learning and disentanglement of hierarchical representations, ICLR 2020. MIG
    is low if a factor is in several units, MIG-sup if a unit contains several factors. As in the authors' code
    (Zhiyuan1991/proVLAE, ``metric_MIG.py``), inactive units do not count: here those that do not vary. In [0, 1].
    """
    common.require_factors(sampler, "MIG-sup")
    codes, labels = common.factor_codes(representation, sampler, num_train, random_state)
    found = binned_information(codes, labels, num_bins, "MIG-sup")
    active = found.units > 0
    ranked = np.sort(found.matrix[active] / found.factors, axis=1)
    return {"mig_sup": float(np.mean(ranked[:, -1] - ranked[:, -2])) if active.any() else 0.0}


def dcimig(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_bins: int = 20,
) -> dict[str, float]:
    """Return ``dcimig``, the largest gap of a unit that belongs to each factor, summed / sum of their entropies.

    Sepliarskaia, Kiseleva, de Rijke: How to not measure disentanglement, arXiv:1910.05587 (3CharM), checked against
    Carbonneau et al.: Measuring disentanglement: a review of metrics, 2020 (``dcimig.py``). The gap of a unit is its
    largest information about a factor minus its second largest; it belongs to the factor of the largest. In [0, 1].
    """
    common.require_factors(sampler, "DCIMIG")
    codes, labels = common.factor_codes(representation, sampler, num_train, random_state)
    found = binned_information(codes, labels, num_bins, "DCIMIG")
    ranked = np.sort(found.matrix, axis=1)
    best = np.zeros(len(found.factors))
    np.maximum.at(best, found.matrix.argmax(axis=1), ranked[:, -1] - ranked[:, -2])
    return {"dcimig": float(best.sum() / found.factors.sum())}


def jemmig(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_bins: int = 20,
) -> dict[str, float]:
    """Return ``jemmig``, H(z, y) - I(z; y) + I(z'; y) for the best and second best unit, mean over factors.

    Do, Tran: Theory and evaluation metrics for learning disentangled representations, ICLR 2020 (authors' code:
    clarken92/DisentanglementMetrics, ``7a_interpretability_metrics_v2.py``). In nats, at least 0, *lower* is better.
    ``jemmig_normalized`` is the mean of 1 - that / (H(y) + log(bins)), as in the review of Carbonneau et al., in
    [0, 1], higher is better; useless units reach 0 only if they fill their bins equally.
    """
    codes, labels = common.factor_codes(representation, sampler, num_train, random_state)
    common.require_units(codes, "JEMMIG")
    found = binned_information(codes, labels, num_bins, "JEMMIG")
    ranked = np.sort(found.matrix, axis=0)
    # the best unit is the one of smallest entropy if several have the same information, up to rounding
    entropies = np.where(found.matrix > ranked[-1] - ROUNDING, found.units[:, None], np.inf).min(axis=0)
    scores = np.maximum(entropies + found.factors - 2 * ranked[-1] + ranked[-2], 0.0)
    normalized = 1.0 - scores / (found.factors + np.log(num_bins))
    return {"jemmig_normalized": float(np.mean(normalized)), "jemmig": float(np.mean(scores))}
