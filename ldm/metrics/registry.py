"""Registry of the metrics: function, names, direction and protocol settings of each, in one entry.

Tables, score files, training logs and checkpoint monitors read this registry. To add a metric, write its function in a
file of its own and add an entry to ``METRICS``; metrics outside this package are registered by dotted path
(``metric_from_path``). Importing this module does not load scikit-learn or numba; the metrics that need them do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ldm.metrics.beta_vae import beta_vae
from ldm.metrics.dci import dci, dci_factor, scores_from_importances
from ldm.metrics.downstream import downstream_task, fairness, reduced_downstream_task
from ldm.metrics.factor_vae import factor_vae
from ldm.metrics.information.gaps import dcimig, jemmig, mig_sup
from ldm.metrics.information.infomec import infomec
from ldm.metrics.irs import irs
from ldm.metrics.med import med
from ldm.metrics.mig import mig
from ldm.metrics.modularity_explicitness import modularity_explicitness
from ldm.metrics.regression.dci_es import DEPTHS, dci_es, dci_es_scores
from ldm.metrics.regression.dci_regression import dci_regression
from ldm.metrics.regression.mcc import mcc
from ldm.metrics.regression.r2 import r2
from ldm.metrics.sap import sap
from ldm.metrics.unsupervised import unsupervised
from ldm.util import ConfigError, get_obj_from_str


@dataclass(frozen=True)
class Metric:
    """One metric, its names and its protocol settings.

    Attributes:
        key: name in score files.
        function: ``(representation, sampler, random_state, **protocol) -> dict``.
        figure: key of that dict whose value tables, papers and logs show.
        protocol: keyword arguments of the published protocol.
        heading: heading of ``figure`` in tables and charts; empty means ``key``.
        column: position of ``figure`` in tables, in ascending order; equal positions keep the order of the registry.
        higher_is_better: direction of ``figure``.
        logged: name of ``figure`` in training logs, after ``val/``; empty means ``key`` in lower case.
        aliases: further names under which training code logs results of this metric.
        fast: arguments of protocol ``fast`` that differ from ``protocol``.
        seconds: estimated seconds on one core, given (number of units, values of a factor); longest jobs start first.
        part: share of one factor, ``(representation, sampler, random_state, factor, **protocol) -> dict``, for a
            metric that is slow enough to be computed factor by factor in several processes.
        join: combines the parts of all factors, in factor order, into the metric's dict.
        reduce: whether vectors per unit, (N, U, D), are reduced to one number each, (N, U), before scoring; if not,
            each of their numbers is a unit, (N, U * D).
    """

    key: str
    function: Callable[..., dict[str, float]]
    figure: str
    protocol: Mapping[str, Any] = field(default_factory=dict)
    heading: str = ""
    column: int = 5
    higher_is_better: bool = True
    logged: str = ""
    aliases: tuple[str, ...] = ()
    fast: Mapping[str, Any] = field(default_factory=dict)
    seconds: Callable[[int, int], float] = lambda units, values: 1.0
    part: Callable[..., dict[str, Any]] | None = None
    join: Callable[[Sequence[dict[str, Any]]], dict[str, float]] | None = None
    reduce: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "heading", self.heading or self.key)
        object.__setattr__(self, "logged", self.logged or self.key.lower())


METRICS: dict[str, Metric] = {
    "beta_vae": Metric(
        "beta_VAE",
        beta_vae,
        "eval_accuracy",
        {"num_train": 10000, "num_eval": 5000, "batch_size": 64},
        heading="beta-VAE",
        column=4,
        aliases=("beta_vae_score", "beta_vae_sklearn"),
        fast={"num_train": 2000, "num_eval": 1000},
    ),
    "dci": Metric(
        "dci",
        dci,
        "disentanglement",
        {"num_train": 10000, "num_test": 5000},
        heading="DCI",
        column=2,
        logged="dci_disentanglement",
        aliases=("dci_completeness", "dci_informativeness", "dci_informativeness_train", "dci_informativeness_test"),
        fast={"num_train": 2000, "num_test": 1000},
        seconds=lambda units, values: (0.015 + 0.002 * units) * values,
        part=dci_factor,
        join=scores_from_importances,
    ),
    "mig": Metric(
        "MIG",
        mig,
        "discrete_mig",
        {"num_train": 10000, "num_bins": 20},
        column=3,
        aliases=("mig_score",),
        fast={"num_train": 2000},
        seconds=lambda units, values: 0.1,
    ),
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
        heading="FactorVAE",
        column=1,
        logged="factor_vae_score",
        aliases=("factor_vae_metric",),
        fast={"num_train": 2000, "num_eval": 1000, "num_variance_estimate": 2000},
    ),
    "sap": Metric(
        "SAP",
        sap,
        "SAP_score",
        {"num_train": 10000, "num_test": 5000, "continuous_factors": False},
        fast={"num_train": 2000, "num_test": 1000},
        seconds=lambda units, values: 0.03 * units,
    ),
    "modularity_explicitness": Metric(
        "modularity_explicitness",
        modularity_explicitness,
        "modularity_score",
        {"num_train": 10000, "num_test": 5000, "num_bins": 20},
        heading="modularity",
        aliases=("modularity", "explicitness_score", "explicitness_score_train", "explicitness_score_test"),
        fast={"num_train": 2000, "num_test": 2000},
    ),
    "irs": Metric(
        "IRS",
        irs,
        "IRS",
        {"num_train": 10000, "batch_size": 16, "diff_quantile": 0.99, "num_bins": 20},
        aliases=("irs_score",),
        fast={"num_train": 2000},
        seconds=lambda units, values: 0.1,
    ),
    "unsupervised": Metric(
        "unsupervised",
        unsupervised,
        "mutual_info_score",
        {"num_train": 10000, "num_bins": 20},
        heading="MI (low)",
        column=6,
        higher_is_better=False,
        aliases=("gaussian_total_correlation", "gaussian_wasserstein_correlation"),
        fast={"num_train": 2000},
        seconds=lambda units, values: 0.1 + 0.0003 * units**2,
    ),
    "med": Metric(
        "MED",
        med,
        "disentanglement",
        {"num_train": 10000, "num_test": 10000, "topk": 2, "num_bins": 20},
        aliases=("med_score",),
        fast={"num_train": 2000, "num_test": 1000},
        seconds=lambda units, values: 1.0 + 0.1 * units,
        reduce=False,
    ),
}


def _gap(key: str, function: Callable[..., dict[str, float]], figure: str, heading: str) -> Metric:
    """Return the entry of a metric that is computed like MIG."""
    mig_entry = METRICS["mig"]
    return Metric(key, function, figure, mig_entry.protocol, heading, fast=mig_entry.fast, seconds=mig_entry.seconds)


def _dci_of(regressor: str, seconds: float) -> Metric:
    """Return the entry of DCI with a regressor that takes some seconds per factor at 20 units."""
    function = partial(dci_regression, regressor=regressor)
    return Metric(
        f"dci_{regressor}",
        function,
        "disentanglement",
        {"num_train": 10000, "num_test": 5000, "regressor": regressor},
        heading=f"DCI {regressor}",
        fast={"num_train": 2000, "num_test": 1000},
        seconds=lambda units, values: seconds * units / 20,
        part=function,
        join=scores_from_importances,
    )


DEFAULT_METRICS: tuple[str, ...] = ("beta_vae", "dci", "mig", "factor_vae")  # what DisDiff's protocol runs

# Run only when requested by name: they take minutes, or are of special interest.
EXTRA_METRICS: dict[str, Metric] = {
    "downstream_task": Metric(
        "downstream_task",
        downstream_task,
        "1000:mean_test_accuracy",
        {"num_train": [10, 100, 1000, 10000], "num_test": 5000, "predictor": "logistic_regression_cv"},
        heading="downstream",
        column=7,
        fast={"num_train": [10, 100, 1000], "num_test": 1000},
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
        heading="reduced downstream",
        column=7,
        fast={"num_train": [10, 100, 1000], "num_test": 1000},
        seconds=lambda units, values: 200.0 * values,
    ),
    "fairness": Metric(
        "fairness",
        fairness,
        "mean_fairness:mean_pred:mean_sens",
        {"num_train": 10000, "num_test_points_per_class": 100, "predictor": "gradient_boosting_classifier"},
        heading="unfairness (low)",
        column=7,
        higher_is_better=False,
        fast={"num_train": 2000},
        seconds=lambda units, values: 0.05 * units * values,
    ),
    "infomec": Metric(
        "InfoMEC",
        infomec,
        "infom",
        {"num_train": 10000, "num_test": 5000, "num_neighbors": 10},
        heading="InfoM",
        aliases=("infoc", "infoe", "infoe_train"),
        fast={"num_train": 2000, "num_test": 1000},
        seconds=lambda units, values: 0.3 + 0.01 * units * values,
    ),
    "mcc": Metric(
        "MCC",
        mcc,
        "mcc",
        {"num_train": 10000, "num_test": 5000},
        aliases=("weak_mcc", "mcc_spearman", "weak_mcc_spearman"),
        fast={"num_train": 2000, "num_test": 1000},
        seconds=lambda units, values: 0.1 + 1e-5 * units**2,
    ),
    "r2": Metric(
        "R2",
        r2,
        "r2_linear",
        {"num_train": 10000, "num_test": 5000, "num_kernel": 2000},
        aliases=("r2_kernel",),
        fast={"num_train": 2000, "num_test": 1000, "num_kernel": 500},
        seconds=lambda units, values: 2.0,
    ),
    "dci_lasso": _dci_of("lasso", 0.2),
    "dci_forest": _dci_of("forest", 1.0),
    "dci_boosted": _dci_of("boosted", 4.0),
    "dci_es": Metric(
        "DCI_ES",
        dci_es,
        "explicitness",
        {"num_train": 10000, "num_test": 5000, "depths": list(DEPTHS), "num_trees": 100},
        heading="DCI-ES",
        fast={"num_train": 2000, "num_test": 1000, "num_trees": 10},
        seconds=lambda units, values: 20.0,
        part=dci_es,
        join=dci_es_scores,
    ),
    "mig_sup": _gap("MIG_sup", mig_sup, "mig_sup", "MIG-sup"),
    "dcimig": _gap("DCIMIG", dcimig, "dcimig", "DCIMIG"),
    "jemmig": _gap("JEMMIG", jemmig, "jemmig_normalized", "JEMMIG"),
}

ALL_METRICS: dict[str, Metric] = {**METRICS, **EXTRA_METRICS}


def metric_from_path(path: str) -> str:
    """Register a metric of a user's own file and return its name.

    Args:
        path: dotted path of a ``Metric``, such as ``my_metric.COMPACTNESS``; its name is its key in lower case.

    Raises:
        ConfigError: the path does not lead to a ``Metric``, or another metric has its name.
    """
    metric = get_obj_from_str(path)
    if not isinstance(metric, Metric):
        raise ConfigError(f"metric {path}: expected an ldm.metrics.Metric, got {type(metric).__name__}.")
    name = metric.key.lower()
    if ALL_METRICS.setdefault(name, metric) is not metric:
        raise ConfigError(f"metric {path}: another metric has the key {metric.key!r}. Choose another key.")
    return name


def monitor_direction(metric_name: str) -> str | None:
    """Return the direction in which a logged disentanglement score improves.

    Args:
        metric_name: name of a logged value, such as ``val/mig``, ``val/dci_disentanglement`` or
            ``val/factor_vae_score``. Text to the last ``/``, a final ``_step`` or ``_epoch`` and case are ignored.

    Returns:
        "max" or "min"; None if the name does not belong to a metric of the registry.

    Example:
        >>> monitor_direction("val/mig"), monitor_direction("val/unsupervised"), monitor_direction("val/rec_loss")
        ('max', 'min', None)
    """
    wanted = re.sub(r"_(step|epoch)$", "", metric_name.rpartition("/")[2].lower())
    for name, metric in ALL_METRICS.items():
        known = (name, metric.key, metric.logged, metric.figure, *metric.aliases)
        if wanted in map(str.lower, known):
            return "max" if metric.higher_is_better else "min"
    return None
