"""SAP, separated attribute predictability (Kumar et al., 2018): how far is the best unit ahead of the second?"""

from __future__ import annotations

import numpy as np

from ldm.metrics.common import FactorSampler, Representation, factor_codes, require_units, require_varying

FLAT = 1e-12  # units of smaller variance tell nothing of a continuous factor


def sap(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_test: int = 5000,
    continuous_factors: bool = False,
) -> dict[str, float]:
    """Mean over factors of the gap between the two units that predict the factor best, each by itself.

    Kumar, Sattigeri, Balakrishnan: Variational inference of disentangled latent concepts from unlabeled
    observations, ICLR 2018, section 3. Discrete factors are predicted by a linear support vector machine (its test
    accuracy is the unit's score), continuous ones by a line (its squared correlation is). Higher is better. One
    small fit per unit and factor: half a second at 20 units.

    Args:
        representation: (N, K) codes of the whole data set, or a function of row indices.
        sampler: the data set's factors.
        random_state: fresh generator; the published protocol uses seed 0.
        num_train: labelled codes the predictors are fitted on.
        num_test: labelled codes of the accuracy.
        continuous_factors: whether the factors' values are quantities; the published protocol says no.

    Returns:
        ``SAP_score`` in [0, 1].

    Raises:
        MetricError: a single unit, or a factor that takes one value only.
    """
    train_codes, train_labels = factor_codes(representation, sampler, num_train, random_state)
    test_codes, test_labels = factor_codes(representation, sampler, num_test, random_state)
    require_units(train_codes, "SAP")
    require_varying(train_labels, "SAP predicts each factor")
    if continuous_factors:
        scores = squared_correlations(train_codes, train_labels)
    else:
        scores = single_unit_accuracies(train_codes, train_labels, test_codes, test_labels)
    ranked = np.sort(scores, axis=0)  # (K, F)
    return {"SAP_score": float(np.mean(ranked[-1] - ranked[-2]))}


def squared_correlations(codes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Squared correlation of each unit with each factor, (K, F); 0 for a unit that does not vary.

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
    """Test accuracy (K, F) of a linear support vector machine that sees one unit (column) and tells one factor."""
    from sklearn.svm import LinearSVC

    accuracies = np.empty((train_codes.shape[1], train_labels.shape[1]))
    for unit, factor in np.ndindex(*accuracies.shape):
        # the seed matters to the dual solver alone, which scikit-learn took before 1.5
        classifier = LinearSVC(C=0.01, class_weight="balanced", random_state=0)
        classifier.fit(train_codes[:, [unit]], train_labels[:, factor])
        accuracies[unit, factor] = np.mean(classifier.predict(test_codes[:, [unit]]) == test_labels[:, factor])
    return accuracies
