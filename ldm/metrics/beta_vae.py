"""beta-VAE metric (Higgins et al., 2017): can a linear classifier tell which factor a pair batch shares?"""

from __future__ import annotations

import numpy as np

from ldm.metrics.common import (
    FactorSampler,
    Lookup,
    Representation,
    as_lookup,
    draw_points,
    fit_logistic,
    hold_fixed,
    point_blocks,
    require_factors,
)


def beta_vae(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_eval: int = 5000,
    batch_size: int = 64,
) -> dict[str, float]:
    """Accuracy of a logistic regression that names the factor shared by pairs of images.

    Higgins et al.: beta-VAE, ICLR 2017, section 3. A point is the mean absolute difference of the codes of
    ``batch_size`` pairs that agree in one factor. Higher is better; it saturates early: a rotated representation of
    the factors can score 1. Half a second.

    Args:
        representation: (N, K) codes of the whole data set, or a function of row indices.
        sampler: the data set's factors.
        random_state: fresh generator; the published protocol uses seed 0.
        num_train: points the classifier is fitted on.
        num_eval: points of the reported accuracy.
        batch_size: pairs per point.

    Returns:
        ``train_accuracy`` and ``eval_accuracy`` in [0, 1]; chance is 1/F.

    Raises:
        MetricError: fewer than two factors.
    """
    require_factors(sampler, "beta-VAE")
    lookup = as_lookup(representation)
    points, labels = _pair_points(lookup, sampler, random_state, num_train, batch_size)
    classifier = fit_logistic(points, labels, random_state=random_state)
    eval_points, eval_labels = _pair_points(lookup, sampler, random_state, num_eval, batch_size)
    return {
        "train_accuracy": float(np.mean(classifier.predict(points) == labels)),
        "eval_accuracy": float(np.mean(classifier.predict(eval_points) == eval_labels)),
    }


def _pair_points(
    lookup: Lookup, sampler: FactorSampler, random_state: np.random.RandomState, num_points: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Points (num_points, K) and the factor each one's pairs share (num_points,)."""
    points, labels = [], []
    for block in point_blocks(num_points, 2 * batch_size):
        shared, sides = _draw_block(sampler, random_state, block, batch_size)
        first, second = (lookup(rows) for rows in sides)
        differences = np.abs(first - second).reshape(block, batch_size, -1)  # (block, batch, K)
        points.append(differences.mean(axis=1).astype(np.float64))  # as in the reference, whatever the codes are
        labels.append(shared)
    return np.concatenate(points), np.concatenate(labels)


def _draw_block(
    sampler: FactorSampler, random_state: np.random.RandomState, num_points: int, batch_size: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The shared factors (num_points,) and, for both sides, the rows (num_points * batch_size,)."""
    drawn = draw_points(sampler, random_state, num_points, 2, batch_size)
    if drawn is None:
        pairs = [_draw_pairs(sampler, random_state, batch_size) for _ in range(num_points)]
        sides = [np.concatenate([pair[side] for pair in pairs]) for side in (1, 2)]
        return np.array([pair[0] for pair in pairs]), sides
    shared, values = drawn  # (points, 2, batch, F)
    points = np.arange(num_points)
    values[points, 1, :, shared] = values[points, 0, :, shared]
    flat = values.transpose(1, 0, 2, 3).reshape(2, num_points * batch_size, -1)
    return shared, [sampler.sample_observations_from_factors(side, random_state) for side in flat]


def _draw_pairs(
    sampler: FactorSampler, random_state: np.random.RandomState, batch_size: int
) -> tuple[int, np.ndarray, np.ndarray]:
    """The shared factor and the rows of both sides; drawn in disentanglement_lib's order."""
    shared = random_state.randint(sampler.num_factors)
    first = sampler.sample_factors(batch_size, random_state)
    second = sampler.sample_factors(batch_size, random_state)
    second = hold_fixed(sampler, second, shared, first[:, shared], random_state)
    first_rows = sampler.sample_observations_from_factors(first, random_state)
    return shared, first_rows, sampler.sample_observations_from_factors(second, random_state)
