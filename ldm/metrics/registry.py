"""What there is to score with: each metric, its name in score files and the protocol's settings.

To add a metric: write its function in a file of its own and add an entry to ``METRICS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ldm.metrics.beta_vae import beta_vae
from ldm.metrics.dci import dci, dci_factor, scores_from_importances
from ldm.metrics.downstream import downstream_task, fairness, reduced_downstream_task
from ldm.metrics.factor_vae import factor_vae
from ldm.metrics.irs import irs
from ldm.metrics.med import med
from ldm.metrics.mig import mig
from ldm.metrics.modularity_explicitness import modularity_explicitness
from ldm.metrics.sap import sap
from ldm.metrics.unsupervised import unsupervised


@dataclass(frozen=True)
class Metric:
    """One metric and how the protocol runs it.

    Attributes:
        key: its name in score files.
        function: ``(representation, sampler, random_state, **protocol) -> dict``.
        figure: the entry of that dict which tables and papers show.
        protocol: keyword arguments of the published protocol.
        seconds: rough cost on one core, ``(number of units, values of a factor) -> s``; longest jobs go first.
        part: one factor's share, ``(representation, sampler, random_state, factor, **protocol) -> dict``, for a
            metric slow enough to be spread over processes factor by factor.
        join: the metric's dict from the parts of all factors, in factor order.
        reduce: whether vectors per unit, (N, U, D), become one number each, (N, U), before they are scored; if not,
            each of their numbers is a unit, (N, U * D).
        higher_is_better: which direction of ``figure`` is the better one.
    """

    key: str
    function: Callable[..., dict[str, float]]
    figure: str
    protocol: Mapping[str, Any] = field(default_factory=dict)
    seconds: Callable[[int, int], float] = lambda units, values: 1.0
    part: Callable[..., dict[str, Any]] | None = None
    join: Callable[[Sequence[dict[str, Any]]], dict[str, float]] | None = None
    reduce: bool = True
    higher_is_better: bool = True


METRICS: dict[str, Metric] = {
    "beta_vae": Metric("beta_VAE", beta_vae, "eval_accuracy", {"num_train": 10000, "num_eval": 5000, "batch_size": 64}),
    "dci": Metric(
        "dci",
        dci,
        "disentanglement",
        {"num_train": 10000, "num_test": 5000},
        seconds=lambda units, values: (0.015 + 0.002 * units) * values,
        part=dci_factor,
        join=scores_from_importances,
    ),
    "mig": Metric("MIG", mig, "discrete_mig", {"num_train": 10000, "num_bins": 20}, seconds=lambda units, values: 0.1),
    "factor_vae": Metric(
        "factor_VAE",
        factor_vae,
        "eval_accuracy",
        {
            "num_train": 10000,
            "num_eval": 5000,
            "num_variance_estimate": 10000,
            "batch_size": 64,
            "prune_threshold": 0.05,
        },
    ),
    "sap": Metric(
        "SAP",
        sap,
        "SAP_score",
        {"num_train": 10000, "num_test": 5000, "continuous_factors": False},
        seconds=lambda units, values: 0.03 * units,
    ),
    "modularity_explicitness": Metric(
        "modularity_explicitness",
        modularity_explicitness,
        "modularity_score",
        {"num_train": 10000, "num_test": 5000, "num_bins": 20},
    ),
    "irs": Metric(
        "IRS",
        irs,
        "IRS",
        {"num_train": 10000, "batch_size": 16, "diff_quantile": 0.99, "num_bins": 20},
        seconds=lambda units, values: 0.1,
    ),
    "unsupervised": Metric(
        "unsupervised",
        unsupervised,
        "mutual_info_score",
        {"num_train": 10000, "num_bins": 20},
        seconds=lambda units, values: 0.1 + 0.0003 * units**2,
        higher_is_better=False,
    ),
    "med": Metric(
        "MED",
        med,
        "disentanglement",
        {"num_train": 10000, "num_test": 10000, "topk": 2, "num_bins": 20},
        seconds=lambda units, values: 1.0 + 0.1 * units,
        reduce=False,
    ),
}

DEFAULT_METRICS: tuple[str, ...] = ("beta_vae", "dci", "mig", "factor_vae")  # what DisDiff's protocol runs

# run only when asked for by name: they take minutes, or are of special interest
EXTRA_METRICS: dict[str, Metric] = {
    "downstream_task": Metric(
        "downstream_task",
        downstream_task,
        "1000:mean_test_accuracy",
        {"num_train": [10, 100, 1000, 10000], "num_test": 5000, "predictor": "logistic_regression_cv"},
        seconds=lambda units, values: 30.0 * values,
    ),
    "reduced_downstream_task": Metric(
        "reduced_downstream_task",
        reduced_downstream_task,
        "1000:mean_test_accuracy_other_factors",
        {
            "num_factors_to_remove": 1,
            "num_train": [10, 100, 1000, 10000],
            "num_test": 5000,
            "predictor": "logistic_regression_cv",
        },
        seconds=lambda units, values: 200.0 * values,
    ),
    "fairness": Metric(
        "fairness",
        fairness,
        "mean_fairness:mean_pred:mean_sens",
        {"num_train": 10000, "num_test_points_per_class": 100, "predictor": "gradient_boosting_classifier"},
        seconds=lambda units, values: 0.05 * units * values,
        higher_is_better=False,
    ),
}
