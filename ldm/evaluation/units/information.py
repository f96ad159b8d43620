"""Which factor a unit tells: mutual information on labelled images.

Dims: n images, U units, F factors.
"""

from __future__ import annotations

import numpy as np

from ldm.evaluation.row_encoder import RowEncoder
from ldm.metrics.common import factor_codes, factor_entropies, histogram_codes, mutual_information

NUM_IMAGES = 2000
NUM_BINS = 20
LEAST_SHARE = 0.05  # of a factor's entropy; a unit that tells less of every factor is not named


def information_shares(codes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How much of each factor's entropy each unit tells.

    Finite samples make unrelated variables share some information; what remains when the labels are shuffled is
    taken off.

    Args:
        codes: (n, U) float.
        labels: (n, F) int.

    Returns:
        (U, F), at least 0.
    """
    binned = histogram_codes(codes, NUM_BINS)
    by_chance = mutual_information(binned, np.random.RandomState(0).permutation(labels))
    shares = (mutual_information(binned, labels) - by_chance) / np.maximum(factor_entropies(labels), 1e-12)
    return np.clip(shares, 0.0, 1.0)


def name_by_information(rows: RowEncoder, seed: int = 0, num_images: int = NUM_IMAGES) -> list[str]:
    """For each unit the factor it tells most about, empty for a unit that tells nothing worth a name."""
    codes, labels = factor_codes(rows, rows.space, num_images, np.random.RandomState(seed))
    return names_of(information_shares(codes, labels), rows.space.factor_names)


def names_of(shares: np.ndarray, factor_names: tuple[str, ...]) -> list[str]:
    """Names from shares (U, F)."""
    return [factor_names[row.argmax()] if row.max() >= LEAST_SHARE else "" for row in shares]
