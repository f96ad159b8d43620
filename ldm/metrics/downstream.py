"""Tasks that use a representation: prediction of factors from few labels, from fewer units, and fairness."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ldm.metrics import common
from ldm.metrics.common import FactorSampler, MetricError, Representation
from ldm.util import did_you_mean

if TYPE_CHECKING:
    from ldm.metrics.boosting.classifier import BoostedTrees

Predict = Callable[[np.ndarray], np.ndarray]  # codes (m, K) -> labels (m,)
Fit = Callable[[np.ndarray, np.ndarray], Predict]  # codes (n, K), labels (n,) -> predictor
NUM_FOLDS = 5


def downstream_task(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: Sequence[int] = (10, 100, 1000, 10000),
    num_test: int = 5000,
    predictor: str = "logistic_regression_cv",
) -> dict[str, float]:
    """Return how well each factor is predicted from the codes, for several numbers of labelled examples.

    Locatello et al.: Challenging common assumptions in the unsupervised learning of disentangled representations,
    ICML 2019, section 5.5. Higher is better. Minutes with logistic regressions, seconds with boosted trees.

    Args:
        representation, sampler, random_state: see ``ldm.metrics.common``.
        num_train: sizes of the training samples, drawn independently.
        num_test: labelled codes of the test accuracies, drawn for each size.
        predictor: "logistic_regression_cv" (ten strengths, five folds) or "gradient_boosting_classifier".

    Returns:
        For each size n: ``n:mean_train_accuracy``, ``n:mean_test_accuracy``, ``n:min_train_accuracy``,
        ``n:min_test_accuracy`` over the factors, and ``n:train_accuracy_factor_i``, ``n:test_accuracy_factor_i``;
        all in [0, 1].

    Raises:
        MetricError: the predictor is unknown, or there are fewer than five training examples.
    """
    fit = _predictor(predictor, num_train)
    scores: dict[str, float] = {}
    for size in num_train:
        sample = common.train_test_codes(representation, sampler, size, num_test, random_state)
        train, test = _accuracies(fit, *sample).T  # (F,) each
        for name, accuracies in (("train", train), ("test", test)):
            scores[f"{size}:mean_{name}_accuracy"] = float(np.mean(accuracies))
            scores[f"{size}:min_{name}_accuracy"] = float(np.min(accuracies))
            scores |= {f"{size}:{name}_accuracy_factor_{i}": float(one) for i, one in enumerate(accuracies)}
    return scores


def reduced_downstream_task(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_factors_to_remove: int = 1,
    num_train: Sequence[int] = (10, 100, 1000, 10000),
    num_test: int = 5000,
    predictor: str = "logistic_regression_cv",
) -> dict[str, float]:
    """Return ``downstream_task`` without the most informative units of one factor, for each factor in turn.

    In a disentangled representation this factor becomes unpredictable and the others do not. Units are removed one by
    one, each time the one of largest importance to boosted trees, as in DCI. It costs F times as much.

    Args:
        representation, sampler, random_state: see ``ldm.metrics.common``.
        num_factors_to_remove: number of units to remove.
        num_train: sizes of the training samples.
        num_test: labelled codes of the test accuracies.
        predictor: see ``downstream_task``.

    Returns:
        For each size n and factor i: ``n:reduced_factor_i:mean_{train,test}_accuracy_reduced_factor`` (factor i
        itself), ``..._non_reduced_factor`` (mean of the others), ``..._factor_j`` (each), and over all i
        ``n:mean_{train,test}_accuracy_reduced_factor`` and ``n:mean_{train,test}_accuracy_other_factors``.

    Raises:
        MetricError: there are fewer than two factors, not enough units to remove, or the predictor is unknown.
    """
    num_factors = common.require_factors(sampler, "the reduced downstream task")
    fit = _predictor(predictor, num_train)
    scores: dict[str, float] = {}
    for size in num_train:
        sample = common.train_test_codes(representation, sampler, size, num_test, random_state)
        train, labels, test, test_labels = sample
        means = []
        for factor in range(num_factors):
            kept = _less_informed(train, labels[:, factor], num_factors_to_remove)
            accuracies = _accuracies(fit, train[:, kept], labels, test[:, kept], test_labels)
            others = np.delete(accuracies, factor, axis=0).mean(axis=0)
            means.append([accuracies[factor], others])
            prefix = f"{size}:reduced_factor_{factor}:mean"
            for side, name in enumerate(("train", "test")):
                scores[f"{prefix}_{name}_accuracy_reduced_factor"] = float(accuracies[factor, side])
                scores[f"{prefix}_{name}_accuracy_non_reduced_factor"] = float(others[side])
                for i, accuracy in enumerate(accuracies[:, side]):
                    scores[f"{prefix}_{name}_accuracy_factor_{i}"] = float(accuracy)
        for column, group in enumerate(("reduced_factor", "other_factors")):
            for side, name in enumerate(("train", "test")):
                scores[f"{size}:mean_{name}_accuracy_{group}"] = float(np.mean(np.array(means)[:, column, side]))
    return scores


def fairness(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_test_points_per_class: int = 100,
    predictor: str = "gradient_boosting_classifier",
) -> dict[str, float]:
    """Return how much predictions of one factor change when another (sensitive) factor is set to each of its values.

    Locatello et al.: On the fairness of disentangled representations, NeurIPS 2019, section 4. The distance is the
    total variation between the predictions at one value of the sensitive factor and those at all. *Lower* is better.

    Args:
        representation, sampler, random_state: see ``ldm.metrics.common``. If combinations of factors are missing, a
            factor is set by drawing rows with the value.
        num_train: labelled codes that the predictors are fitted on.
        num_test_points_per_class: images per value of the sensitive factor.
        predictor: see ``downstream_task``.

    Returns:
        With ``mean_fairness`` (mean over the sensitive factor's values) and ``max_fairness`` (their largest) as
        prefix p: ``p:pred{i}:sens{j}``, its means and maxima over j (``p:pred{i}:mean_sens``, ``..:max_sens``), over
        i (``p:sens{j}:mean_pred``, ``..:max_pred``), and of those again (``p:mean_sens:mean_pred`` and the seven
        other combinations). The paper's figure is ``mean_fairness:mean_pred:mean_sens``. All in [0, 1].

    Raises:
        MetricError: there are fewer than two factors, or the predictor is unknown.
    """
    num_factors = common.require_factors(sampler, "fairness")
    fit = _predictor(predictor, [num_train])
    codes, labels = common.factor_codes(representation, sampler, num_train, random_state)
    lookup, sizes = common.as_lookup(representation), sampler.factors_num_values
    distances = np.zeros((2, num_factors, num_factors))  # mean and largest; predicted; sensitive
    for predicted in range(num_factors):
        predict = fit(codes, labels[:, predicted])
        for sensitive in np.delete(np.arange(num_factors), predicted).tolist():
            counts = np.zeros((sizes[predicted], sizes[sensitive]), dtype=np.int64)
            factors = sampler.sample_factors(num_test_points_per_class, random_state)
            for value in range(sizes[sensitive]):
                changed = common.hold_fixed(sampler, factors, sensitive, value, random_state)
                rows = sampler.sample_observations_from_factors(changed, random_state)
                counts[:, value] = np.bincount(predict(lookup(rows)), minlength=sizes[predicted])
            distances[:, predicted, sensitive] = group_distances(counts)
    return _fairness_scores("mean_fairness", distances[0]) | _fairness_scores("max_fairness", distances[1])


def group_distances(counts: np.ndarray) -> tuple[float, float]:
    """Return the mean and largest total variation distance of groups from the whole.

    Args:
        counts: (C, G) predictions of each of C classes in each of G groups.
    """
    sizes = counts.sum(axis=0)
    overall = counts.sum(axis=1) / counts.sum()
    distances = np.abs(counts / sizes - overall[:, None]).sum(axis=0) / 2
    return float(np.average(distances, weights=sizes)), float(distances.max())


def _fairness_scores(prefix: str, distances: np.ndarray) -> dict[str, float]:
    """Return every distance (F, F) by name, and all means and maxima of means and maxima."""
    summaries = {"mean": np.mean, "max": np.max}
    num_factors = len(distances)
    pairs = itertools.permutations(range(num_factors), 2)
    scores = {f"{prefix}:pred{i}:sens{j}": float(distances[i, j]) for i, j in pairs}
    for axis, (over, each) in enumerate((("pred", "sens"), ("sens", "pred"))):  # axis 0 runs over predicted factors
        lines = [np.delete(np.moveaxis(distances, axis, -1)[number], number) for number in range(num_factors)]
        inner = {name: [float(summary(line)) for line in lines] for name, summary in summaries.items()}
        for name, values in inner.items():
            scores |= {f"{prefix}:{each}{number}:{name}_{over}": value for number, value in enumerate(values)}
            for outer, summary in summaries.items():
                scores[f"{prefix}:{outer}_{each}:{name}_{over}"] = float(summary(values))
    return scores


def _accuracies(
    fit: Fit, train_codes: np.ndarray, train_labels: np.ndarray, test_codes: np.ndarray, test_labels: np.ndarray
) -> np.ndarray:
    """Return training and test accuracy of the predictor of each factor, (F, 2)."""
    accuracies = []
    for train, test in zip(train_labels.T, test_labels.T):
        predict = fit(train_codes, train)
        accuracies.append((np.mean(predict(train_codes) == train), np.mean(predict(test_codes) == test)))
    return np.array(accuracies)


def _less_informed(codes: np.ndarray, labels: np.ndarray, num_removed: int) -> np.ndarray:
    """Return the units that remain after ``num_removed`` times removing the most important one for the labels."""
    if codes.shape[1] <= num_removed:
        raise MetricError(
            f"the reduced downstream task: expected more than {num_removed} units to remove from, got {codes.shape[1]}."
        )
    kept = np.arange(codes.shape[1])
    for _ in range(num_removed):
        most = 0
        if (labels != labels[0]).any():  # no unit is informative about a factor with one value
            most = int(_boosted_trees(codes[:, kept], labels).importances.argmax())
        kept = np.delete(kept, most)
    return kept


def _predictor(name: str, sizes: Sequence[int]) -> Fit:
    """Return the function that fits a predictor; samples with a single label give a constant predictor."""
    fits: dict[str, Fit] = {
        "logistic_regression_cv": _fit_logistic_cv,
        "gradient_boosting_classifier": lambda codes, labels: _boosted_trees(codes, labels).predict,
    }
    if name not in fits:
        raise MetricError(f"predictor: expected one of {', '.join(fits)}; got {name!r}.{did_you_mean(name, fits)}")
    if min(sizes) < NUM_FOLDS:
        raise MetricError(f"num_train: expected at least {NUM_FOLDS} examples, one per fold; got {min(sizes)}.")

    def fit(codes: np.ndarray, labels: np.ndarray) -> Predict:
        if (labels == labels[0]).all():
            return lambda others: np.full(len(others), labels[0])
        return fits[name](codes, labels)

    return fit


def _boosted_trees(codes: np.ndarray, labels: np.ndarray) -> BoostedTrees:
    from ldm.metrics.boosting.classifier import fit_boosted_trees, sort_codes  # imports numba

    return fit_boosted_trees(sort_codes(codes), labels)


def _fit_logistic_cv(codes: np.ndarray, labels: np.ndarray) -> Predict:
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import KFold

    with warnings.catch_warnings():
        # the protocol takes 100 iterations, converged or not; other warnings announce changes in later releases
        warnings.simplefilter("ignore")
        return LogisticRegressionCV(Cs=10, cv=KFold(n_splits=NUM_FOLDS), scoring="accuracy").fit(codes, labels).predict
