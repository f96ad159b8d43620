"""Mutual information of each unit with each factor, for the heat maps of reports; not a score."""

from __future__ import annotations

from typing import Any

import numpy as np

from ldm.metrics.common import (
    FactorSampler,
    Representation,
    factor_codes,
    factor_entropies,
    histogram_codes,
    mutual_information,
)


def information(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_bins: int = 20,
) -> dict[str, Any]:
    """Return the mutual information of units and factors.

    Args:
        representation: (N, K) codes of the whole data set.
        sampler: factors of the data set.
        random_state: fresh generator.
        num_train: number of labelled codes drawn.
        num_bins: number of histogram bins per unit.

    Returns:
        ``mutual_information`` (K, F) and ``entropies`` (F,), both in nats, and ``deviations`` (K,) of the units.
    """
    codes, labels = factor_codes(representation, sampler, num_train, random_state)
    return {
        "mutual_information": mutual_information(histogram_codes(codes, num_bins), labels),
        "entropies": factor_entropies(labels),
        "deviations": codes.std(axis=0),
    }
