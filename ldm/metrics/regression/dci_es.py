"""DCI-ES (Eastwood et al., 2023): DCI with explicitness (capacity that a readout needs) and size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm.metrics import common
from ldm.metrics.common import FactorSampler, Representation
from ldm.metrics.dci import scores_from_importances

DEPTHS = (1, 2, 3, 4, 8, 10, 12, 14, 16, 18, 20, 32)  # capacities of the authors' forests


def dci_es(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    factor: int | None = None,
    *,
    num_train: int = 10000,
    num_test: int = 5000,
    depths: Sequence[int] = DEPTHS,
    num_trees: int = 100,
) -> dict[str, Any]:
    """Return D, C, I, E and S from random forests of increasing depth.

    Eastwood, Nicolicioiu, von Kuegelgen, Kekic, Traeuble, Dittadi, Schoelkopf: DCI-ES: An extended disentanglement
    framework with connections to identifiability, ICLR 2023; explicitness as in the authors' code
    (andreinicolicioiu/DCI-ES, ``metrics/explitcitness.py``, ``src/simple_gather.py``): see ``explicitness``, with the
    test error of forests against their depth. It is high if shallow trees are as good as deep ones, *also if all are
    bad*: compare it at equal informativeness. D, C and I are those of each factor's forest of lowest error, size is
    number of factors / number of units. Higher is better. Half a minute per factor.

    Args:
        representation, sampler, random_state: see ``ldm.metrics.common``.
        factor: number of a factor, to return only its part for ``dci_es_scores``.
        num_train: labelled codes that the forests are fitted on.
        num_test: labelled codes of the errors.
        depths: at least two maximum depths, ascending.
        num_trees: trees of each forest.

    Returns:
        ``explicitness`` in [-1, 1]; ``size``; ``disentanglement``, ``completeness``, ``informativeness_train`` and
        ``informativeness_test`` (mean accuracies) in [0, 1].

    Raises:
        MetricError: there are fewer than two factors or units, or a factor takes a single value.
    """
    common.require_factors(sampler, "DCI-ES")
    sample = common.train_test_codes(representation, sampler, num_train, num_test, random_state)
    common.require_units(sample[0], "DCI-ES")
    common.require_varying(sample[1], "DCI-ES")
    if factor is not None:
        return _part(*sample, factor, depths, num_trees)
    return dci_es_scores([_part(*sample, each, depths, num_trees) for each in range(sampler.num_factors)])


def dci_es_scores(parts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the scores from the parts of all factors, in factor order."""
    mean = float(np.mean([part["explicitness"] for part in parts]))
    return {"explicitness": mean, "size": len(parts) / len(parts[0]["importance"])} | scores_from_importances(parts)


def explicitness(capacities: Sequence[float], losses: Sequence[float], baseline: float) -> float:
    """Return 1 - area between a loss-capacity curve and its lowest loss / half of (range of capacities x baseline).

    Args:
        capacities: ascending.
        losses: loss at each capacity; one that is above an earlier one is replaced by that.
        baseline: loss of a guess, more than 0.

    Example:
        >>> explicitness([1, 2, 3], [0.0, 0.0, 0.0], 0.5), explicitness([1, 2, 3], [0.5, 0.25, 0.0], 0.5)
        (1.0, 0.0)
    """
    curve = np.minimum.accumulate(losses) - np.min(losses)
    area = np.sum((curve[1:] + curve[:-1]) / 2 * np.diff(capacities))
    return float(1.0 - 2.0 * area / ((capacities[-1] - capacities[0]) * baseline))


def _part(
    codes: np.ndarray,
    labels: np.ndarray,
    test_codes: np.ndarray,
    test_labels: np.ndarray,
    factor: int,
    depths: Sequence[int],
    num_trees: int,
) -> dict[str, Any]:
    """Return explicitness of one factor, and importances and accuracies of its best forest, as plain numbers."""
    from sklearn.ensemble import RandomForestClassifier

    labels, test_labels = labels[:, factor], test_labels[:, factor]
    losses, best = [], {}
    for depth in depths:
        forest = RandomForestClassifier(n_estimators=num_trees, max_depth=depth, random_state=0).fit(codes, labels)
        accuracy = float(forest.score(test_codes, test_labels))
        losses.append(1.0 - accuracy)
        if not best or accuracy > best["test_accuracy"]:
            best = {"importance": forest.feature_importances_.tolist(), "test_accuracy": accuracy}
            best["train_accuracy"] = float(forest.score(codes, labels))
    return best | {"explicitness": explicitness(depths, losses, 1.0 - 1.0 / len(np.unique(labels)))}
