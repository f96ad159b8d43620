"""The edit score: change one attribute's text, sample again from the same noise, and judge what changed.

Protocol, for U text units where unit k describes factor k of F = U:

1. Draw N tuples of factor values uniformly (one ``RandomState(seed)``); their canonical phrases are the base texts.
2. Sample N base images from noises x_T, drawn on the CPU with the same seed.
3. For each unit k and each of the N, draw another word of attribute k uniformly; replace the text of unit k by its
   canonical phrase, and sample again from the *same* x_T. A stochastic sampler draws the same noise for an image and
   its edits.
4. A factor judge, trained on real images, predicts the factor values of all images; the vocabulary maps values to
   words. Where several values share a word ("tiny" has two sizes), each of them is correct.
5. ``matrix[k, k]`` is the accuracy of unit k: the share of its N edits whose judged word of factor k is the requested
   one. ``matrix[k, f]``, f != k, is leakage: the share whose judged word of factor f differs from the base image's.

Edit accuracy is the mean of the diagonal, edit leakage the mean of the other entries. A model that ignores its text has
no leakage and an accuracy near chance, 1 / number of words. Dimensions: N samples, U units, F factors, C h w latent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.dataset import FactorDataset
from ldm.data.vocabulary import AttributeVocabulary
from ldm.diffusion.noise import fixed_noise, seeded_noise
from ldm.models.inputs import images_from_batch
from ldm.pictures.grid import CaptionedGrid
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

# (texts: B lists of U strings, x_T: (B, C, h, w)) -> images (B, 3, H, W) in [-1, 1].
Editor = Callable[[list[list[str]], Tensor], Tensor]
# Images (B, 3, H, W) in [-1, 1] -> factor values (B, F) int64, such as ``AttributeJudge.predict_values``.
Judge = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EditPlan:
    """Texts and noises of all images."""

    vocabulary: AttributeVocabulary  # words of the attributes
    factors: np.ndarray  # (N, F) int64 values of the base images
    words: np.ndarray  # (N, F) int64 words of the base images
    asked: np.ndarray  # (U, N) int64, the other word requested of unit k
    noise: Tensor  # (N, C, h, w) float32 on the CPU, x_T of each image and of its edits
    seed: int  # seed of all draws

    def base_texts(self, part: slice) -> list[list[str]]:
        """Return the texts of some base images."""
        return self.vocabulary.texts(self.factors[part])

    def edited_texts(self, unit: int, words: np.ndarray, part: slice) -> list[list[str]]:
        """Return the same texts with unit ``unit`` changed to ``words``, one for each image of the part."""
        texts = self.base_texts(part)
        for strings, word in zip(texts, words.tolist()):
            strings[unit] = self.vocabulary.phrases(unit, word)[0]
        return texts


def available_words(vocabulary: AttributeVocabulary, unit: int) -> np.ndarray:
    """Return the words of an attribute that belong to a factor value, sorted."""
    return np.unique(vocabulary.value_to_word[unit])


def plan_edits(vocabulary: AttributeVocabulary, latent_shape: tuple[int, ...], num_samples: int, seed: int) -> EditPlan:
    """Draw base factors, requested words and noises.

    Raises:
        ConfigError: an attribute has one word only, or ``num_samples`` is not positive.
    """
    if num_samples < 1:
        raise ConfigError(f"edit score: expected num_samples of at least 1, got num_samples={num_samples}")
    random_state = np.random.RandomState(seed)
    columns = [random_state.randint(len(values), size=num_samples) for values in vocabulary.value_to_word]
    factors = np.stack(columns, axis=1).astype(np.int64)
    words = vocabulary.word_labels(factors)
    asked = np.empty((vocabulary.num_units, num_samples), dtype=np.int64)
    for k, name in enumerate(vocabulary.factor_names):
        choices = available_words(vocabulary, k)
        if len(choices) < 2:
            raise ConfigError(
                f"edit score: expected two or more words of {name!r}, got the single word {vocabulary.words[k]}"
            )
        shift = random_state.randint(1, len(choices), size=num_samples)  # at least 1: another word
        asked[k] = choices[(np.searchsorted(choices, words[:, k]) + shift) % len(choices)]
    return EditPlan(vocabulary, factors, words, asked, seeded_noise(num_samples, latent_shape, seed), seed)


def sample_from(
    edit: Callable[[Any, Tensor], Tensor], texts: Any, x_T: Tensor, seed: int, purpose: str = "edit score"
) -> Tensor:
    """Sample with torch's generators seeded, and restore their states; ``purpose`` begins the error message.

    Raises:
        UserError: an image contains NaN or infinity.
    """
    # Not the seed itself: x_T was drawn with it, and the sampler's noise must not repeat x_T.
    own_seed = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])
    with fixed_noise(own_seed, x_T.device), torch.no_grad():
        images = edit(texts, x_T)
    num_broken = int((~images.isfinite()).flatten(1).any(dim=1).sum())
    if num_broken:
        raise UserError(
            f"{purpose}: expected finite images, got NaN or infinity in {num_broken} of {len(images)} sampled images. "
            "Training has diverged: see train/loss, test an earlier checkpoint, or train with a smaller learning rate"
        )
    return images


@dataclass(frozen=True)
class EditResult:
    """The score; see the module's documentation."""

    factor_names: tuple[str, ...]  # names of the U = F factors
    num_samples: int  # N
    matrix: np.ndarray  # (U, F) float in [0, 1]; accuracy on the diagonal, leakage off it
    # Share of edits after which the judged *value* differs: stricter than words, and sensitive to the judge's errors.
    value_changes: np.ndarray  # (U, F) float in [0, 1]
    base_accuracy: np.ndarray  # (F,) float, share of base images whose judged word is the requested one
    chance: np.ndarray  # (U,) float, accuracy of a model that ignores the text

    @property
    def edit_accuracy(self) -> float:
        """Mean accuracy over units."""
        return float(np.diag(self.matrix).mean())

    @property
    def edit_leakage(self) -> float:
        """Mean leakage over units; NaN for a single factor."""
        return float(_off_diagonal_means(self.matrix).mean())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; NaN becomes ``None``."""
        by_factor = {
            "accuracy": np.diag(self.matrix),
            "leakage": _off_diagonal_means(self.matrix),
            "chance": self.chance,
            "base_accuracy": self.base_accuracy,
            "value_leakage": _off_diagonal_means(self.value_changes),
        }
        return {
            "edit_accuracy": plain_number(self.edit_accuracy),
            "edit_leakage": plain_number(self.edit_leakage),
            **{key: dict(zip(self.factor_names, map(plain_number, row))) for key, row in by_factor.items()},
            "factor_names": list(self.factor_names),
            "matrix": [[plain_number(value) for value in row] for row in self.matrix],
            "value_changes": [[plain_number(value) for value in row] for row in self.value_changes],
            "num_samples": self.num_samples,
        }


def plain_number(value: float) -> float | None:
    """Return a number for JSON, rounded; ``None`` for NaN."""
    return None if np.isnan(value) else round(float(value), 6)


def _off_diagonal_means(matrix: np.ndarray) -> np.ndarray:
    """Return the mean of each row without its diagonal entry; NaN for a single column."""
    others = matrix[~np.eye(len(matrix), dtype=bool)].reshape(len(matrix), -1)
    return others.mean(axis=1) if others.size else np.full(len(matrix), np.nan)


def summarise_edits(plan: EditPlan, base: np.ndarray, edited: np.ndarray) -> EditResult:
    """Compute the score from judged values of the base images (N, F) and of the edits (U, N, F)."""
    vocabulary = plan.vocabulary
    base_words = vocabulary.word_labels(base)
    edited_words = np.stack([vocabulary.word_labels(values) for values in edited])
    matrix = (edited_words != base_words).mean(axis=1)
    units = np.arange(vocabulary.num_units)
    matrix[units, units] = [(edited_words[k, :, k] == plan.asked[k]).mean() for k in units]
    return EditResult(
        factor_names=tuple(vocabulary.factor_names),
        num_samples=len(base),
        matrix=matrix,
        value_changes=(edited != base).mean(axis=1),
        base_accuracy=(base_words == plan.words).mean(axis=0),
        chance=np.array([1 / len(available_words(vocabulary, k)) for k in units]),
    )


def edit_score(
    edit: Editor, judge: Judge, plan: EditPlan, batch_size: int, device: torch.device | str = "cpu"
) -> EditResult:
    """Sample and judge the base images and all edits, (1 + U) * N images, ``batch_size`` at once."""
    num_samples, num_units = len(plan.factors), plan.vocabulary.num_units
    values = np.empty((1 + num_units, num_samples, num_units), dtype=np.int64)  # row 0: the base images
    for start in range(0, num_samples, batch_size):
        part = slice(start, min(start + batch_size, num_samples))
        x_T = plan.noise[part].to(device)
        texts = [plan.base_texts(part)]
        texts += [plan.edited_texts(k, plan.asked[k, part], part) for k in range(num_units)]
        for row, row_texts in enumerate(texts):
            images = sample_from(edit, row_texts, x_T, plan.seed + start)
            values[row, part] = judge(images).cpu().numpy()
        logger.info("edit score: %d of %d samples and their edits", part.stop, num_samples)
    return summarise_edits(plan, values[0], values[1:])


def edit_grid(edit: Editor, plan: EditPlan, columns: int, device: torch.device | str = "cpu") -> CaptionedGrid:
    """Return a picture of the first ``columns`` samples: the base images, then one row per changed attribute.

    All images of a row are asked for the same word, the one that the fewest base images have already.
    """
    part = slice(0, min(columns, len(plan.factors)))
    x_T = plan.noise[part].to(device)
    texts, rows = plan.base_texts(part), ["as in the text above"]
    images = [sample_from(edit, texts, x_T, plan.seed)]
    for k, name in enumerate(plan.vocabulary.factor_names):
        choices = available_words(plan.vocabulary, k)
        choices = np.roll(choices, -((plan.seed + k) % len(choices)))  # ties go to another word in each row
        word = min(choices, key=lambda choice, k=k: (plan.words[part, k] == choice).sum())
        edited = plan.edited_texts(k, np.full(len(texts), word), part)
        images.append(sample_from(edit, edited, x_T, plan.seed))
        rows.append(f"{name.replace('_', ' ')}\n→ {plan.vocabulary.phrases(k, word)[0]}")
    captions = ["\n".join(strings) for strings in texts]
    return CaptionedGrid(torch.cat(images).cpu(), rows, captions, "One attribute's text changed, same noise")


def judge_accuracy(
    judge: Judge, dataset: FactorDataset, batch_size: int, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, int]:
    """Judge the images of a data set's validation split, which the judge was not trained on.

    Returns:
        (F,) float share of correct words of each factor, and the number of images.
    """
    rows, words = dataset.rows_of("validation"), dataset.vocabulary.word_labels
    values = []
    for start in range(0, len(rows), batch_size):
        pixels = torch.from_numpy(dataset.images(rows[start : start + batch_size])).to(device)
        values.append(judge(images_from_batch({"image": pixels})).cpu().numpy())
    hits = words(np.concatenate(values)) == words(dataset.space.factors_of(rows))
    return hits.mean(axis=0), len(rows)
