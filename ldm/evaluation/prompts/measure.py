"""The prompt score: sample from texts of known attributes, and judge how often each attribute came true.

Protocol, for F factors with words:

1. Draw N images of the test data set; the prompt of each is the caption of all its attributes in canonical phrases, or
   a template with their words.
2. For every guidance strength w, sample one image per prompt from the same noise, with (1 + w) e_cond - w e_null.
3. A factor judge, trained on real images, predicts the factor values of every sample. The accuracy of a factor is the
   share of prompts whose word is the one of the judged value. w = -1 leaves the prompt out, which measures chance.
4. The distance is that of FID (Heusel et al. 2017, Eq. 6) between the samples and N other real images, in the features
   of the judge instead of those of Inception. It depends on N; the images of the prompts have the least to expect.

Legend: N prompts, F factors, W strengths, D features, C h w the latent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ldm.data.vocabulary import UNKNOWN, AttributeVocabulary
from ldm.diffusion.noise import seeded_noise
from ldm.evaluation.editing.measure import available_words, plain_number, sample_from
from ldm.evaluation.images.distances import Moments, frechet_distance
from ldm.losses.modality_gap import modality_gap
from ldm.models.contracts import HasAttributes, HasJointSpace
from ldm.models.inputs import images_from_batch
from ldm.models.judge import AttributeJudge
from ldm.util import ConfigError

logger = logging.getLogger(__name__)

MOST_PROMPTS = 256

# (which prompts, x_T: (B, C, h, w), guidance strength w) -> images (B, 3, H, W) in [-1, 1].
PromptSampler = Callable[[slice, Tensor, float], Tensor]


@dataclass(frozen=True)
class PromptPlan:
    """Prompts and noises of all samples."""

    vocabulary: AttributeVocabulary
    texts: list[str]  # N prompts
    words: np.ndarray  # (N, F) int64, the words in the prompts
    images: Tensor  # (N, H, W, 3) uint8, images of the prompts
    others: Tensor  # (N, H, W, 3) uint8, N other images
    noise: Tensor  # (N, C, h, w) float32 on the CPU
    seed: int


def plan_prompts(
    dataset: HasAttributes, latent_shape: Sequence[int], num_prompts: int | None, seed: int, template: str | None = None
) -> PromptPlan:
    """Draw images of which all attributes are known with their prompts, other images, and noises.

    ``num_prompts``: None takes half of the images, at most ``MOST_PROMPTS``.

    Raises:
        ConfigError: the data set has fewer than 2 ``num_prompts`` such images, or the template names an unknown factor.
    """
    rows = np.unique(dataset.rows)
    rows = rows[(dataset.attribute_values(rows) != UNKNOWN).all(axis=1)]
    num_prompts = min(MOST_PROMPTS, len(rows) // 2) if num_prompts is None else num_prompts
    if not 2 <= num_prompts <= len(rows) // 2:  # two, for the distances of their distributions
        raise ConfigError(
            f"prompt score: expected num_prompts of 2 to {len(rows) // 2}, half of the images of the test data with "
            f"known attributes, got {num_prompts}. Test on more images"
        )
    rows = np.random.default_rng(seed).choice(rows, 2 * num_prompts, replace=False)
    factors, vocabulary = dataset.attribute_values(rows[:num_prompts]), dataset.vocabulary
    words = vocabulary.word_labels(factors)
    if template is None:
        texts = [vocabulary.caption(phrases) for phrases in vocabulary.texts(factors)]
    else:
        texts = [_filled(template, vocabulary, row) for row in words]
    return PromptPlan(
        vocabulary=vocabulary,
        texts=texts,
        words=words,
        images=torch.from_numpy(dataset.images(rows[:num_prompts])),
        others=torch.from_numpy(dataset.images(rows[num_prompts:])),
        noise=seeded_noise(num_prompts, latent_shape, seed),
        seed=seed,
    )


def _filled(template: str, vocabulary: AttributeVocabulary, row: np.ndarray) -> str:
    names = vocabulary.factor_names
    try:
        return template.format(**{name: vocabulary.words[k][row[k]] for k, name in enumerate(names)})
    except (LookupError, ValueError) as error:
        expected = ", ".join(f"{{{name}}}" for name in names)
        raise ConfigError(f"PromptScore.template: expected fields {expected}, got {template!r}") from error


@dataclass(frozen=True)
class PromptResult:
    """The score; see the module's documentation."""

    factor_names: tuple[str, ...]
    strengths: tuple[float, ...]  # W
    accuracy: np.ndarray  # (W, F) in [0, 1]
    distance: np.ndarray  # (W,)
    real_accuracy: np.ndarray  # (F,) the judge's, on the images of the prompts
    real_distance: float  # between the images of the prompts and others
    chance: np.ndarray  # (F,)
    num_prompts: int

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""

        def by_factor(values: np.ndarray) -> dict[str, object]:
            return {name: _plain(value) for name, value in zip(self.factor_names, values.T)}

        return {
            "strengths": list(self.strengths),
            "mean_accuracy": _plain(self.accuracy.mean(axis=1)),
            "accuracy": by_factor(self.accuracy),
            "distance": _plain(self.distance),
            "chance": by_factor(self.chance),
            "judge_accuracy_on_real_images": by_factor(self.real_accuracy),
            "distance_of_real_images": plain_number(self.real_distance),
            "num_prompts": self.num_prompts,
        }


def _plain(values: np.ndarray) -> object:
    return [plain_number(value) for value in values] if values.ndim else plain_number(float(values))


def prompt_score(
    sample: PromptSampler,
    judge: AttributeJudge,
    plan: PromptPlan,
    strengths: Sequence[float],
    batch_size: int,
    device: torch.device | str = "cpu",
) -> PromptResult:
    """Sample and judge W N images, ``batch_size`` at once."""
    words = plan.vocabulary.word_labels
    real_values, real_features = _judged(judge, _batches(plan.images, batch_size, device))
    moments = Moments.of(_judged(judge, _batches(plan.others, batch_size, device))[1])
    accuracy, distance = [], []
    for strength in strengths:
        batches = []
        for start in range(0, len(plan.texts), batch_size):
            part = slice(start, start + batch_size)
            x_T = plan.noise[part].to(device)
            batches.append(sample_from(partial(_at, sample, strength), part, x_T, plan.seed + start, "prompt score"))
        values, features = _judged(judge, batches)
        accuracy.append((words(values) == plan.words).mean(axis=0))
        distance.append(frechet_distance(moments, Moments.of(features)))
        logger.info("prompt score: w = %g, accuracy %.3f", strength, accuracy[-1].mean())
    return PromptResult(
        factor_names=tuple(plan.vocabulary.factor_names),
        strengths=tuple(strengths),
        accuracy=np.stack(accuracy),
        distance=np.array(distance),
        real_accuracy=(words(real_values) == plan.words).mean(axis=0),
        real_distance=frechet_distance(moments, Moments.of(real_features)),
        chance=np.array([1 / len(available_words(plan.vocabulary, k)) for k in range(plan.vocabulary.num_units)]),
        num_prompts=len(plan.texts),
    )


def _at(sample: PromptSampler, strength: float, part: slice, x_T: Tensor) -> Tensor:
    return sample(part, x_T, strength)


def _batches(pixels: Tensor, batch_size: int, device: torch.device | str) -> list[Tensor]:
    """Return images (n, H, W, 3) uint8 as batches (B, 3, H, W) in [-1, 1]."""
    return [images_from_batch({"image": part.to(device)}) for part in pixels.split(batch_size)]


@torch.no_grad()
def _judged(judge: AttributeJudge, batches: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Return values (n, F) and features (n, D) of batches of images (B, 3, H, W) in [-1, 1]."""
    values, features = ([f(images).cpu().numpy() for images in batches] for f in (judge.predict_values, judge.features))
    return np.concatenate(values), np.concatenate(features)


def joint_figures(model: HasJointSpace, plan: PromptPlan, batch_size: int) -> dict[str, float]:
    """Return how far images and their prompts are apart in the joint space, as embedded and as conditions.

    Returns:
        ``modality_gap`` (Liang et al. 2022, Eq. 1) and ``pair_cosine``, the mean cosine of an image and its prompt, of
        the conditions; with suffix ``_before``, of the embeddings.
    """
    batches = _batches(plan.images, batch_size, model.device)
    parts = [plan.texts[start : start + batch_size] for start in range(0, len(plan.texts), batch_size)]
    embedded = [model.joint_embeddings(images, texts) for images, texts in zip(batches, parts)]
    treated = [
        (model.condition_from_images(images).value, model.condition_from_texts(texts).value)
        for images, texts in zip(batches, parts)
    ]
    figures = {}
    for suffix, pairs in (("_before", embedded), ("", treated)):
        images, texts = (torch.cat(vectors) for vectors in zip(*pairs))
        figures[f"modality_gap{suffix}"] = modality_gap(images, texts)
        figures[f"pair_cosine{suffix}"] = torch.cosine_similarity(images, texts).mean().item()
    return figures
