"""Tasks a representation is used for: predicting factors from few labels, from less of it, and fairly.

Run only when asked for by name (``EXTRA_METRICS``): the logistic regressions of the full protocol take minutes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ldm.metrics.common import (
    FactorSampler,
    MetricError,
    Representation,
    as_lookup,
    factor_codes,
    hold_fixed,
    require_factors,
)
from ldm.util import did_you_mean

if TYPE_CHECKING:
    from ldm.metrics.boosting.classifier import BoostedTrees

Predict = Callable[[np.ndarray], np.ndarray]  # codes (m, K) -> labels (m,)
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
    """How well each factor is predicted from the codes, for several numbers of labelled examples.

    Locatello et al.: Challenging common assumptions in the unsupervised learning of disentangled representations,
    ICML 2019, section 5.5. Higher is better. Minutes with logistic regressions, seconds with boosted trees.

    Args:
        representation: (N, K) codes of the whole data set, or a function of row indices.
        sampler: the data set's factors.
        random_state: fresh generator; published scores use seed 0.
        num_train: sizes of the training samples, each drawn anew.
        num_test: labelled codes of the test accuracies, drawn anew for each size.
        predictor: "logistic_regression_cv" (ten strengths, five folds) or "gradient_boosting_classifier".

    Returns:
        For each size n: ``n:mean_train_accuracy``, ``n:mean_test_accuracy``, ``n:min_train_accuracy``,
        ``n:min_test_accuracy`` over the factors, and ``n:train_accuracy_factor_i``, ``n:test_accuracy_factor_i``;
        all in [0, 1].

    Raises:
        MetricError: unknown predictor, or fewer than five training examples.
    """
    fit = _predictor(predictor, num_train)
    scores: dict[str, float] = {}
    for size in num_train:
        sample = _draw(representation, sampler, random_state, size, num_test)
        train, test = np.array(_accuracies(fit, *sample)).T  # (F,) each
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
    """``downstream_task`` without the units that know most of one factor, for each factor in turn.

    Of a disentangled representation the factor in question becomes unpredictable and the others stay. The units
    are taken away one by one, each time the one of largest importance to boosted trees, as in DCI. F times the cost.

    Args:
        representation: (N, K) codes of the whole data set, or a function of row indices.
        sampler: the data set's factors.
        random_state: fresh generator; published scores use seed 0.
        num_factors_to_remove: units taken away.
        num_train: sizes of the training samples.
        num_test: labelled codes of the test accuracies.
        predictor: see ``downstream_task``.

    Returns:
        For each size n and factor i: ``n:reduced_factor_i:mean_{train,test}_accuracy_reduced_factor`` (factor i
        itself), ``..._non_reduced_factor`` (mean of the others), ``..._factor_j`` (each), and over all i
        ``n:mean_{train,test}_accuracy_reduced_factor`` and ``n:mean_{train,test}_accuracy_other_factors``.

    Raises:
        MetricError: fewer than two factors, no more units than are to be taken away, unknown predictor.
    """
    num_factors = require_factors(sampler, "the reduced downstream task")
    fit = _predictor(predictor, num_train)
    scores: dict[str, float] = {}
    for size in num_train:
        sample = _draw(representation, sampler, random_state, size, num_test)
        means = []
        for factor in range(num_factors):
            kept = _less_informed(sample[0], sample[1][:, factor], num_factors_to_remove)
            accuracies = np.array(_accuracies(fit, sample[0][:, kept], sample[1], sample[2][:, kept], sample[3]))
            others = np.delete(accuracies, factor, axis=0).mean(axis=0)
            means.append([accuracies[factor], others])
            scores |= _reduced_scores(f"{size}:reduced_factor_{factor}:", accuracies, factor, others)
        for column, which in enumerate(("reduced_factor", "other_factors")):
            for side, name in enumerate(("train", "test")):
                scores[f"{size}:mean_{name}_accuracy_{which}"] = float(np.mean(np.array(means)[:, column, side]))
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
    """How much predictions of one factor change when another, which should not matter, is set to each of its values.

    Locatello et al.: On the fairness of disentangled representations, NeurIPS 2019, section 4. The distance is the
    total variation between the predictions at one value of the sensitive factor and those at all. *Lower* is better.

    Args:
        representation: (N, K) codes of the whole data set, or a function of row indices.
        sampler: the data set's factors. In a table that lacks combinations, setting a factor means looking at the
            rows that have the value.
        random_state: fresh generator; published scores use seed 0.
        num_train: labelled codes the predictors are fitted on.
        num_test_points_per_class: images per value of the sensitive factor.
        predictor: see ``downstream_task``.

    Returns:
        With ``mean_fairness`` (mean over the sensitive factor's values) and ``max_fairness`` (their largest) as
        prefix p: ``p:pred{i}:sens{j}``, its means and maxima over j (``p:pred{i}:mean_sens``, ``..:max_sens``), over
        i (``p:sens{j}:mean_pred``, ``..:max_pred``), and of those again (``p:mean_sens:mean_pred`` and the seven
        other combinations). The paper's figure is ``mean_fairness:mean_pred:mean_sens``. All in [0, 1].

    Raises:
        MetricError: fewer than two factors, or unknown predictor.
    """
    num_factors = require_factors(sampler, "fairness")
    fit = _predictor(predictor, [num_train])
    codes, labels = factor_codes(representation, sampler, num_train, random_state)
    distances = np.zeros((2, num_factors, num_factors))  # mean and largest; predicted; sensitive
    for predicted in range(num_factors):
        predict = fit(codes, labels[:, predicted])
        for sensitive in range(num_factors):
            if sensitive != predicted:
                counts = _intervene(
                    predict, representation, sampler, random_state, predicted, sensitive, num_test_points_per_class
                )
                distances[:, predicted, sensitive] = group_distances(counts)
    return _fairness_scores("mean_fairness", distances[0]) | _fairness_scores("max_fairness", distances[1])


def group_distances(counts: np.ndarray) -> tuple[float, float]:
    """Mean and largest total variation distance of groups from all.

    Args:
        counts: (C, G) predictions of each of C classes in each of G groups.
    """
    sizes = counts.sum(axis=0)
    overall = counts.sum(axis=1) / counts.sum()
    distances = np.abs(counts / sizes - overall[:, None]).sum(axis=0) / 2
    return float(np.average(distances, weights=sizes)), float(distances.max())


def _intervene(
    predict: Predict,
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    predicted: int,
    sensitive: int,
    num: int,
) -> np.ndarray:
    """Counts of predictions (values of ``predicted``, values of ``sensitive``), the same images but for the latter."""
    lookup, sizes = as_lookup(representation), sampler.factors_num_values
    counts = np.zeros((sizes[predicted], sizes[sensitive]), dtype=np.int64)
    factors = sampler.sample_factors(num, random_state)
    for value in range(sizes[sensitive]):
        changed = hold_fixed(sampler, factors, sensitive, value, random_state)
        rows = sampler.sample_observations_from_factors(changed, random_state)
        counts[:, value] = np.bincount(predict(lookup(rows)), minlength=sizes[predicted])
    return counts


def _fairness_scores(prefix: str, distances: np.ndarray) -> dict[str, float]:
    """Every distance (F, F) by name, and all means and maxima of means and maxima."""
    summaries = {"mean": np.mean, "max": np.max}
    num_factors = len(distances)
    pairs = [(i, j) for i in range(num_factors) for j in range(num_factors) if i != j]
    scores = {f"{prefix}:pred{i}:sens{j}": float(distances[i, j]) for i, j in pairs}
    for axis, (over, each) in enumerate((("pred", "sens"), ("sens", "pred"))):  # axis 0 runs over predicted factors
        lines = [np.delete(np.moveaxis(distances, axis, -1)[number], number) for number in range(num_factors)]
        inner = {name: [float(summary(line)) for line in lines] for name, summary in summaries.items()}
        for name, values in inner.items():
            scores |= {f"{prefix}:{each}{number}:{name}_{over}": value for number, value in enumerate(values)}
            for outer, summary in summaries.items():
                scores[f"{prefix}:{outer}_{each}:{name}_{over}"] = float(summary(values))
    return scores


def _draw(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    size: int,
    num_test: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training codes and labels, test codes and labels."""
    train = factor_codes(representation, sampler, size, random_state)
    return *train, *factor_codes(representation, sampler, num_test, random_state)


def _accuracies(
    fit: Callable[[np.ndarray, np.ndarray], Predict],
    train_codes: np.ndarray,
    train_labels: np.ndarray,
    test_codes: np.ndarray,
    test_labels: np.ndarray,
) -> list[tuple[float, float]]:
    """Training and test accuracy of each factor's predictor."""
    accuracies = []
    for train, test in zip(train_labels.T, test_labels.T):
        predict = fit(train_codes, train)
        accuracies.append((np.mean(predict(train_codes) == train), np.mean(predict(test_codes) == test)))
    return accuracies


def _reduced_scores(prefix: str, accuracies: np.ndarray, factor: int, others: np.ndarray) -> dict[str, float]:
    """One reduced factor's entries, from accuracies (F, 2) and their mean (2,) over the other factors."""
    scores = {}
    for side, name in enumerate(("train", "test")):
        scores[f"{prefix}mean_{name}_accuracy_reduced_factor"] = float(accuracies[factor, side])
        scores[f"{prefix}mean_{name}_accuracy_non_reduced_factor"] = float(others[side])
        for i, accuracy in enumerate(accuracies[:, side]):
            scores[f"{prefix}mean_{name}_accuracy_factor_{i}"] = float(accuracy)
    return scores


def _less_informed(codes: np.ndarray, labels: np.ndarray, num_removed: int) -> np.ndarray:
    """The units left when the most important one for the labels is taken away ``num_removed`` times."""
    if codes.shape[1] <= num_removed:
        raise MetricError(
            f"the reduced downstream task takes away {num_removed} units, and this representation has {codes.shape[1]}."
        )
    kept = np.arange(codes.shape[1])
    for _ in range(num_removed):
        most = 0
        if (labels != labels[0]).any():  # of a factor that shows one value no unit knows more than another
            most = int(_boosted_trees(codes[:, kept], labels).importances.argmax())
        kept = np.delete(kept, most)
    return kept


def _predictor(name: str, sizes: Sequence[int]) -> Callable[[np.ndarray, np.ndarray], Predict]:
    """The function that fits a predictor; a sample that shows one label only is answered with that label."""
    fits = {"logistic_regression_cv": _fit_logistic_cv, "gradient_boosting_classifier": _fit_boosted}
    if name not in fits:
        raise MetricError(f"unknown predictor {name!r}; known: {', '.join(fits)}.{did_you_mean(name, fits)}")
    if min(sizes) < NUM_FOLDS:
        raise MetricError(f"predictors need at least {NUM_FOLDS} examples, one for each fold; found {min(sizes)}.")

    def fit(codes: np.ndarray, labels: np.ndarray) -> Predict:
        if (labels == labels[0]).all():
            return lambda others: np.full(len(others), labels[0])
        return fits[name](codes, labels)

    return fit


def _boosted_trees(codes: np.ndarray, labels: np.ndarray) -> BoostedTrees:
    from ldm.metrics.boosting.classifier import fit_boosted_trees, sort_codes  # late: loads numba

    return fit_boosted_trees(sort_codes(codes), labels)


def _fit_boosted(codes: np.ndarray, labels: np.ndarray) -> Predict:
    return _boosted_trees(codes, labels).predict


def _fit_logistic_cv(codes: np.ndarray, labels: np.ndarray) -> Predict:
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import KFold

    with warnings.catch_warnings():
        # 100 iterations are the protocol's, converged or not; other warnings are of changes in later releases
        warnings.simplefilter("ignore")
        return LogisticRegressionCV(Cs=10, cv=KFold(n_splits=NUM_FOLDS), scoring="accuracy").fit(codes, labels).predict
