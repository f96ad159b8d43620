"""Names of units by mutual information with the factors of labelled images.

Dimensions: n images, U units, F factors.
"""

from __future__ import annotations

import numpy as np

from ldm.evaluation.row_encoder import RowEncoder
from ldm.metrics.common import factor_codes, factor_entropies, histogram_codes, mutual_information

NUM_IMAGES = 2000
NUM_BINS = 20
LEAST_SHARE = 0.05  # of a factor's entropy; a unit with a smaller share of every factor is not named


def information_shares(codes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the mutual information of codes (n, U) and labels (n, F) as a share of each factor's entropy, (U, F).

    The information that remains when the labels are shuffled, a bias of finite samples, is subtracted.
    """
    binned = histogram_codes(codes, NUM_BINS)
    by_chance = mutual_information(binned, np.random.RandomState(0).permutation(labels))
    shares = (mutual_information(binned, labels) - by_chance) / np.maximum(factor_entropies(labels), 1e-12)
    return np.clip(shares, 0.0, 1.0)


def name_by_information(rows: RowEncoder, seed: int = 0, num_images: int = NUM_IMAGES) -> list[str]:
    """Return for each unit the factor with which it shares most information; "" below ``LEAST_SHARE``."""
    codes, labels = factor_codes(rows, rows.space, num_images, np.random.RandomState(seed))
    return names_of(information_shares(codes, labels), rows.space.factor_names)


def names_of(shares: np.ndarray, factor_names: tuple[str, ...]) -> list[str]:
    """Return names for shares (U, F)."""
    return [factor_names[row.argmax()] if row.max() >= LEAST_SHARE else "" for row in shares]
