"""What must hold for any representation: the random stream, permutations, perfect and useless codes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from ldm.data.factors import FactorSpace
from ldm.metrics import METRICS, MetricError, beta_vae, dci, factor_vae, mig, score
from ldm.metrics.common import factor_codes, factor_entropies, histogram_codes, mutual_information
from ldm.metrics.dci import dci_factor, scores_from_importances

SMALL_FACTOR_VAE = {"num_train": 300, "num_eval": 200, "num_variance_estimate": 300, "batch_size": 16}
SMALL_BETA_VAE = {"num_train": 200, "num_eval": 100, "batch_size": 16}


def fresh() -> np.random.RandomState:
    return np.random.RandomState(0)


@pytest.fixture(scope="module")
def space() -> FactorSpace:
    return FactorSpace(("hue", "shape", "size"), (5, 4, 3))


@pytest.fixture(scope="module")
def perfect(space) -> np.ndarray:
    """One unit per factor."""
    return space.factors_of(np.arange(space.size)).astype(np.float64)


@pytest.fixture(scope="module")
def mixed(space) -> np.ndarray:
    """Factors blurred by a random mixture and noise; float32 like stored latents."""
    rng = np.random.default_rng(3)
    factors = space.factors_of(np.arange(space.size))
    return (factors @ rng.normal(size=(3, 5)) + rng.normal(size=(space.size, 5))).astype(np.float32)


def plain_votes(representation, space, rs, num, batch_size, variances):
    """One vote after the other, as the definition reads."""
    votes = np.zeros((space.num_factors, representation.shape[1]), dtype=int)
    active = np.sqrt(variances) >= 0.05
    for _ in range(num):
        fixed = rs.randint(space.num_factors)
        factors = space.sample_factors(batch_size, rs)
        factors[:, fixed] = factors[0, fixed]
        codes = representation[space.sample_observations_from_factors(factors, rs)]
        votes[fixed, np.argmin(np.var(codes, axis=0, ddof=1)[active] / variances[active])] += 1
    return votes


def test_factor_vae_equals_the_definition_draw_by_draw(mixed, space):
    rs = fresh()
    rows = space.sample(300, rs)[1]
    variances = np.var(mixed[rows], axis=0, ddof=1)
    train = plain_votes(mixed, space, rs, 300, 16, variances)
    test = plain_votes(mixed, space, rs, 200, 16, variances)
    winners, columns = train.argmax(axis=0), np.arange(5)
    found = factor_vae(mixed, space, fresh(), **SMALL_FACTOR_VAE)
    assert found["train_accuracy"] == train[winners, columns].sum() / 300
    assert found["eval_accuracy"] == test[winners, columns].sum() / 200


def test_blocks_of_lookups_change_nothing(mixed, space, monkeypatch):
    whole = factor_vae(mixed, space, fresh(), **SMALL_FACTOR_VAE), beta_vae(mixed, space, fresh(), **SMALL_BETA_VAE)
    monkeypatch.setattr("ldm.metrics.common.LOOKUP_ROWS", 100)
    blocks = factor_vae(mixed, space, fresh(), **SMALL_FACTOR_VAE), beta_vae(mixed, space, fresh(), **SMALL_BETA_VAE)
    assert whole == blocks


def test_factor_codes_draw_batches_of_sixteen(mixed, space):
    rs = fresh()
    draws = [space.sample(size, rs) for size in (16, 16, 8)]
    codes, labels = factor_codes(mixed, space, 40, fresh())
    assert np.array_equal(labels, np.concatenate([factors for factors, _ in draws]))
    assert np.array_equal(codes, mixed[np.concatenate([rows for _, rows in draws])])


def test_samplers_that_draw_while_looking_up(mixed, space):
    """Some data sets fill unlabelled factors at random: those draws come between the factors' draws."""

    def lookup_with_a_draw(factors, rs):
        rs.randint(7, size=len(factors))
        return space.index_of(factors)

    noisy = SimpleNamespace(
        num_factors=3,
        factors_num_values=(5, 4, 3),
        sample_factors=space.sample_factors,
        sample_observations_from_factors=lookup_with_a_draw,
    )
    rs = fresh()
    first = space.sample_factors(16, rs)
    rs.randint(7, size=16)
    labels = factor_codes(mixed, noisy, 32, fresh())[1]
    assert np.array_equal(labels, np.concatenate([first, space.sample_factors(16, rs)]))


@pytest.mark.parametrize("metric,options", [(factor_vae, SMALL_FACTOR_VAE), (mig, {"num_train": 500})])
def test_order_of_units_does_not_matter(mixed, space, metric, options):
    order = np.random.default_rng(0).permutation(5)
    assert metric(mixed[:, order], space, fresh(), **options) == metric(mixed, space, fresh(), **options)


def test_a_function_of_rows_is_a_representation(mixed, space):
    by_function = mig(lambda rows: mixed[rows], space, fresh(), num_train=500)
    assert by_function == mig(mixed, space, fresh(), num_train=500)


def test_perfect_codes_score_one(perfect, space):
    assert factor_vae(perfect, space, fresh(), **SMALL_FACTOR_VAE)["eval_accuracy"] == 1.0
    assert beta_vae(perfect, space, fresh(), **SMALL_BETA_VAE)["eval_accuracy"] == 1.0
    assert mig(perfect, space, fresh(), num_train=2000)["discrete_mig"] > 0.95
    scores = dci(perfect, space, fresh(), num_train=300, num_test=100)
    assert min(scores.values()) > 0.95


def test_noise_scores_near_the_floor(space):
    noise = np.random.default_rng(1).normal(size=(4096, 6))
    wide = FactorSpace(("a", "b", "c"), (16, 16, 16))
    assert factor_vae(noise, wide, fresh(), **SMALL_FACTOR_VAE)["eval_accuracy"] < 0.5
    assert beta_vae(noise, wide, fresh(), **SMALL_BETA_VAE)["eval_accuracy"] < 0.5
    assert mig(noise, wide, fresh(), num_train=4000)["discrete_mig"] < 0.02
    few = FactorSpace(("a", "b", "instance"), (4, 4, 256), latent=(0, 1))
    assert dci(noise, few, fresh(), num_train=300, num_test=100)["disentanglement"] < 0.2


def test_units_that_never_vary_are_pruned(perfect, space):
    found = factor_vae(np.zeros_like(perfect), space, fresh(), **SMALL_FACTOR_VAE)
    assert found == {"train_accuracy": 0.0, "eval_accuracy": 0.0, "num_active_dims": 0, "num_active_true": 0}
    padded = np.column_stack([np.zeros(len(perfect)), perfect])
    found = factor_vae(padded, space, fresh(), **SMALL_FACTOR_VAE)
    assert (found["eval_accuracy"], found["num_active_dims"], found["num_active_true"]) == (1.0, 4, 3)


def test_dci_of_factors_scored_apart_is_dci(mixed, space):
    options = {"num_train": 120, "num_test": 60}
    parts = [dci_factor(mixed, space, fresh(), factor, **options) for factor in range(3)]
    assert scores_from_importances(parts) == dci(mixed, space, fresh(), **options)


def test_dci_scores_by_hand():
    parts = [
        {"importance": [1.0, 0.0], "train_accuracy": 1.0, "test_accuracy": 0.5},
        {"importance": [0.5, 0.5], "train_accuracy": 0.5, "test_accuracy": 0.5},
    ]
    unit_0 = 1 + (2 / 3) * np.log2(2 / 3) + (1 / 3) * np.log2(1 / 3)  # importances 1 and 1/2
    found = scores_from_importances(parts)
    assert found["disentanglement"] == pytest.approx(0.75 * unit_0 + 0.25, abs=1e-8)
    assert found["completeness"] == pytest.approx(0.5, abs=1e-8)
    assert (found["informativeness_train"], found["informativeness_test"]) == (0.75, 0.5)


def test_dci_of_useless_codes_is_zero():
    blank = {"importance": [0.0, 0.0], "train_accuracy": 0.2, "test_accuracy": 0.2}
    found = scores_from_importances([blank, blank])
    assert (found["disentanglement"], found["completeness"]) == (0.0, 0.0)


def test_histogram_codes_cut_the_range_in_equal_bins():
    codes = np.column_stack([np.linspace(0, 1, 41), np.full(41, 7.0)])
    binned = histogram_codes(codes, 4)
    assert [int((binned[:, 0] == value).sum()) for value in (1, 2, 3, 4)] == [10, 10, 10, 11]
    assert len(np.unique(binned[:, 1])) == 1


def test_information_of_a_copy_is_its_entropy():
    labels = np.random.default_rng(0).integers(0, 4, size=(500, 2))
    information = mutual_information(labels, labels)
    assert np.diag(information) == pytest.approx(factor_entropies(labels))


def test_what_cannot_be_scored_says_why(perfect, space):
    single = FactorSpace(("only",), (60,))
    with pytest.raises(MetricError, match="at least 2 factors to compare, got 1"):
        beta_vae(perfect, single, fresh())
    with pytest.raises(MetricError, match="at least 2 units to compare, got 1"):
        mig(perfect[:, :1], space, fresh(), num_train=50)
    with_constant = FactorSpace(("a", "b"), (60, 1))
    for metric in (mig, dci):
        with pytest.raises(MetricError, match="factor 1 takes a single value"):
            metric(perfect, with_constant, fresh(), num_train=50)


def test_score_runs_the_whole_registry(perfect, space):
    quick = {name: METRICS[name] for name in ("mig", "beta_vae")}
    found = score(perfect, space, quick)
    assert list(found) == ["MIG", "beta_VAE"]
    assert found["MIG"] == mig(perfect, space, fresh())
