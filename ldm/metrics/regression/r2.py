"""R2: share of the variance of each factor that regressions from all units explain on held-out rows."""

from __future__ import annotations

import numpy as np

from ldm.metrics.common import FactorSampler, MetricError, Representation
from ldm.metrics.sampling.continuous import quantity_codes

PENALTIES = (1.0, 0.1, 0.01, 0.001)  # of the kernel regression
NUM_FOLDS = 3


def r2(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_test: int = 5000,
    num_kernel: int = 2000,
) -> dict[str, float]:
    """Return ``r2_linear`` and ``r2_kernel``, of linear and of kernel ridge regression, mean over factors.

    Identifiability up to linear and nonlinear maps, as in von Kuegelgen et al.: Self-supervised learning with data
    augmentations provably isolates content from style, NeurIPS 2021 (authors' code: ysharma1126/ssl_identifiability,
    ``disentanglement_utils.py``). Codes and factors (quantities, see ``ldm.metrics.sampling.continuous.quantities``)
    are scaled to deviation 1. The linear regression has the penalty 1; the kernel is Gaussian with gamma = 1 / K, and
    its penalty is chosen in three folds, as there (where gamma is chosen, too). At most 1, higher is better, below 0
    if predictions are worse than the mean. It does not depend on which unit contains a factor. Two seconds.

    Args:
        representation, sampler, random_state: see ``ldm.metrics.common``.
        num_train: labelled codes that the linear regression is fitted on.
        num_test: labelled codes of the score.
        num_kernel: how many different training codes the kernel regression is fitted on; copies of a row would be in
            several folds.

    Raises:
        MetricError: a factor takes a single value, or there are fewer than six different training codes.
    """
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV

    sample = quantity_codes(representation, sampler, num_train, num_test, random_state, "R2")
    codes, values, test_codes, test_values = sample
    linear = Ridge(alpha=1.0).fit(codes, values)
    rows = np.sort(np.unique(np.hstack([codes, values]), axis=0, return_index=True)[1])[:num_kernel]
    if len(rows) < 2 * NUM_FOLDS:
        raise MetricError(
            f"R2: expected at least {2 * NUM_FOLDS} different training rows, got {len(rows)}. Add images."
        )
    kernel = GridSearchCV(KernelRidge(kernel="rbf"), {"alpha": PENALTIES}, cv=NUM_FOLDS).fit(codes[rows], values[rows])
    scores = {"r2_linear": linear, "r2_kernel": kernel}
    return {name: float(explained(test_values, model.predict(test_codes)).mean()) for name, model in scores.items()}


def explained(values: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return 1 - squared error / variance of each column of (n, F), (F,); 0 for a column that does not vary."""
    varies = (values != values[0]).any(axis=0)
    error = np.square(values - predicted.reshape(values.shape)).mean(axis=0)
    return np.where(varies, 1.0 - error / np.where(varies, values.var(axis=0), 1.0), 0.0)
