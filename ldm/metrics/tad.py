"""TAD, total AUROC difference (Yeats et al., 2022): disentanglement of labelled attributes, as for CelebA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm.metrics.common import LOOKUP_ROWS, MetricError, mutual_information, require_units

NUM_THRESHOLDS = 11  # 0, 0.1, ..., 1 of a unit's range
FLAT_RANGE = 0.2  # range up to which a unit is considered dead
CHANCE = 0.5

# in the order of list_attr_celeba.txt
CELEBA_ATTRIBUTES = tuple(
    """5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair
    Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male
    Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks
    Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace
    Wearing_Necktie Young""".split()
)


def tad(
    codes: np.ndarray,
    attributes: np.ndarray,
    *,
    min_auroc: float = 0.75,
    max_redundancy: float = 0.2,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the lead of the best unit over the second best, summed over the captured attributes.

    Yeats, Liu, Womble, Li: NashAE, ECCV 2022, section 4.2; computed as in DisDiff and EncDiff for CelebA. Every number
    of a latent is a unit of its own. An attribute is captured if one unit detects it well; attributes that nearly
    follow from another attribute are left out. Higher is better. Seconds for 200,000 images.

    Args:
        codes: (n, K) float codes of n images.
        attributes: (n, A) of 0 and 1.
        min_auroc: area under the ROC curve of the best unit from which an attribute is captured.
        max_redundancy: largest share of the entropy of an attribute that another attribute may determine.
        names: names of the A attributes.

    Returns:
        ``tad_score``, at least 0 (an attribute with one perfect unit adds 0.5); ``attributes_captured``, a count; both
        also under the references' keys ``"TAD SCORE: "`` and ``"Attributes Captured: "``; ``captured``, the names or
        numbers of the attributes.

    Raises:
        MetricError: the shapes are not consistent, attributes are not 0 and 1, codes are not finite, or one unit.

    Example:
        >>> attributes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
        >>> tad(attributes.astype(float), attributes, names=["hat", "smile"])["captured"]
        ['hat', 'smile']
    """
    codes, attributes = np.asarray(codes), np.asarray(attributes)
    _check(codes, attributes, names)
    areas = detector_areas(codes, attributes)  # (A, K)
    ranked = np.sort(areas, axis=1)
    kept = (ranked[:, -1] >= min_auroc) & (redundancies(attributes) <= max_redundancy)
    total, number = float((ranked[:, -1] - ranked[:, -2])[kept].sum()), int(kept.sum())
    return {
        "tad_score": total,
        "attributes_captured": number,
        "TAD SCORE: ": total,
        "Attributes Captured: ": number,
        "captured": [index if names is None else names[index] for index in np.flatnonzero(kept).tolist()],
    }


def detector_areas(codes: np.ndarray, attributes: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve of each unit as a detector of each attribute, (A, K); 0.5 for dead units.

    A unit detects by values above or below a threshold, whichever is better, at eleven thresholds over its range.
    False and true positive rates are sorted *separately* and summed as upper rectangles, as in the references.

    Args:
        codes: (n, K).
        attributes: (n, A) of 0 and 1, with both values in each column.
    """
    lowest = codes.min(axis=0).astype(np.float64)
    span = codes.max(axis=0).astype(np.float64) - lowest
    thresholds = np.linspace(0.0, 1.0, NUM_THRESHOLDS)[:, None] * span + lowest  # (T, K)
    positives = attributes.sum(axis=0, dtype=np.float64)
    true = np.zeros((attributes.shape[1], NUM_THRESHOLDS, codes.shape[1]))  # (A, T, K) images above the threshold
    above = np.zeros((NUM_THRESHOLDS, codes.shape[1]))
    rows = max(1, LOOKUP_ROWS // codes.shape[1])
    for start in range(0, len(codes), rows):
        is_above = (codes[start : start + rows, None] >= thresholds).astype(np.float32)  # (rows, T, K)
        labels = attributes[start : start + rows].astype(np.float32)
        above += is_above.sum(axis=0, dtype=np.float64)
        true += np.tensordot(labels, is_above, axes=(0, 0))
    true_rate = true / positives[:, None, None]
    false_rate = (above - true) / (len(codes) - positives)[:, None, None]
    areas = np.maximum(_area(false_rate, true_rate), _area(1.0 - false_rate, 1.0 - true_rate))
    return np.where(span > FLAT_RANGE, areas, CHANCE)


def redundancies(attributes: np.ndarray) -> np.ndarray:
    """Return the largest share of the entropy of each attribute in one other attribute, (A,) in [0, 1].

    Args:
        attributes: (n, A) of 0 and 1, with both values in each column.
    """
    information = mutual_information(attributes, attributes)
    entropy = np.diag(information).copy()
    np.fill_diagonal(information, 0.0)
    return information.max(axis=1) / entropy


def _area(false_rate: np.ndarray, true_rate: np.ndarray) -> np.ndarray:
    """Return the areas (A, K) under ROC curves (A, T, K)."""
    false_rate, true_rate = np.sort(false_rate, axis=1), np.sort(true_rate, axis=1)
    return (true_rate[:, 1:] * np.diff(false_rate, axis=1)).sum(axis=1)


def _check(codes: np.ndarray, attributes: np.ndarray, names: Sequence[str] | None) -> None:
    if codes.ndim != 2 or attributes.ndim != 2 or len(codes) != len(attributes) or 0 in codes.shape:
        raise MetricError(f"TAD: expected codes (n, K) and attributes (n, A), got {codes.shape} and {attributes.shape}")
    require_units(codes, "TAD")
    if not np.isfinite(codes).all():
        row, unit = np.argwhere(~np.isfinite(codes))[0]
        raise MetricError(f"TAD: expected finite codes, got {codes[row, unit]} in unit {unit}, first in row {row}.")
    if not np.isin(attributes, (0, 1)).all():
        raise MetricError(f"TAD: expected attributes of 0 and 1, got {np.setdiff1d(attributes, (0, 1))[:3].tolist()}.")
    if names is not None and len(names) != attributes.shape[1]:
        raise MetricError(f"names: expected one for each of {attributes.shape[1]} attributes, got {len(names)}.")
    constant = np.flatnonzero((attributes == attributes[0]).all(axis=0)).tolist()
    if constant:
        name = constant[0] if names is None else names[constant[0]]
        raise MetricError(
            f"TAD: expected attributes that vary, but attribute {name} is {int(attributes[0, constant[0]])} in all "
            f"{len(attributes)} images. Leave it out, or take more images."
        )
