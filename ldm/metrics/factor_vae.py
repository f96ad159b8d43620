"""FactorVAE metric (Kim & Mnih, 2018): does the unit of least relative variance name the factor held fixed?"""

from __future__ import annotations

import numpy as np

from ldm.metrics.common import (
    FactorSampler,
    Lookup,
    Representation,
    as_lookup,
    draw_points,
    hold_fixed,
    point_blocks,
    require_factors,
)


def factor_vae(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_eval: int = 5000,
    num_variance_estimate: int = 10000,
    batch_size: int = 64,
    prune_threshold: float = 0.05,
) -> dict[str, float]:
    """Accuracy of the majority-vote classifier from the least varying unit to the factor held fixed.

    Kim, Mnih: Disentangling by factorising, ICML 2018, section 4 and appendix B. Higher is better. Under half a second.

    Args:
        representation: (N, K) codes of the whole data set, or a function of row indices.
        sampler: the data set's factors.
        random_state: fresh generator; the published protocol uses seed 0.
        num_train: votes the classifier is built from.
        num_eval: fresh votes of the reported accuracy.
        num_variance_estimate: rows drawn (at once) for each unit's variance over the data set.
        batch_size: rows per vote.
        prune_threshold: units whose standard deviation is smaller take no part; on the scale of the codes.

    Returns:
        ``train_accuracy`` and ``eval_accuracy`` in [0, 1] (0 if every unit is pruned), ``num_active_dims``
        (K, as the reference reports it, 0 if all are pruned) and ``num_active_true``, the units not pruned.

    Raises:
        MetricError: fewer than two factors.
    """
    require_factors(sampler, "FactorVAE")
    lookup = as_lookup(representation)
    factors = sampler.sample_factors(num_variance_estimate, random_state)
    rows = sampler.sample_observations_from_factors(factors, random_state)
    variances = np.var(lookup(rows), axis=0, ddof=1)  # (K,)
    active = np.flatnonzero(np.sqrt(variances) >= prune_threshold)
    if active.size == 0:
        return {"train_accuracy": 0.0, "eval_accuracy": 0.0, "num_active_dims": 0, "num_active_true": 0}

    def votes(num: int) -> np.ndarray:
        return _votes(lookup, sampler, random_state, num, batch_size, variances, active)

    train_votes = votes(num_train)
    classifier = np.argmax(train_votes, axis=0)  # (K,) factor of each vote column; ties to the first
    columns = np.arange(len(variances))
    eval_votes = votes(num_eval)
    return {
        "train_accuracy": float(train_votes[classifier, columns].sum() / train_votes.sum()),
        "eval_accuracy": float(eval_votes[classifier, columns].sum() / eval_votes.sum()),
        "num_active_dims": len(variances),
        "num_active_true": len(active),
    }


def _votes(
    lookup: Lookup,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    num: int,
    batch_size: int,
    variances: np.ndarray,
    active: np.ndarray,
) -> np.ndarray:
    """Count (F, K) votes: factor held fixed against the *active* unit that varied least, relative to its variance."""
    counts = np.zeros((sampler.num_factors, len(variances)), dtype=np.int64)
    for block in point_blocks(num, batch_size):
        fixed, rows = _draw_block(sampler, random_state, block, batch_size)
        codes = lookup(rows)[:, active].reshape(block, batch_size, -1)  # (block, batch, active)
        least = np.argmin(np.var(codes, axis=1, ddof=1) / variances[active], axis=1)
        np.add.at(counts, (fixed, least), 1)
    return counts


def _draw_block(
    sampler: FactorSampler, random_state: np.random.RandomState, num_points: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The factors held fixed (num_points,) and the rows of all batches (num_points * batch_size,)."""
    drawn = draw_points(sampler, random_state, num_points, 1, batch_size)
    if drawn is not None:
        fixed, values = drawn[0], drawn[1][:, 0]  # (points, batch, F)
        points = np.arange(num_points)
        values[points, :, fixed] = values[points, :1, fixed]
        return fixed, sampler.sample_observations_from_factors(values.reshape(-1, values.shape[2]), random_state)
    fixed = np.empty(num_points, dtype=np.int64)
    rows = []
    for point in range(num_points):
        factor = fixed[point] = random_state.randint(sampler.num_factors)
        factors = sampler.sample_factors(batch_size, random_state)
        factors = hold_fixed(sampler, factors, factor, factors[0, factor], random_state)
        rows.append(sampler.sample_observations_from_factors(factors, random_state))
    return fixed, np.concatenate(rows)
