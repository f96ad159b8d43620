"""SAP, separated attribute predictability (Kumar et al., 2018): lead of the best unit over the second best."""

from __future__ import annotations

import numpy as np

from ldm.metrics.common import FactorSampler, Representation, require_units, require_varying, train_test_codes

FLAT = 1e-12  # variance up to which a unit is not informative about a continuous factor


def sap(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_test: int = 5000,
    continuous_factors: bool = False,
) -> dict[str, float]:
    """Return the mean over factors of the gap between the two units that predict the factor best, each by itself.

    Kumar, Sattigeri, Balakrishnan: Variational inference of disentangled latent concepts from unlabeled
    observations, ICLR 2018, section 3. The score of a unit is the test accuracy of a linear support vector machine for
    a discrete factor, its squared correlation with a continuous one. Higher is better. One small fit per unit and
    factor: half a second at 20 units.

    Args:
        representation, sampler, random_state: see ``ldm.metrics.common``.
        num_train: labelled codes that the predictors are fitted on.
        num_test: labelled codes of the accuracy.
        continuous_factors: whether the values of the factors are quantities (not in the published protocol).

    Returns:
        ``SAP_score`` in [0, 1].

    Raises:
        MetricError: there is a single unit, or a factor takes a single value.
    """
    sample = train_test_codes(representation, sampler, num_train, num_test, random_state)
    codes, labels = sample[:2]
    require_units(codes, "SAP")
    require_varying(labels, "SAP")
    scores = squared_correlations(codes, labels) if continuous_factors else single_unit_accuracies(*sample)
    ranked = np.sort(scores, axis=0)  # (K, F)
    return {"SAP_score": float(np.mean(ranked[-1] - ranked[-2]))}


def squared_correlations(codes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the squared correlation of each unit with each factor, (K, F); 0 for a unit that does not vary.

    Args:
        codes: (n, K).
        labels: (n, F), every column varies.
    """
    codes = codes - codes.mean(axis=0, dtype=np.float64)
    labels = labels - labels.mean(axis=0)
    free = len(codes) - 1
    covariance = codes.T @ labels / free
    code_variance, label_variance = np.sum(codes**2, axis=0) / free, np.sum(labels**2, axis=0) / free
    scale = np.outer(code_variance, label_variance)
    return np.where((code_variance > FLAT)[:, None], covariance**2 / np.where(scale > 0, scale, 1.0), 0.0)


def single_unit_accuracies(
    train_codes: np.ndarray, train_labels: np.ndarray, test_codes: np.ndarray, test_labels: np.ndarray
) -> np.ndarray:
    """Return the test accuracy (K, F) of a linear support vector machine from each unit to each factor."""
    from sklearn.svm import LinearSVC

    accuracies = np.empty((train_codes.shape[1], train_labels.shape[1]))
    for unit, factor in np.ndindex(*accuracies.shape):
        # the seed affects only the dual solver, the default before scikit-learn 1.5
        classifier = LinearSVC(C=0.01, class_weight="balanced", random_state=0)
        classifier.fit(train_codes[:, [unit]], train_labels[:, factor])
        accuracies[unit, factor] = np.mean(classifier.predict(test_codes[:, [unit]]) == test_labels[:, factor])
    return accuracies
