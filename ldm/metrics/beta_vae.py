"""beta-VAE metric (Higgins et al., 2017): linear classification of the factor that pairs of images share."""

from __future__ import annotations

import numpy as np
from einops import rearrange

from ldm.metrics import common
from ldm.metrics.common import FactorSampler, Representation


def beta_vae(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_eval: int = 5000,
    batch_size: int = 64,
) -> dict[str, float]:
    """Return the accuracy of a logistic regression that predicts the factor shared by pairs of images.

    Higgins et al.: beta-VAE, ICLR 2017, section 3. A point is the mean absolute difference of the codes of
    ``batch_size`` pairs that agree in one factor. Higher is better. The metric saturates early: a rotated
    representation of the factors can score 1. Half a second.

    Args:
        representation, sampler, random_state: see ``ldm.metrics.common``.
        num_train: points that the classifier is fitted on.
        num_eval: points of the reported accuracy.
        batch_size: pairs per point.

    Returns:
        ``train_accuracy`` and ``eval_accuracy`` in [0, 1]; chance is 1/F.

    Raises:
        MetricError: there are fewer than two factors.
    """
    common.require_factors(sampler, "beta-VAE")
    lookup = common.as_lookup(representation)

    def pair_points(num: int) -> tuple[np.ndarray, np.ndarray]:
        """Return points (num, K) and the factor that the pairs of each share (num,)."""
        points, labels = [], []
        for block in common.point_blocks(num, 2 * batch_size):
            shared, (first, second) = common.draw_points(sampler, random_state, block, 2, batch_size)
            differences = rearrange(np.abs(lookup(first) - lookup(second)), "(p b) k -> p b k", p=block)
            points.append(differences.mean(axis=1).astype(np.float64))  # float64 as in the reference, for any codes
            labels.append(shared)
        return np.concatenate(points), np.concatenate(labels)

    points, labels = pair_points(num_train)
    classifier = common.fit_logistic(points, labels, random_state=random_state)
    eval_points, eval_labels = pair_points(num_eval)
    return {
        "train_accuracy": float(np.mean(classifier.predict(points) == labels)),
        "eval_accuracy": float(np.mean(classifier.predict(eval_points) == eval_labels)),
    }
