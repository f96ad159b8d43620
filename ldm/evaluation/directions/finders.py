"""Finders of directions of a frozen denoiser, with one interface: learned or stored rows, PCA, Jacobian, random rows.

In YAML a finder is a name below, ``{target, params}``, or the path of a file of directions.

Legend: n images, T time steps, P points (an image at a time step), K directions, N features of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.diffusion.noise import fixed_noise
from ldm.models.diffusion.methods.noiseclr.denoiser import FrozenDenoiser
from ldm.models.diffusion.methods.noiseclr.directions import DirectionSet
from ldm.ranges import Count, PositiveFloat, Weight
from ldm.util import ConfigError, UserError, did_you_mean, instantiate_from_config

_BATCH = 64  # points per call of the network


class Finder:
    """A way to find directions; base class."""

    name = "finder"

    def check(self, denoiser: FrozenDenoiser, num_images: int, count: int) -> None:
        """Raise a ``UserError`` if ``count`` directions cannot be found with ``num_images`` images."""

    def find(self, denoiser: FrozenDenoiser, images: Tensor, count: int, seed: int) -> DirectionSet:
        """Return directions whose natural strength is 1.

        Args:
            denoiser: the denoiser.
            images: (n, 3, H, W) in [-1, 1], on the device of the denoiser.
            count: K; finders of given directions return all of them.
            seed: seed of all draws.
        """
        raise NotImplementedError


class GivenDirections(Finder):
    """Directions that were found before, such as the rows that a model has learned.

    Args:
        directions: the directions, or the path of their file.
    """

    def __init__(self, directions: DirectionSet | str | Path) -> None:
        if isinstance(directions, DirectionSet):
            self.directions, self.where, self.name = directions, "directions", directions.finder
        else:
            self.directions, self.where = DirectionSet.load(directions), str(directions)
            self.name = Path(directions).stem

    def check(self, denoiser: FrozenDenoiser, num_images: int, count: int) -> None:
        """Raise a ``UserError`` unless the directions belong to the denoiser and are finite."""
        self.directions.check(denoiser, self.where)
        broken = ~self.directions.values.isfinite().all(dim=1)
        if broken.any():
            names = ", ".join(name for name, is_broken in zip(self.directions.names, broken) if is_broken)
            raise UserError(
                f"{self.where}: expected finite numbers, got NaN or infinity in {int(broken.sum())} of {len(broken)} "
                f"directions ({names}). Training has diverged: train with a smaller learning rate"
            )

    def find(self, denoiser: FrozenDenoiser, images: Tensor, count: int, seed: int) -> DirectionSet:
        return self.directions


class RandomRows(Finder):
    """The control: rows drawn as the rows of NoiseCLR are before training.

    Args:
        normalize_rows: scale rows to length 1, like the option of ``NoiseCLR``.
    """

    name = "random"

    def __init__(self, normalize_rows: bool = False) -> None:
        self.normalize_rows = normalize_rows

    def find(self, denoiser: FrozenDenoiser, images: Tensor, count: int, seed: int) -> DirectionSet:
        with fixed_noise(seed, images.device):
            rows = denoiser.initial_rows(count)
        rows = F.normalize(rows, dim=-1) if self.normalize_rows else rows
        return DirectionSet.of(denoiser, rows, denoiser.row_space, self.name)


class ShiftFinder(Finder):
    """A finder of shifts of the bottleneck, from images at T evenly spaced time steps; base class."""

    num_timesteps: int

    @torch.no_grad()
    def check(self, denoiser: FrozenDenoiser, num_images: int, count: int) -> None:
        device = denoiser.schedule.betas.device
        x, t = torch.zeros(1, *denoiser.latent_shape, device=device), torch.zeros(1, dtype=torch.long, device=device)
        width = denoiser.bottleneck_features(x, t, denoiser.null(1)).numel()
        rank, points = (num_images - 1) * self.num_timesteps, f"{num_images} images at {self.num_timesteps} time steps"
        for limit, reason in ((width, "the features of the bottleneck"), (rank, f"the differences of {points}")):
            if count > limit:
                raise UserError(
                    f"{self.name}: expected at most {limit} directions, {reason}, got {count}. Find fewer directions "
                    "(num_directions), or use more images (num_images)"
                )


class BottleneckPCA(ShiftFinder):
    """Principal components of the features of the bottleneck, the h-space of Kwon et al. (2023).

    The global unsupervised directions of Haas et al. (2024), of noised data images in place of samples.
    The mean of each time step is subtracted, so that no component is the time; one unit is one standard deviation.

    Args:
        num_timesteps: T, evenly spaced.
        scale: standard deviations of one unit.
    """

    name = "h_space"

    def __init__(self, num_timesteps: Count = 5, scale: PositiveFloat = 1.0) -> None:
        self.num_timesteps, self.scale = num_timesteps, scale

    def find(self, denoiser: FrozenDenoiser, images: Tensor, count: int, seed: int) -> DirectionSet:
        self.check(denoiser, len(images), count)
        values = principal_components(feature_deviations(denoiser, images, self.num_timesteps, seed), count)
        return DirectionSet.of(denoiser, self.scale * values, "bottleneck", self.name)


class JacobianVectors(ShiftFinder):
    """Shifts of the bottleneck that change the predicted noise most: Haas et al. (2024).

    With J the Jacobian of the predicted noise with respect to the features, they are the eigenvectors of the mean of
    J^T J over images and time steps, its right singular vectors for a single point. Subspace iteration multiplies by J
    (forward mode) and J^T (reverse mode) without forming J. One unit has the root mean square length of as many
    principal components (``BottleneckPCA``), so that strengths are comparable.

    Args:
        num_images: images of the points; the lengths use all.
        num_timesteps: T, evenly spaced; P = n T.
        iterations: most iterations.
        tolerance: stop when no eigenvalue changes by more than this share of the largest one.
        scale: factor of the length.
    """

    name = "jacobian"

    def __init__(
        self,
        num_images: Count = 4,
        num_timesteps: Count = 3,
        iterations: Count = 6,
        tolerance: Weight = 1e-3,
        scale: PositiveFloat = 1.0,
    ) -> None:
        self.num_images, self.num_timesteps, self.scale = num_images, num_timesteps, scale
        self.iterations, self.tolerance = iterations, tolerance

    def find(self, denoiser: FrozenDenoiser, images: Tensor, count: int, seed: int) -> DirectionSet:
        self.check(denoiser, len(images), count)
        components = principal_components(feature_deviations(denoiser, images, self.num_timesteps, seed), count)
        points = noised_points(denoiser, images[: self.num_images], self.num_timesteps, seed)
        x, t = (torch.cat(parts) for parts in zip(*points))
        generator = torch.Generator().manual_seed(seed)
        basis = _orthonormal(torch.randn(count, components.shape[1], generator=generator).to(x))
        values, previous = basis, torch.zeros(count)
        for _ in range(self.iterations):
            product = gram_product(denoiser, x, t, basis)
            eigenvalues, rotation = torch.linalg.eigh(basis @ product.T)  # ascending
            eigenvalues, values = eigenvalues.flip(0).cpu(), (rotation.T @ basis).flip(0)
            if (eigenvalues - previous).abs().max() <= self.tolerance * eigenvalues[0]:
                break
            previous, basis = eigenvalues, _orthonormal(product)
        length = self.scale * components.square().sum(dim=1).mean().sqrt()
        return DirectionSet.of(denoiser, length * signed(values.double().cpu()), "bottleneck", self.name)


FINDERS: dict[str, type[Finder]] = {finder.name: finder for finder in (BottleneckPCA, JacobianVectors, RandomRows)}


def build_finder(given: Mapping[str, Any] | str, learned: DirectionSet) -> Finder:
    """Return the finder that an option describes.

    Args:
        given: a name in ``FINDERS``, the learned directions (``noiseclr``), ``{target, params}``, or a path.
        learned: directions of the model.

    Raises:
        ConfigError: the name is unknown, or the target is not a finder.
        UserError: the file cannot be read.
    """
    if given == learned.finder:
        return GivenDirections(learned)
    if isinstance(given, str) and given in FINDERS:
        return FINDERS[given]()
    if isinstance(given, str) and Path(given).suffix:
        return GivenDirections(given)
    built = instantiate_from_config(given) if isinstance(given, Mapping) else given
    if not isinstance(built, Finder):
        known = [learned.finder, *FINDERS]
        raise ConfigError(
            f"finders: expected {', '.join(known)}, a file of directions, or {{target, params}} of a subclass of "
            f"ldm.evaluation.directions.finders.Finder, got {given!r}.{did_you_mean(str(given), known)}"
        )
    return built


def noised_points(
    denoiser: FrozenDenoiser, images: Tensor, num_timesteps: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Return noised latents (n, C, h, w) and time steps (n,) for each of T evenly spaced time steps."""
    z = torch.cat([denoiser.encode(part) for part in images.split(_BATCH)])
    generator, points = torch.Generator().manual_seed(seed), []
    for step in np.linspace(0, denoiser.schedule.num_timesteps, num_timesteps + 2)[1:-1].astype(int):
        t = torch.full((len(z),), int(step), device=z.device)
        points.append((denoiser.schedule.q_sample(z, t, torch.randn(z.shape, generator=generator).to(z)), t))
    return points


@torch.no_grad()
def feature_deviations(denoiser: FrozenDenoiser, images: Tensor, num_timesteps: int, seed: int) -> Tensor:
    """Return features of the bottleneck minus their mean at each time step, (T n, N) float64 on the CPU."""
    deviations = []
    for x, t in noised_points(denoiser, images, num_timesteps, seed):
        parts = zip(x.split(_BATCH), t.split(_BATCH))
        features = [denoiser.bottleneck_features(some, at, denoiser.null(len(some))) for some, at in parts]
        joined = torch.cat(features).flatten(1).double().cpu()
        deviations.append(joined - joined.mean(dim=0))
    return torch.cat(deviations)


def principal_components(deviations: Tensor, count: int) -> Tensor:
    """Return the first K principal components (K, N) of deviations (m, N), one standard deviation long."""
    _, lengths, vectors = torch.linalg.svd(deviations, full_matrices=False)
    return signed(vectors[:count]) * (lengths[:count, None] / len(deviations) ** 0.5)


def signed(vectors: Tensor) -> Tensor:
    """Return vectors (K, N) with the sign that makes the number of largest size positive."""
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def gram_product(denoiser: FrozenDenoiser, x: Tensor, t: Tensor, vectors: Tensor) -> Tensor:
    """Return the mean of J^T J v over points x (P, C, h, w), t (P,) for vectors v (K, N): (K, N)."""
    total = torch.zeros_like(vectors)
    for index in torch.arange(len(x) * len(vectors), device=x.device).split(_BATCH):
        points, rows = index // len(vectors), index % len(vectors)
        noised, at, cond = x[points], t[points], denoiser.null(len(index))
        no_shift = torch.zeros_like(vectors[rows])

        def predict(shift: Tensor, noised: Tensor = noised, at: Tensor = at, cond: Any = cond) -> Tensor:
            return denoiser.predict_eps(noised, at, cond, shift)

        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
            with torch.no_grad():
                change = torch.func.jvp(predict, (no_shift,), (vectors[rows],))[1]
            with torch.enable_grad():
                shift = no_shift.requires_grad_()
                pulled = torch.autograd.grad(predict(shift), shift, change)[0]
        total.index_add_(0, rows, pulled)
    return total / len(x)


def _orthonormal(vectors: Tensor) -> Tensor:
    return torch.linalg.qr(vectors.T)[0].T
