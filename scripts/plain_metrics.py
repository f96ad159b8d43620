"""Direct implementations of the metrics: one draw after the other, every fit with scikit-learn.

``bench_metrics.py`` compares ``ldm.metrics`` with them. They share only the factor space with ``ldm.metrics``, are not
vectorized over points, and use the ``GradientBoostingClassifier`` of scikit-learn for DCI. Each function takes (codes
(N, K), factor space, RandomState, **protocol).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import sqrtm
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score, roc_auc_score
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from ldm.data.factors import FactorSpace

Scores = dict[str, float]


def labelled(codes: np.ndarray, space: FactorSpace, rs: np.random.RandomState, num: int) -> tuple:
    """Draw ``num`` codes and labels, 16 at a time."""
    points, labels = [], []
    while len(points) < num:
        factors = space.sample_factors(min(16, num - len(points)), rs)
        for row, values in zip(space.sample_observations_from_factors(factors, rs), factors):
            points.append(codes[row])
            labels.append(values)
    return np.array(points), np.array(labels)


def in_bins(values: np.ndarray, num_bins: int) -> np.ndarray:
    """Return the histogram bin of each value, by column, counted from 1."""
    binned = np.zeros_like(values)
    for column in range(values.shape[1]):
        edges = np.histogram(values[:, column], num_bins)[1]
        binned[:, column] = np.digitize(values[:, column], edges[:-1])
    return binned


def informations(units: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the mutual information (K, F) in nats."""
    found = np.zeros((units.shape[1], labels.shape[1]))
    for unit in range(units.shape[1]):
        for factor in range(labels.shape[1]):
            found[unit, factor] = mutual_info_score(labels[:, factor], units[:, unit])
    return found


def concentration(rows: np.ndarray) -> float:
    """Return the mean of 1 - entropy of the rows, weighted by their sums; the base is the length of a row."""
    found = 0.0
    for row in rows:
        shares = (row + 1e-11) / np.sum(row + 1e-11)
        found += (1 + np.sum(shares * np.log(shares)) / np.log(len(row))) * row.sum() / rows.sum()
    return float(found)


def beta_vae(codes, space, rs, *, num_train, num_eval, batch_size) -> Scores:
    def points(num: int) -> tuple[np.ndarray, np.ndarray]:
        found, shared = [], []
        for _ in range(num):
            factor = rs.randint(space.num_factors)
            first, second = space.sample_factors(batch_size, rs), space.sample_factors(batch_size, rs)
            second[:, factor] = first[:, factor]
            sides = [codes[space.sample_observations_from_factors(side, rs)] for side in (first, second)]
            found.append(np.mean(np.abs(sides[0] - sides[1]), axis=0))
            shared.append(factor)
        return np.array(found), np.array(shared)

    train = points(num_train)
    model = LogisticRegression(random_state=rs).fit(*train)
    test = points(num_eval)
    return {"train_accuracy": model.score(*train), "eval_accuracy": model.score(*test)}


def factor_vae(codes, space, rs, *, num_train, num_eval, num_variance_estimate, batch_size, prune_threshold) -> Scores:
    variances = np.var(codes[space.sample(num_variance_estimate, rs)[1]], axis=0, ddof=1)
    active = np.sqrt(variances) >= prune_threshold

    def votes(num: int) -> np.ndarray:
        found = np.zeros((space.num_factors, codes.shape[1]), dtype=int)
        for _ in range(num):
            factor = rs.randint(space.num_factors)
            factors = space.sample_factors(batch_size, rs)
            factors[:, factor] = factors[0, factor]
            spread = np.var(codes[space.sample_observations_from_factors(factors, rs)], axis=0, ddof=1)
            found[factor, np.argmin(spread[active] / variances[active])] += 1
        return found

    train = votes(num_train)
    test = votes(num_eval)
    winners, units = train.argmax(axis=0), np.arange(codes.shape[1])
    return {
        "train_accuracy": train[winners, units].sum() / num_train,
        "eval_accuracy": test[winners, units].sum() / num_eval,
    }


def dci(codes, space, rs, *, num_train, num_test, seed=0) -> Scores:
    train_codes, train_labels = labelled(codes, space, rs, num_train)
    test_codes, test_labels = labelled(codes, space, rs, num_test)
    importance, train, test = [], [], []
    for factor in range(space.num_factors):
        model = GradientBoostingClassifier(random_state=seed).fit(train_codes, train_labels[:, factor])
        importance.append(np.abs(model.feature_importances_))
        train.append(model.score(train_codes, train_labels[:, factor]))
        test.append(model.score(test_codes, test_labels[:, factor]))
    return {
        "informativeness_train": np.mean(train),
        "informativeness_test": np.mean(test),
        "disentanglement": concentration(np.array(importance).T),
        "completeness": concentration(np.array(importance)),
    }


def mig(codes, space, rs, *, num_train, num_bins) -> Scores:
    points, labels = labelled(codes, space, rs, num_train)
    ranked = np.sort(informations(in_bins(points, num_bins), labels), axis=0)
    entropies = np.diag(informations(labels, labels))
    return {"discrete_mig": np.mean((ranked[-1] - ranked[-2]) / entropies)}


def sap(codes, space, rs, *, num_train, num_test, continuous_factors) -> Scores:
    train_codes, train_labels = labelled(codes, space, rs, num_train)
    test_codes, test_labels = labelled(codes, space, rs, num_test)
    scores = np.zeros((codes.shape[1], space.num_factors))
    for unit in range(codes.shape[1]):
        for factor in range(space.num_factors):
            if continuous_factors:
                scores[unit, factor] = np.corrcoef(train_codes[:, unit], train_labels[:, factor])[0, 1] ** 2
            else:
                model = LinearSVC(C=0.01, class_weight="balanced", random_state=0)
                model.fit(train_codes[:, [unit]], train_labels[:, factor])
                scores[unit, factor] = model.score(test_codes[:, [unit]], test_labels[:, factor])
    ranked = np.sort(scores, axis=0)
    return {"SAP_score": np.mean(ranked[-1] - ranked[-2])}


def modularity_explicitness(codes, space, rs, *, num_train, num_test, num_bins) -> Scores:
    train_codes, train_labels = labelled(codes, space, rs, num_train)
    test_codes, test_labels = labelled(codes, space, rs, num_test)
    modularity = []
    for row in informations(in_bins(train_codes, num_bins), train_labels) ** 2:
        modularity.append(1 - (row.sum() - row.max()) / (row.max() * (len(row) - 1)) if row.max() else 0.0)
    mean, deviation = train_codes.mean(axis=0), train_codes.std(axis=0)
    train_codes, test_codes = (train_codes - mean) / deviation, (test_codes - mean) / deviation
    areas = []
    for factor in range(space.num_factors):
        model = LogisticRegression().fit(train_codes, train_labels[:, factor])
        for points, labels in ((train_codes, train_labels), (test_codes, test_labels)):
            one_hot = labels[:, [factor]] == model.classes_
            areas.append(roc_auc_score(one_hot, model.predict_proba(points)))
    return {
        "modularity_score": np.mean(modularity),
        "explicitness_score_train": np.mean(areas[::2]),
        "explicitness_score_test": np.mean(areas[1::2]),
    }


def irs(codes, space, rs, *, num_train, batch_size, diff_quantile, num_bins) -> Scores:
    if batch_size != 16:
        raise ValueError("codes are drawn 16 at a time here")
    points, labels = labelled(codes, space, rs, num_train)
    labels = in_bins(labels, num_bins)
    scores, weights = [], []
    for unit in points[:, points.var(axis=0) > 0].T:
        largest = np.max(np.abs(unit - unit.mean()))
        held = []
        for column in labels.T:
            groups = [unit[column == value] for value in np.unique(column)]
            held.append(np.mean([np.percentile(np.abs(group - group.mean()), 100 * diff_quantile) for group in groups]))
        scores.append(1 - min(held) / largest)
        weights.append(largest)
    return {"IRS": np.average(scores, weights=weights)}


def unsupervised(codes, space, rs, *, num_train, num_bins) -> Scores:
    points, _ = labelled(codes, space, rs, num_train)
    covariance = np.cov(points.T)
    distance = 2 * np.trace(covariance)
    distance -= 2 * np.trace(np.real(sqrtm(covariance * np.diag(covariance)[:, None])))
    binned = in_bins(points, num_bins)
    information = informations(binned, binned)
    num_units = len(covariance)
    return {
        "gaussian_total_correlation": 0.5 * (np.sum(np.log(np.diag(covariance))) - np.linalg.slogdet(covariance)[1]),
        "gaussian_wasserstein_correlation": distance,
        "gaussian_wasserstein_correlation_norm": distance / np.trace(covariance),
        "mutual_info_score": (information.sum() - np.trace(information)) / (num_units**2 - num_units),
    }


def med(codes, space, rs, *, num_train, num_test, topk, num_bins) -> Scores:
    train_codes, train_labels = labelled(codes, space, rs, num_train)
    test_codes, test_labels = labelled(codes, space, rs, num_test)
    shares = informations(in_bins(train_codes, num_bins), train_labels)
    shares = shares / shares.sum(axis=0)
    scaler = StandardScaler().fit(train_codes)
    train, test = [], []
    for factor in range(space.num_factors):
        model = LogisticRegression().fit(scaler.transform(train_codes), train_labels[:, factor])
        train.append(model.score(scaler.transform(train_codes), train_labels[:, factor]))
        test.append(model.score(scaler.transform(test_codes), test_labels[:, factor]))
    kept: dict[int, list[int]] = {factor: [] for factor in range(space.num_factors)}
    for unit in sorted(range(len(shares)), key=lambda unit: -concentration(shares[[unit]])):
        owner = int(shares[unit].argmax())
        if len(kept[owner]) < topk:
            kept[owner].append(unit)
    best = shares[sorted(sum(kept.values(), []))]
    return {
        "informativeness_train": np.mean(train),
        "informativeness_test": np.mean(test),
        "disentanglement": concentration(shares),
        "completeness": concentration(shares.T),
        f"top{topk}_disentanglement": concentration(best),
        f"top{topk}_completeness": concentration(best.T),
    }


PLAIN: dict[str, Callable[..., Scores]] = {
    function.__name__: function
    for function in (beta_vae, dci, mig, factor_vae, sap, modularity_explicitness, irs, unsupervised, med)
}
