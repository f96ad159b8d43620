"""InfoMEC (Hsu et al., 2023): modularity, compactness and explicitness in terms of information."""

from __future__ import annotations

from typing import Any

import numpy as np

from ldm.metrics import common
from ldm.metrics.common import FactorSampler, Representation
from ldm.metrics.information.neighbors import neighbor_information

ACTIVE_SHARE = 1 / 20  # share of the largest range above which a continuous unit is active


def infomec(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_test: int = 5000,
    num_neighbors: int = 10,
    discrete_codes: bool | None = None,
) -> dict[str, float]:
    """Return InfoM, InfoC and InfoE.

    Hsu, Dorrell, Whittington, Wu, Finn: Disentanglement via latent quantization, NeurIPS 2023; equations as in the
    authors' code (kylehkhsu/latent_quantization, ``disentangle/metrics/infomec.py``). With the normalized information
    N = I(y; z) / H(y) of the active units, from nearest neighbours for continuous codes and counts for discrete ones:

    * InfoM: mean over units of the largest N / sum over factors, rescaled from [1 / F, 1] to [0, 1];
    * InfoC: mean over factors of the largest N / sum over active units, rescaled in the same way;
    * InfoE: mean over factors of 1 - H(y | z) / H(y), cross-entropies of a logistic regression and of a guess.

    Departures: a unit without information (0 / 0 there) does not count in InfoM, a factor without any counts as 0 in
    InfoC, and InfoE is computed on test codes. Each row is used once, since copies of a row are neighbours that make
    random codes informative. InfoM and InfoC are ratios: if InfoE is low, they mostly compare estimation errors. Higher
    is better. Two seconds at 20 units.

    Args:
        representation, sampler, random_state: see ``ldm.metrics.common``.
        num_train: labelled codes.
        num_test: labelled codes of ``infoe``.
        num_neighbors: neighbours of the estimate for continuous codes.
        discrete_codes: whether codes are categories; None takes whole-number types as categories.

    Returns:
        ``infom``, ``infoc``, ``infoe``, ``infoe_train`` (on training codes, as published), in [0, 1], and
        ``num_active_units``. Comparisons of a single active unit, or without any information, are 0.

    Raises:
        MetricError: there are fewer than two factors, a factor takes a single value, or each row has its own.
    """
    common.require_factors(sampler, "InfoMEC")
    sample = _draw(representation, sampler, num_train, num_test, random_state)
    codes, labels = sample[:2]
    common.require_varying(labels, "InfoMEC")
    is_discrete = codes.dtype.kind in "iu" if discrete_codes is None else discrete_codes
    ranges = codes.max(axis=0).astype(np.float64) - codes.min(axis=0)
    active = ranges > (0.0 if is_discrete else ranges.max() * ACTIVE_SHARE)
    if is_discrete:
        information = common.mutual_information(codes[:, active], labels)
    else:
        information = neighbor_information(codes[:, active], labels, random_state, num_neighbors)
    normalized = information / common.factor_entropies(labels)  # (active units, F)
    explained = [explicitness(*sample, factor, is_discrete) for factor in range(labels.shape[1])]
    train, test = np.mean(explained, axis=0).tolist()
    scores = {"infom": concentration(normalized), "infoc": concentration(normalized.T, count_empty=True)}
    return scores | {"infoe": test, "infoe_train": train, "num_active_units": int(active.sum())}


def _draw(
    representation: Representation, sampler: FactorSampler, num_train: int, num_test: int, rs: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw training and test codes and labels; a row that is drawn several times for training is used once."""
    drawn = common.train_test_codes(lambda rows: rows[:, None], sampler, num_train, num_test, rs)
    rows, labels, test_rows, test_labels = drawn
    first = np.sort(np.unique(rows[:, 0], return_index=True)[1])
    lookup = common.as_lookup(representation)
    return lookup(rows[first, 0]), labels[first], lookup(test_rows[:, 0]), test_labels


def concentration(rows: np.ndarray, count_empty: bool = False) -> float:
    """Return the mean over rows (R, C) of the share of the largest entry, rescaled so that equal entries have 0.

    A row of zeros counts as 0 or not at all.

    Example:
        >>> concentration(np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
        0.5
    """
    totals = rows.sum(axis=1)
    filled = totals > 0
    if rows.shape[1] < 2 or not filled.any():
        return 0.0
    fair = 1 / rows.shape[1]
    shares = (rows[filled].max(axis=1) / totals[filled] - fair) / (1 - fair)
    return float(shares.sum() / (len(rows) if count_empty else len(shares)))


def explicitness(
    codes: np.ndarray, labels: np.ndarray, test_codes: np.ndarray, test_labels: np.ndarray, factor: int, one_hot: bool
) -> tuple[float, float]:
    """Return the share of the entropy of a factor that logistic regression explains on training and test codes.

    There is no penalty, and values of the factor have equal weights, so that a guess has the cross-entropy log(number
    of values). Test labels without a training code do not count.
    """
    labels, test_labels = labels[:, factor], test_labels[:, factor]
    if one_hot:
        from sklearn.preprocessing import OneHotEncoder

        encoder: Any = OneHotEncoder(handle_unknown="ignore").fit(codes)
        codes, test_codes = encoder.transform(codes), encoder.transform(test_codes)
    else:
        codes, test_codes = common.standardized(codes, test_codes)
    classifier = common.fit_logistic(codes, labels, C=np.inf, class_weight="balanced")
    numbers = classifier.classes_.searchsorted

    def share(units: np.ndarray, values: np.ndarray) -> float:
        chosen = classifier.predict_proba(units)[np.arange(len(values)), numbers(values)]
        entropy = -np.mean(np.log(np.maximum(chosen, np.finfo(np.float64).tiny)))
        return max(0.0, 1.0 - float(entropy) / np.log(len(classifier.classes_)))

    known = np.isin(test_labels, labels)
    return share(codes, labels), share(test_codes[known], test_labels[known]) if known.any() else 0.0
