"""Names for the units of an unsupervised model, given by CLIP.

Each unit is moved over its range while all else, the noise included, stands still, and CLIP looks at the images. An
attribute is a list of words of which an image has one ("red floor", "blue floor", ...); CLIP's zero-shot posterior
p_f(w | x) says which word of attribute f it sees. With a path of P images x_1 ... x_P, the effect of a unit on f is

    E_f = mean over pairs i < j of 1/2 sum_w |p_f(w | x_i) - p_f(w | x_j)|        (total variation, in [0, 1])

averaged over base images. The unit is named after the attribute with the largest effect. Its confidence is the share
of bootstrap resamples of the base images in which that attribute has the largest effect: close to 1 where every image
tells the same story. A unit that moves no attribute is not named.

Dims: N base images, P points of a path, U units, F attributes, W_f words of an attribute, D width of CLIP's space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.vocabulary import AttributeVocabulary
from ldm.models.diffusion.traversal import UnitModel, decode_in_parts, traversed_codes, unit_path
from ldm.modules.encoders.zero_shot import attribute_probabilities
from ldm.util import ConfigError

LEAST_EFFECT = 0.1  # below it CLIP's reading hardly moves, and a name would be a guess
RESAMPLES = 200


class ImageEncoder(Protocol):
    """CLIP's image half."""

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, D)."""


@dataclass(frozen=True)
class ClipReader:
    """CLIP's zero-shot reading of the attributes of a vocabulary.

    Attributes:
        encode: image half.
        texts: for each of F attributes the normalised text embeddings (W_f, D).
        logit_scale: CLIP's inverse temperature.
    """

    encode: ImageEncoder
    texts: Sequence[Tensor]
    logit_scale: float

    def __call__(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> F posteriors (B, W_f)."""
        return attribute_probabilities(self.encode(images), self.texts, self.logit_scale)


@dataclass
class UnitName:
    """What was found about one unit.

    Attributes:
        unit: index from 0.
        name: its attribute, empty where it moves none.
        words: the words CLIP sees at the low and the high end of its range.
        confidence: share of bootstrap resamples that give the same attribute.
        effects: effect on every attribute, (F,).
        checks: other answers to the same question, by who gave them.
    """

    unit: int
    name: str
    words: tuple[str, str]
    confidence: float
    effects: np.ndarray
    checks: dict[str, str] = field(default_factory=dict)

    def to_dict(self, attributes: Sequence[str]) -> dict[str, Any]:
        """Plain values for JSON; units are counted from 1 as in pictures."""
        return {
            "unit": self.unit + 1,
            "name": self.name,
            "words": list(self.words),
            "confidence": round(self.confidence, 3),
            "effects": {name: round(float(effect), 4) for name, effect in zip(attributes, self.effects)},
            **self.checks,
        }


def clip_reader(text_encoder: Any, image_encoder: ImageEncoder, vocabulary: AttributeVocabulary) -> ClipReader:
    """A reader of a vocabulary's words; each word stands for the mean direction of all its phrasings.

    Args:
        text_encoder: ``vocabulary_embeddings(lists of texts) -> list of (n, D)`` and ``logit_scale``.
        image_encoder: the same CLIP's image half.
        vocabulary: the attributes.
    """
    texts = []
    for attribute, words in enumerate(vocabulary.words):
        phrases = [vocabulary.phrases(attribute, word) for word in range(len(words))]
        means = [embedding.mean(dim=0) for embedding in text_encoder.vocabulary_embeddings(phrases)]
        texts.append(F.normalize(torch.stack(means), dim=-1))
    return ClipReader(image_encoder, texts, text_encoder.logit_scale)


def vocabulary_of(words: Mapping[str, Sequence[str]]) -> AttributeVocabulary:
    """A vocabulary from plain lists, ``{"expression": ["a smiling face", "a serious face"], ...}``.

    Raises:
        ConfigError: an attribute has fewer than two words, or there are fewer than two attributes.
    """
    short = [name for name, choices in words.items() if isinstance(choices, str) or len(choices) < 2]
    if short or len(words) < 2:
        raise ConfigError(
            "a vocabulary for naming units needs two or more attributes of two or more words each, as in {expression: "
            f"[a smiling face, a serious face], hair: [dark hair, fair hair]}}; found {dict(words)!r}"
        )
    choices = [[str(word) for word in entry] for entry in words.values()]
    return AttributeVocabulary(list(words), choices, [range(len(entry)) for entry in choices], [["{}"]] * len(choices))


def path_effects(posteriors: Sequence[Tensor], points: int) -> np.ndarray:
    """Effect on every attribute for every base image.

    Args:
        posteriors: F tensors (N * P, W_f), image-major.
        points: P.

    Returns:
        (N, F) in [0, 1].
    """
    first, second = torch.triu_indices(points, points, offset=1)
    effects = []
    for posterior in posteriors:
        path = posterior.unflatten(0, (-1, points))  # (N, P, W)
        effects.append(0.5 * (path[:, first] - path[:, second]).abs().sum(dim=2).mean(dim=1))
    return torch.stack(effects, dim=1).double().cpu().numpy()


def name_unit(unit: int, posteriors: Sequence[Tensor], points: int, vocabulary: AttributeVocabulary) -> UnitName:
    """Name one unit from CLIP's reading of its paths; the arguments are those of :func:`path_effects`."""
    by_image = path_effects(posteriors, points)
    effects = by_image.mean(axis=0)
    best = int(effects.argmax())
    draws = np.random.RandomState(0).randint(len(by_image), size=(RESAMPLES, len(by_image)))
    confidence = float((by_image[draws].mean(axis=1).argmax(axis=1) == best).mean())
    if effects[best] < LEAST_EFFECT:
        return UnitName(unit, "", ("", ""), confidence, effects)
    ends = posteriors[best].unflatten(0, (-1, points)).mean(dim=0)  # (P, W)
    low, high = (vocabulary.words[best][int(ends[point].argmax())] for point in (0, -1))
    return UnitName(unit, vocabulary.factor_names[best], (low, high), confidence, effects)


@torch.no_grad()
def traverse_units(
    model: UnitModel, codes: Tensor, base: Tensor, x_T: Tensor, points: int, **sampling: Any
) -> list[Tensor]:
    """Images of every unit over its range.

    Args:
        model: in evaluation mode, its averaged weights in place.
        codes: (n, U[, D]) of real images, which give the ranges.
        base: (N, U[, D]) of the images that are changed.
        x_T: (N, C, h, w) their noise.
        points: P, at least 2.
        **sampling: options of ``decode_units``.

    Returns:
        U tensors (N * P, 3, H, W) in [-1, 1], image-major.
    """
    noise = x_T.repeat_interleave(points, dim=0)
    return [
        decode_in_parts(model, traversed_codes(base, unit_path(codes, unit, points), unit), noise, **sampling)
        for unit in range(model.latent_unit)
    ]


def name_units(
    paths: Sequence[Tensor], points: int, reader: ClipReader, vocabulary: AttributeVocabulary, batch_size: int = 256
) -> list[UnitName]:
    """Name every unit from the images of its path (see :func:`traverse_units`)."""
    names = []
    for unit, images in enumerate(paths):
        parts = [reader(part) for part in images.split(batch_size)]
        posteriors = [torch.cat(attribute) for attribute in zip(*parts)]
        names.append(name_unit(unit, posteriors, points, vocabulary))
    return names


def judged_names(paths: Sequence[Tensor], points: int, values_of: Any, vocabulary: AttributeVocabulary) -> list[str]:
    """The same question put to a judge of the true factors: what share of the pairs of a path differs in each word?

    Args:
        paths, points: see :func:`traverse_units`.
        values_of: images (B, 3, H, W) -> factor values (B, F) int.
        vocabulary: words of the values.

    Returns:
        a factor's name for each unit, empty where hardly any word changes.
    """
    first, second = np.triu_indices(points, k=1)
    names = []
    for images in paths:
        values = torch.cat([values_of(part).cpu() for part in images.split(256)]).numpy()
        words = vocabulary.word_labels(values).reshape(-1, points, vocabulary.num_units)
        changed = (words[:, first] != words[:, second]).mean(axis=(0, 1))  # (F,)
        names.append(vocabulary.factor_names[changed.argmax()] if changed.max() >= LEAST_EFFECT else "")
    return names


def agreement(names: Sequence[UnitName], check: str) -> tuple[int, int]:
    """How many of the units that both CLIP and a check name get the same name, and how many these are."""
    both = [name for name in names if name.name and name.checks.get(check)]
    return sum(name.name == name.checks[check] for name in both), len(both)
