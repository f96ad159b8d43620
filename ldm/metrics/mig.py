"""Mutual Information Gap (Chen et al., 2018): is each factor told by one unit alone?"""

from __future__ import annotations

import numpy as np

from ldm.metrics.common import (
    FactorSampler,
    Representation,
    factor_codes,
    factor_entropies,
    histogram_codes,
    mutual_information,
    require_units,
    require_varying,
)


def mig(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_bins: int = 20,
) -> dict[str, float]:
    """Mean over factors of (largest - second largest information of a unit) / the factor's entropy.

    Chen, Li, Grosse, Duvenaud: Isolating sources of disentanglement in VAEs, NeurIPS 2018, section 4. Higher is
    better. Milliseconds.

    Args:
        representation: (N, K) codes of the whole data set, or a function of row indices.
        sampler: the data set's factors.
        random_state: fresh generator; the published protocol uses seed 0.
        num_train: labelled codes drawn.
        num_bins: histogram bins each unit is cut into.

    Returns:
        ``discrete_mig`` in [0, 1].

    Raises:
        MetricError: a single unit, or a factor that takes one value only.
    """
    codes, labels = factor_codes(representation, sampler, num_train, random_state)
    require_units(codes, "MIG")
    require_varying(labels, "MIG divides by each factor's entropy")
    entropies = factor_entropies(labels)
    ranked = np.sort(mutual_information(histogram_codes(codes, num_bins), labels), axis=0)[::-1]  # (K, F)
    return {"discrete_mig": float(np.mean((ranked[0] - ranked[1]) / entropies))}
