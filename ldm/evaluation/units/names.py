"""Names of the units of an unsupervised model, by CLIP.

Each unit moves over its range while the other units and the noise are fixed. An attribute is a list of words of which
an image has one ("red floor", "blue floor", ...); CLIP's zero-shot posterior p_f(w | x) gives the word of attribute f.
On a path of P images x_1 ... x_P, the effect of a unit on f is

    E_f = mean over pairs i < j of 1/2 sum_w |p_f(w | x_i) - p_f(w | x_j)|        (total variation, in [0, 1])

averaged over base images. A unit is named after the attribute with the largest effect, and not named below
``LEAST_EFFECT``. Its confidence is the share of bootstrap resamples of images in which it has the largest effect.

Dimensions: N base images, P points of a path, U units, F attributes, W_f words of an attribute, D CLIP's width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from ldm.data.vocabulary import AttributeVocabulary
from ldm.diffusion.samplers import Sampler
from ldm.models.contracts import HasUnits
from ldm.models.diffusion.traversal import decode_in_parts, traversed_codes, unit_path
from ldm.modules.encoders.zero_shot import attribute_probabilities

LEAST_EFFECT = 0.1
RESAMPLES = 200

Reader = Callable[[Tensor], list[Tensor]]  # images (B, 3, H, W) in [-1, 1] -> F posteriors (B, W_f)


@dataclass
class UnitName:
    """The name of one unit."""

    unit: int  # index from 0
    name: str  # its attribute; empty without a name
    words: tuple[str, str]  # CLIP's words at the low and the high end of its range
    confidence: float  # share of bootstrap resamples that give the same attribute
    effects: np.ndarray  # effect on every attribute, (F,)
    checks: dict[str, str] = field(default_factory=dict)  # names by other methods, by method

    def to_dict(self, attributes: Sequence[str]) -> dict[str, Any]:
        """Return plain values for JSON; units are counted from 1, as in pictures."""
        return {
            "unit": self.unit + 1,
            "name": self.name,
            "words": list(self.words),
            "confidence": round(self.confidence, 3),
            "effects": {name: round(float(effect), 4) for name, effect in zip(attributes, self.effects)},
            **self.checks,
        }


def clip_reader(
    text_encoder: Any, image_encoder: Callable[[Tensor], Tensor], vocabulary: AttributeVocabulary
) -> Reader:
    """Return CLIP's zero-shot posterior of a vocabulary; each word is the mean direction of its phrasings.

    Args:
        text_encoder: has ``vocabulary_embeddings(lists of texts) -> list of (n, D)`` and ``logit_scale``.
        image_encoder: images (B, 3, H, W) -> (B, D), of the same CLIP.
        vocabulary: the attributes.
    """
    texts = []
    for attribute, words in enumerate(vocabulary.words):
        phrases = [vocabulary.phrases(attribute, word) for word in range(len(words))]
        means = [embedding.mean(dim=0) for embedding in text_encoder.vocabulary_embeddings(phrases)]
        texts.append(F.normalize(torch.stack(means), dim=-1))
    return lambda images: attribute_probabilities(image_encoder(images), texts, text_encoder.logit_scale)


def path_effects(posteriors: Sequence[Tensor], points: int) -> np.ndarray:
    """Return the effects (N, F) in [0, 1] for ``posteriors``, F tensors (N * P, W_f), image-major; ``points`` is P."""
    first, second = torch.triu_indices(points, points, offset=1)
    effects = []
    for posterior in posteriors:
        path = rearrange(posterior, "(n p) w -> n p w", p=points)
        effects.append(0.5 * (path[:, first] - path[:, second]).abs().sum(dim=2).mean(dim=1))
    return torch.stack(effects, dim=1).double().cpu().numpy()


def name_unit(unit: int, posteriors: Sequence[Tensor], points: int, vocabulary: AttributeVocabulary) -> UnitName:
    """Name one unit from CLIP's posteriors on its paths; arguments as for :func:`path_effects`."""
    by_image = path_effects(posteriors, points)
    effects = by_image.mean(axis=0)
    best = int(effects.argmax())
    draws = np.random.RandomState(0).randint(len(by_image), size=(RESAMPLES, len(by_image)))
    confidence = float((by_image[draws].mean(axis=1).argmax(axis=1) == best).mean())
    if effects[best] < LEAST_EFFECT:
        return UnitName(unit, "", ("", ""), confidence, effects)
    ends = reduce(posteriors[best], "(n p) w -> p w", "mean", p=points)
    low, high = (vocabulary.words[best][int(ends[point].argmax())] for point in (0, -1))
    return UnitName(unit, vocabulary.factor_names[best], (low, high), confidence, effects)


@torch.no_grad()
def traverse_units(
    model: HasUnits, codes: Tensor, base: Tensor, x_T: Tensor, points: int, sampler: Sampler
) -> list[Tensor]:
    """Return images of every unit over its range.

    Args:
        model: the model in evaluation mode, with its averaged weights.
        codes: (n, U[, D]) of real images, which give the ranges.
        base: (N, U[, D]) of the images that are changed.
        x_T: (N, C, h, w) noise.
        points: P, at least 2.
        sampler: the sampler.

    Returns:
        U tensors (N * P, 3, H, W) in [-1, 1], image-major.
    """
    noise = x_T.repeat_interleave(points, dim=0)
    return [
        decode_in_parts(model, traversed_codes(base, unit_path(codes, unit, points), unit), noise, sampler=sampler)
        for unit in range(model.latent_unit)
    ]


def name_units(
    paths: Sequence[Tensor], points: int, reader: Reader, vocabulary: AttributeVocabulary, batch_size: int = 256
) -> list[UnitName]:
    """Name every unit from the images of its path (see :func:`traverse_units`)."""
    names = []
    for unit, images in enumerate(paths):
        parts = [reader(part) for part in images.split(batch_size)]
        posteriors = [torch.cat(attribute) for attribute in zip(*parts)]
        names.append(name_unit(unit, posteriors, points, vocabulary))
    return names


def judged_names(paths: Sequence[Tensor], points: int, values_of: Any, vocabulary: AttributeVocabulary) -> list[str]:
    """Name every unit by a judge of the true factors: the one whose word differs in most pairs of a path.

    ``values_of`` maps images (B, 3, H, W) to factor values (B, F). A name is empty below a share of ``LEAST_EFFECT``.
    """
    first, second = np.triu_indices(points, k=1)
    names = []
    for images in paths:
        values = torch.cat([values_of(part).cpu() for part in images.split(256)]).numpy()
        words = rearrange(vocabulary.word_labels(values), "(n p) f -> n p f", p=points)
        changed = (words[:, first] != words[:, second]).mean(axis=(0, 1))  # (F,)
        names.append(vocabulary.factor_names[changed.argmax()] if changed.max() >= LEAST_EFFECT else "")
    return names


def agreement(names: Sequence[UnitName], check: str) -> tuple[int, int]:
    """Return how many units have the same name by CLIP and by a check, and how many are named by both."""
    both = [name for name in names if name.name and name.checks.get(check)]
    return sum(name.name == name.checks[check] for name in both), len(both)
