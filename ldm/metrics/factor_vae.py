"""FactorVAE metric (Kim & Mnih, 2018): majority vote from the unit of least relative variance to the fixed factor."""

from __future__ import annotations

import numpy as np
from einops import rearrange

from ldm.metrics import common
from ldm.metrics.common import FactorSampler, Representation
from ldm.metrics.representation import PRUNED


def factor_vae(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_eval: int = 5000,
    num_variance_estimate: int = 10000,
    batch_size: int = 64,
    prune_threshold: float = PRUNED,
) -> dict[str, float]:
    """Return the accuracy of the majority-vote classifier from the least varying unit to the fixed factor.

    Kim, Mnih: Disentangling by factorising, ICML 2018, section 4 and appendix B. Higher is better. Under half a second.

    Args:
        representation, sampler, random_state: see ``ldm.metrics.common``.
        num_train: votes that the classifier is built from.
        num_eval: votes of the reported accuracy.
        num_variance_estimate: rows (drawn at once) for the variance of each unit over the data set.
        batch_size: rows per vote.
        prune_threshold: standard deviation below which a unit is left out, on the scale of the codes.

    Returns:
        ``train_accuracy`` and ``eval_accuracy`` in [0, 1] (0 if every unit is pruned), ``num_active_dims`` (K, as in
        the reference, 0 if every unit is pruned) and ``num_active_true``, the number of units that are not pruned.

    Raises:
        MetricError: there are fewer than two factors.

    Example:
        >>> from ldm.data.factors import FactorSpace
        >>> space = FactorSpace(("hue", "shape"), (10, 4))
        >>> codes = space.factors_of(np.arange(space.size)).astype(float)
        >>> factor_vae(codes, space, np.random.RandomState(0), num_train=500, num_eval=500)["eval_accuracy"]
        1.0
    """
    common.require_factors(sampler, "FactorVAE")
    lookup = common.as_lookup(representation)
    factors = sampler.sample_factors(num_variance_estimate, random_state)
    rows = sampler.sample_observations_from_factors(factors, random_state)
    variances = np.var(lookup(rows), axis=0, ddof=1)  # (K,)
    active = np.flatnonzero(np.sqrt(variances) >= prune_threshold)
    if active.size == 0:
        return {"train_accuracy": 0.0, "eval_accuracy": 0.0, "num_active_dims": 0, "num_active_true": 0}

    def votes(num: int) -> np.ndarray:
        """Count (F, K) votes of the fixed factor for the *active* unit of least relative variance."""
        counts = np.zeros((sampler.num_factors, len(variances)), dtype=np.int64)
        for block in common.point_blocks(num, batch_size):
            fixed, (rows,) = common.draw_points(sampler, random_state, block, 1, batch_size)
            codes = rearrange(lookup(rows)[:, active], "(p b) k -> p b k", p=block)
            least = np.argmin(np.var(codes, axis=1, ddof=1) / variances[active], axis=1)
            np.add.at(counts, (fixed, least), 1)
        return counts

    train_votes, eval_votes = votes(num_train), votes(num_eval)
    classifier = np.argmax(train_votes, axis=0)  # (K,) factor of each vote column; ties to the first
    columns = np.arange(len(variances))
    return {
        "train_accuracy": float(train_votes[classifier, columns].sum() / train_votes.sum()),
        "eval_accuracy": float(eval_votes[classifier, columns].sum() / eval_votes.sum()),
        "num_active_dims": len(variances),
        "num_active_true": len(active),
    }
