"""The direction bench: effects of latent directions, the factor that each changes, and its leakage into others.

Protocol, the same for every finder, with K directions and F factors with words:

1. N base images are sampled from noises x_T, drawn on the CPU with a seed, without guidance and with a deterministic
   sampler. A model of texts is conditioned on captions of all attributes of test images; others on nothing.
2. Each direction is applied at each strength of a grid, from the same x_T and condition. The changes of factor f are
   the share of images whose word of f, by a factor judge, differs from that of the base image. The margin of f is its
   change minus the mean change of the other factors.
3. On the first half of the N images, each direction gets its strength and its factor: the pair of the largest margin;
   the weakest strength of equal ones. The first quarter sees all strengths, the second one the two best of each
   direction. All reported numbers are measured on the other half at the chosen strength. Without a judge it is the
   largest.
4. ``matrix[k, f]`` is the change of f by direction k. Leakage of a direction is the mean change of the factors that are
   not its own. It owns its factor if the change is at least ``own_threshold`` and its leakage below
   ``leakage_threshold``. The best direction of an owned factor has the largest margin on the first half.
5. The effect of a direction is the mean RMS difference between the pixels of base and edited images, divided by that
   between different base images: 1 means another image. A direction has no effect if its effect at the largest
   strengths, on the first quarter, is below the 5 % quantile of the random control: 95 % of random rows do more.

Legend: N base images, K directions, F factors, S strengths, J edits (an image, a direction and a strength each), B
batch, T time steps of the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.vocabulary import AttributeVocabulary
from ldm.diffusion.conditions import Condition
from ldm.diffusion.noise import seeded_noise
from ldm.diffusion.samplers import Denoiser, Sampler
from ldm.evaluation.editing.measure import sample_from
from ldm.evaluation.images.metrics import image_distances
from ldm.evaluation.units.names import Reader, UnitName, name_unit
from ldm.models.diffusion.methods.noiseclr.denoiser import FrozenDenoiser
from ldm.models.diffusion.methods.noiseclr.directions import DirectionSet
from ldm.util import ConfigError

_SIDE = 32  # pixels a side at which changes of directions are compared

Measure = Callable[[Tensor, Tensor], Tensor]  # edited and base images (B, 3, H, W) -> (B, ...)


@dataclass(frozen=True)
class BenchPlan:
    """Sampling, strengths and thresholds, shared by all finders.

    Attributes:
        num_samples: N, at least 4.
        sampler: a deterministic sampler.
        strengths: S strengths.
        batch_size: images sampled at once.
        seed: seed of the noise.
        own_threshold: least change of an owned factor.
        leakage_threshold: leakage of owning directions is below it.
    """

    num_samples: int
    sampler: Sampler
    strengths: tuple[float, ...] = (-4.0, -2.0, -1.0, 1.0, 2.0, 4.0)
    batch_size: int = 128
    seed: int = 0
    own_threshold: float = 0.5
    leakage_threshold: float = 0.3

    def __post_init__(self) -> None:
        if not self.strengths or 0 in self.strengths or not np.isfinite(self.strengths).all():
            raise ConfigError(
                f"direction bench: expected strengths that are finite and not 0, got {list(self.strengths)}"
            )

    @property
    def selection(self) -> np.ndarray:
        """Positions of the images for selection."""
        return np.arange(self.num_samples // 2)

    @property
    def report(self) -> np.ndarray:
        """Positions of the images for the report."""
        return np.arange(self.num_samples // 2, self.num_samples)


@dataclass(frozen=True)
class Meters:
    """Networks that read edited images.

    Attributes:
        vocabulary: words of the factors; None without judge and CLIP.
        judge: images -> factor values (B, F), such as ``AttributeJudge.predict_values``; None for none.
        reader: CLIP's posteriors, see ``clip_reader``; None for none.
        lpips: perceptual distance; None for none.
    """

    vocabulary: AttributeVocabulary | None = None
    judge: Callable[[Tensor], Tensor] | None = None
    reader: Reader | None = None
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None

    def words(self, images: Tensor) -> Tensor:
        """Return the judged words, (B, F) int64; (B, 0) without a judge."""
        if self.judge is None or self.vocabulary is None:
            return torch.zeros(len(images), 0, dtype=torch.long)
        return torch.from_numpy(self.vocabulary.word_labels(self.judge(images).cpu().numpy()))

    def all(self) -> dict[str, Measure]:
        """Return the measures of the report by name."""
        found: dict[str, Measure] = {
            **self.selection(),
            "ssim": lambda images, base: image_distances(base, images)["ssim"],
            "pixels": lambda images, base: F.adaptive_avg_pool2d(images - base, _SIDE).flatten(1),
        }
        if (lpips := self.lpips) is not None:
            found["lpips"] = lambda images, base: lpips(base, images).flatten()
        if (reader := self.reader) is not None:
            found["read"] = lambda images, base: torch.cat(reader(images), dim=1)
        return found

    def selection(self) -> dict[str, Measure]:
        """Return the measures of the first half by name."""
        return {
            "rms": lambda images, base: (images - base).flatten(1).square().mean(dim=1).sqrt(),
            "words": lambda images, base: self.words(images),
        }


@dataclass(frozen=True)
class Measured:
    """Numbers of the directions of one finder; F is 0 without a judge."""

    directions: DirectionSet
    strengths: np.ndarray  # (K,) chosen
    selection: np.ndarray  # (K, F) changes on the first half at that strength
    matrix: np.ndarray  # (K, F) changes on the other half
    effects: np.ndarray  # (K,) at that strength, on the other half
    largest_effects: np.ndarray  # (K,) at the largest strengths, on the first half
    ssim: np.ndarray  # (K,)
    lpips: np.ndarray  # (K,) NaN without LPIPS
    similarity: np.ndarray  # (K, K) mean |cosine| of the changes of pixels; NaN for directions without any change
    names: list[UnitName] = field(default_factory=list)  # by CLIP; empty without one

    @cached_property
    def owners(self) -> np.ndarray:
        """(K,) factor of each direction, the largest margin on the first half; -1 without a judge."""
        return margins(self.selection).argmax(axis=1) if self.selection.size else np.full(len(self.strengths), -1)

    @cached_property
    def own(self) -> tuple[np.ndarray, np.ndarray]:
        """(K,) change of its factor, and leakage; NaN without a judge."""
        if not self.matrix.size:
            unknown = np.full(len(self.strengths), np.nan)
            return unknown, unknown
        rows = np.arange(len(self.matrix))
        change = self.matrix[rows, self.owners]
        return change, np.round(change - margins(self.matrix)[rows, self.owners], 9)

    def owns(self, plan: BenchPlan) -> np.ndarray:
        """Return whether each direction owns its factor, (K,) bool."""
        change, leakage = self.own
        return (change >= plan.own_threshold) & (leakage < plan.leakage_threshold)

    def best(self, plan: BenchPlan) -> dict[int, int]:
        """Return the best direction of each owned factor."""
        order = np.argsort(-margins(self.selection).max(axis=1), kind="stable") if self.selection.size else []
        found: dict[int, int] = {}
        for k in order:
            if self.owns(plan)[k]:
                found.setdefault(int(self.owners[k]), int(k))
        return dict(sorted(found.items()))

    def best_margins(self) -> np.ndarray:
        """Return the margin of each factor of the direction whose margin is largest on the first half, (F,)."""
        chosen = margins(self.selection).argmax(axis=0)
        return margins(self.matrix)[chosen, np.arange(self.matrix.shape[1])]


class Bench:
    """Samples and measures; base images are sampled once. Raises a ``UserError`` if a sampled image contains NaN.

    Args:
        denoiser: the denoiser, on its device.
        plan: options.
        meters: networks that read images.
        texts: N captions; None for models without texts.
    """

    def __init__(
        self, denoiser: FrozenDenoiser, plan: BenchPlan, meters: Meters, texts: Sequence[str] | None = None
    ) -> None:
        self.denoiser, self.plan, self.meters, self.texts = denoiser, plan, meters, texts
        noise = seeded_noise(plan.num_samples, denoiser.latent_shape, plan.seed)
        self.noise = noise.to(denoiser.schedule.betas.device)  # (N, C, h, w), x_T
        parts = np.split(np.arange(plan.num_samples), range(plan.batch_size, plan.num_samples, plan.batch_size))
        self.base = torch.cat([self._sample(part, self._plain, "base images") for part in parts])
        self._words = torch.cat([meters.words(part) for part in self.base.split(plan.batch_size)]).numpy()
        flat = self.base.flatten(1)
        self.unrelated = float(torch.pdist(flat).mean() / flat.shape[1] ** 0.5)  # RMS difference of different images

    def measure(self, directions: DirectionSet) -> Measured:
        """Return the numbers of some directions."""
        count, second = len(directions), self.plan.report
        first = np.array_split(self.plan.selection, 2)
        grid = np.array(sorted(self.plan.strengths, key=abs))  # the weakest of equal margins is chosen
        everything = np.broadcast_to(np.arange(len(grid)), (count, len(grid)))
        seen = self._observe(directions, everything, grid, first[0], self.meters.selection())
        kept, changes = everything[:, -1:], seen["changed"][:, -1:, :]  # (K, 1), (K, 1, n, F)
        if changes.size:
            scores = margins(seen["changed"].mean(axis=2)).max(axis=2)
            kept = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :2])
            more = self._observe(directions, kept, grid, first[1], self.meters.selection())["changed"]
            changes = np.concatenate([np.take_along_axis(seen["changed"], kept[..., None, None], 1), more], axis=2)
        changes = changes.mean(axis=2)  # (K, kept, F)
        best = margins(changes).max(axis=2).argmax(axis=1)[:, None] if changes.size else np.zeros((count, 1), int)
        chosen = np.take_along_axis(kept, best, 1)  # (K, 1)
        report = self._observe(directions, chosen, grid, second, self.meters.all())
        means = {name: values[:, 0].mean(axis=1) for name, values in report.items()}
        largest = seen["rms"][:, np.abs(grid) == np.abs(grid).max()].mean(axis=(1, 2))
        scale = self.unrelated or float("nan")  # NaN if all base images are equal
        return Measured(
            directions=directions,
            strengths=grid[chosen[:, 0]],
            selection=np.take_along_axis(changes, best[..., None], 1)[:, 0],
            matrix=means["changed"],
            effects=means["rms"] / scale,
            largest_effects=largest / scale,
            ssim=means["ssim"],
            lpips=means.get("lpips", np.full(count, np.nan)),
            similarity=mean_similarity(report["pixels"][:, 0]),
            names=self._names(report["read"][:, 0]) if "read" in report else [],
        )

    def images(self, directions: DirectionSet, k: int, strength: float, samples: np.ndarray) -> Tensor:
        """Return edited images of some samples, (n, 3, H, W) on the CPU."""
        one = replace(directions, values=directions.values[[k]], names=(directions.names[k],))
        measures: dict[str, Measure] = {"images": lambda images, base: images}
        found = self._observe(one, np.zeros((1, 1), int), np.array([strength]), samples, measures)
        return torch.from_numpy(found["images"][0, 0])

    def _observe(
        self,
        directions: DirectionSet,
        kept: np.ndarray,
        grid: np.ndarray,
        samples: np.ndarray,
        measures: Mapping[str, Measure],
    ) -> dict[str, np.ndarray]:
        """Return measures and changed words (K, s, n, ...) at strengths ``grid[kept]``, (S,) and (K, s)."""
        shape = (*kept.shape, len(samples))
        rows = np.broadcast_to(np.arange(len(directions))[:, None, None], shape).reshape(-1)
        factors = np.broadcast_to(grid[kept][..., None], shape).reshape(-1)
        places = np.broadcast_to(samples, shape).reshape(-1)
        found: dict[str, list[Tensor]] = {name: [] for name in measures}
        for part in np.array_split(np.arange(len(rows)), -(-len(rows) // self.plan.batch_size)):
            edited = partial(self._edited, directions, rows[part], factors[part])
            images, base = self._sample(places[part], edited, directions.finder), self.base[places[part]]
            for name, measure in measures.items():
                found[name].append(measure(images, base).cpu())
        joined = {name: torch.cat(values).numpy() for name, values in found.items()}
        if "words" in joined:
            joined["changed"] = joined["words"] != self._words[places]
        return {name: values.reshape(*shape, *values.shape[1:]) for name, values in joined.items()}

    @torch.no_grad()
    def _sample(self, samples: np.ndarray, build: Callable[[Condition | None, int], Denoiser], name: str) -> Tensor:
        """Return images (B, 3, H, W) in [-1, 1] of some samples under the denoiser of their condition."""
        texts, denoiser = self.texts, self.denoiser
        captions = None if texts is None else [texts[index] for index in samples]

        def sample(captions: list[str] | None, x_T: Tensor) -> Tensor:
            cond = None if captions is None else denoiser.condition_from_texts(captions)
            return denoiser.decode(self.plan.sampler.sample(build(cond, len(x_T)), x_T, denoiser.schedule))

        images = sample_from(sample, captions, self.noise[samples], self.plan.seed, f"direction bench, {name}")
        return images.float().clamp(-1, 1)

    def _plain(self, cond: Condition | None, size: int) -> Denoiser:
        given = self.denoiser.null(size) if cond is None else cond
        return lambda x, t: self.denoiser.predict_eps(x, t, given)

    def _edited(
        self, directions: DirectionSet, rows: np.ndarray, factors: np.ndarray, cond: Condition | None, size: int
    ) -> Denoiser:
        """Return the denoiser of B samples with one direction and one strength each, (B,) and (B,)."""
        weights = torch.as_tensor(factors, dtype=torch.float32)[None, :, None]
        weights = weights.expand(1, size, self.denoiser.schedule.num_timesteps)
        return directions.edited_by_sample(self.denoiser, torch.from_numpy(rows)[None], weights, cond)

    def _names(self, read: np.ndarray) -> list[UnitName]:
        """Return CLIP's names of posteriors (K, n, all words) on the paths from base to edited images."""
        vocabulary, reader, second = self.meters.vocabulary, self.meters.reader, self.plan.report
        if vocabulary is None or reader is None:
            return []
        parts = self.base[second].split(self.plan.batch_size)
        base = torch.cat([torch.cat(reader(part), dim=1) for part in parts]).cpu()
        sizes, names = [len(words) for words in vocabulary.words], []
        for k, edited in enumerate(torch.from_numpy(read)):
            path = torch.stack([base, edited], dim=1).flatten(0, 1)  # image-major, two points each
            names.append(name_unit(k, path.split(sizes, dim=1), 2, vocabulary))
        return names


def margins(changes: np.ndarray) -> np.ndarray:
    """Return each change minus the mean of those of the other factors, (..., F); a single factor has no others."""
    others = (changes.sum(axis=-1, keepdims=True) - changes) / max(1, changes.shape[-1] - 1)
    return changes - others


def mean_similarity(pixels: np.ndarray) -> np.ndarray:
    """Return the mean |cosine| over images of changes (K, n, P): (K, K)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = pixels / np.linalg.norm(pixels, axis=-1, keepdims=True)
    return np.abs(np.einsum("knp,lnp->kln", unit, unit)).mean(axis=-1)
