"""Finders of directions: PCA against numpy, the Jacobian's vectors against its singular vectors, random rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bench_models import FEATURES, Toy, images_of

from ldm.evaluation.directions.finders import (
    BottleneckPCA,
    GivenDirections,
    JacobianVectors,
    RandomRows,
    build_finder,
    feature_deviations,
    gram_product,
    noised_points,
)
from ldm.models.diffusion.methods.noiseclr.directions import DirectionSet
from ldm.util import ConfigError, UserError


def explicit_gram(denoiser, x, t):
    """Return the mean of J^T J of the points, (N, N), with J written out."""
    total = torch.zeros(FEATURES, FEATURES)
    for some, at in zip(x.split(1), t.split(1)):
        jacobian = torch.autograd.functional.jacobian(
            lambda shift, some=some, at=at: denoiser.predict_eps(some, at, denoiser.null(1), shift).flatten(),
            torch.zeros(1, FEATURES),
        )[:, 0]
        total += jacobian.T @ jacobian / len(x)
    return total


def points_of(denoiser, images, num_timesteps=2, seed=3):
    return (torch.cat(parts) for parts in zip(*noised_points(denoiser, images, num_timesteps, seed)))


def test_components_are_those_of_numpy_and_one_deviation_long():
    denoiser, images = Toy(), images_of(20)
    found = BottleneckPCA(num_timesteps=3).find(denoiser, images, 5, seed=3)
    deviations = feature_deviations(denoiser, images, 3, 3).numpy()
    assert deviations.shape == (60, FEATURES) and np.abs(deviations.reshape(3, 20, -1).mean(axis=1)).max() < 1e-12
    variances, vectors = np.linalg.eigh(deviations.T @ deviations / 60)
    expected = (vectors * np.sqrt(variances.clip(0))).T[::-1][:5]
    cosines = np.abs((found.values.numpy() * expected).sum(axis=1)) / (expected**2).sum(axis=1)
    assert np.allclose(cosines, 1, atol=1e-4)
    projected = deviations @ (found.values.numpy() / np.linalg.norm(found.values, axis=1, keepdims=True)).T
    assert np.allclose(projected.std(axis=0), np.linalg.norm(found.values, axis=1), rtol=1e-3)
    assert found.kind == "bottleneck" and found.finder == "h_space"


def test_products_with_the_jacobian_are_exact():
    denoiser = Toy()
    x, t = points_of(denoiser, images_of(3))
    vectors = torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(0))
    product = gram_product(denoiser, x, t, vectors)
    assert torch.allclose(product, vectors @ explicit_gram(denoiser, x, t), atol=1e-5)


def test_vectors_of_the_jacobian_are_its_singular_vectors():
    denoiser, images = Toy(), images_of(6)
    finder = JacobianVectors(num_images=1, num_timesteps=1, iterations=120, tolerance=0.0)
    found = finder.find(denoiser, images, 3, seed=3).values
    x, t = points_of(denoiser, images[:1], 1)
    jacobian = torch.autograd.functional.jacobian(
        lambda shift: denoiser.predict_eps(x, t, denoiser.null(1), shift).flatten(), torch.zeros(1, FEATURES)
    )[:, 0]
    expected = torch.linalg.svd(jacobian).Vh[:3]
    assert torch.allclose((found @ expected.T).abs() / found.norm(dim=1), torch.eye(3), atol=2e-2)
    lengths = BottleneckPCA(1).find(denoiser, images, 3, seed=3).values.square().sum(dim=1).mean().sqrt()
    assert torch.allclose(found.norm(dim=1), lengths.expand(3), rtol=1e-4)


def test_vectors_of_several_points_are_those_of_the_mean():
    denoiser, images = Toy(), images_of(8)
    finder = JacobianVectors(num_images=3, num_timesteps=2, iterations=120, tolerance=0.0)
    found = finder.find(denoiser, images, 2, seed=3).values
    x, t = points_of(denoiser, images[:3])
    expected = torch.linalg.eigh(explicit_gram(denoiser, x, t))[1].T.flip(0)[:2]
    assert torch.allclose((found @ expected.T).abs() / found.norm(dim=1), torch.eye(2), atol=2e-2)


def test_jacobian_of_a_network_with_recomputed_activations_and_attention():
    plain, images = Toy(attends=True), images_of(4)
    again = Toy(attends=True, use_checkpoint=True)
    finder = JacobianVectors(num_images=2, num_timesteps=1, iterations=3)
    first, second = (finder.find(each, images, 2, seed=0).values for each in (plain, again))
    assert torch.allclose(first, second, atol=1e-5) and first.isfinite().all()


def test_random_rows_are_initial_rows_and_repeat():
    denoiser, state = Toy(), torch.get_rng_state()
    found = RandomRows().find(denoiser, images_of(2), 6, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    assert torch.equal(found.values, denoiser.initial_rows(6)) and found.kind == denoiser.row_space
    assert not torch.equal(found.values, RandomRows().find(denoiser, images_of(2), 6, seed=6).values)
    unit = RandomRows(normalize_rows=True).find(denoiser, images_of(2), 6, seed=5).values
    assert torch.allclose(unit.norm(dim=1), torch.ones(6))


def test_finders_by_name_mapping_and_file(tmp_path):
    denoiser = Toy()
    learned = DirectionSet.of(denoiser, torch.randn(3, denoiser.row_width), denoiser.row_space, "noiseclr")
    assert build_finder("noiseclr", learned).find(denoiser, images_of(2), 9, 0) is learned
    learned.save(tmp_path / "mine.safetensors")
    stored = build_finder(str(tmp_path / "mine.safetensors"), learned)
    assert stored.name == "mine" and torch.equal(stored.directions.values, learned.values)
    target = "ldm.evaluation.directions.finders.BottleneckPCA"
    assert build_finder({"target": target, "params": {"num_timesteps": 2}}, learned).num_timesteps == 2
    with pytest.raises(
        ConfigError, match="finders: expected noiseclr, h_space, jacobian, random.*Did you mean 'h_space'"
    ):
        build_finder("h_spaces", learned)
    with pytest.raises(ConfigError, match="subclass of"):
        build_finder({"target": "torch.nn.Identity"}, learned)


@pytest.mark.parametrize("finder", [BottleneckPCA(), JacobianVectors()], ids=["pca", "jacobian"])
def test_more_directions_than_features_or_images(finder):
    denoiser = Toy()
    with pytest.raises(UserError, match=f"at most {FEATURES} directions, the features of the bottleneck, got 99"):
        finder.check(denoiser, 500, 99)
    with pytest.raises(UserError, match=rf"{finder.name}: .* of 2 images at \d time steps, got 8"):
        finder.check(denoiser, 2, 8)


def test_directions_that_are_broken_or_of_another_model():
    denoiser, rows = Toy(), torch.randn(4, Toy().row_width)
    rows[2] = float("nan")
    broken = DirectionSet.of(denoiser, rows, denoiser.row_space, "noiseclr")
    with pytest.raises(UserError, match=r"NaN or infinity in 1 of 4 directions \(<t3>\).*diverged"):
        GivenDirections(broken).check(denoiser, 8, 4)
    other = DirectionSet.of(Toy(seed=1), rows[:2], denoiser.row_space, "noiseclr")
    with pytest.raises(UserError, match="fingerprint"):
        GivenDirections(other).check(denoiser, 8, 2)


@pytest.mark.parametrize("kind", [BottleneckPCA, JacobianVectors])
def test_scale_multiplies_one_unit(kind):
    denoiser, images = Toy(), images_of(8)
    first, second = (kind(scale=scale).find(denoiser, images, 2, seed=0).values for scale in (1.0, 2.5))
    assert torch.allclose(2.5 * first, second)
