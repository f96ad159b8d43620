"""DCI with regressions of factor values (lasso, random forest, boosted trees), for factors that are quantities."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from ldm.metrics import common
from ldm.metrics.common import FactorSampler, MetricError, Representation
from ldm.metrics.dci import scores_from_importances
from ldm.metrics.regression.r2 import explained
from ldm.metrics.sampling.continuous import quantity_codes


def dci_regression(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    factor: int | None = None,
    *,
    num_train: int = 10000,
    num_test: int = 5000,
    regressor: str = "lasso",
) -> dict[str, Any]:
    """Return the DCI scores from regressions instead of classifications of the factors.

    Eastwood, Williams: A framework for the quantitative evaluation of disentangled representations, ICLR 2018, where
    importances are the absolute weights of a lasso or the importances of a random forest (authors' code:
    cianeastwood/qedr). Codes and factors (quantities, see ``ldm.metrics.sampling.continuous.quantities``) are scaled
    to deviation 1. Scores are computed from importances as in ``dci``, which weights factors by their importance in
    completeness; informativeness is R2 instead of the error. Higher is better. A second with lasso, with trees 1
    (forest) to 5 seconds (boosted) per factor.

    Args:
        representation, sampler, random_state: see ``ldm.metrics.common``.
        factor: number of a factor, to return only its part for ``ldm.metrics.dci.scores_from_importances``.
        num_train: labelled codes that the regressions are fitted on.
        num_test: labelled codes of ``informativeness_test``.
        regressor: "lasso" (penalty chosen in five folds), "forest" (ten trees) or "boosted" (100 trees of depth 3).

    Returns:
        ``disentanglement`` and ``completeness`` in [0, 1]; ``informativeness_train`` and ``informativeness_test``, the
        mean R2 over factors, at most 1.

    Raises:
        MetricError: fewer than two factors or units, a factor takes a single value, or an unknown regressor.
    """
    common.require_factors(sampler, "DCI")
    sample = quantity_codes(representation, sampler, num_train, num_test, random_state, "DCI")
    common.require_units(sample[0], "DCI")
    if factor is not None:
        return _importance(*sample, factor, regressor)
    return scores_from_importances([_importance(*sample, each, regressor) for each in range(sampler.num_factors)])


def _importance(
    codes: np.ndarray, values: np.ndarray, test_codes: np.ndarray, test_values: np.ndarray, factor: int, regressor: str
) -> dict[str, Any]:
    """Return importances and R2 of one factor, as plain numbers; see ``ldm.metrics.dci.factor_importance``."""
    from sklearn.ensemble import GradientBoostingRegressor, RandomForestRegressor
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LassoCV

    models = {
        "lasso": LassoCV(),
        "forest": RandomForestRegressor(n_estimators=10, random_state=0),
        "boosted": GradientBoostingRegressor(random_state=0),
    }
    if regressor not in models:
        raise MetricError(f"regressor: expected one of {', '.join(models)}; got {regressor!r}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = models[regressor].fit(codes, values[:, factor])
    importance = np.abs(model.coef_ if regressor == "lasso" else model.feature_importances_)
    train = explained(values[:, [factor]], model.predict(codes))[0]
    test = explained(test_values[:, [factor]], model.predict(test_codes))[0]
    return {"importance": importance.tolist(), "train_accuracy": float(train), "test_accuracy": float(test)}
