"""The edit score: change one attribute's text, sample again from the same noise, and judge what changed.

Protocol, for U text units, unit k speaking of factor k of F = U:

1. Draw N tuples of factor values uniformly (one ``RandomState(seed)``); their canonical phrases are the base texts.
2. Sample N base images from the noises x_T (``torch.Generator`` with the same seed, drawn on the CPU).
3. For each unit k draw, for each of the N, another word of attribute k uniformly among the words it does not have;
   replace the text of unit k alone, by the word's canonical phrase, and sample again from the *same* x_T. A sampler
   that draws noise on its way (eta > 0) meets the same draws for an image and its edits.
4. A factor judge, trained on real images, reads the factor values off every image; values become words by the
   vocabulary. Where several values share a word ("tiny" has two sizes) any of them is right.
5. ``matrix[k, k]`` is the accuracy of unit k: the share of its N edited images whose judged word of factor k is the
   asked one. ``matrix[k, f]``, f != k, is leakage: the share whose judged word of factor f differs between the base
   image and its edit.

Edit accuracy is the mean of the diagonal, edit leakage the mean of all else. A model that ignores its text has no
leakage and an accuracy near chance, 1 / number of words; one that draws anew at each edit leaks. Dims: N samples,
U units, F factors, C H W the latent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.data.dataset import FactorDataset
from ldm.data.vocabulary import AttributeVocabulary
from ldm.pictures.grid import CaptionedGrid
from ldm.util import UserError

log = logging.getLogger(__name__)

EditSampler = Callable[[list[list[str]], Tensor], Tensor]
"""(texts: B lists of U strings, x_T: (B, C, H, W)) -> images (B, 3, h, w) in [-1, 1]."""


class Judge(Protocol):
    """Whatever reads factor values off images, e.g. ``ldm.models.judge.FactorJudge``."""

    def predict_values(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) in [-1, 1] -> (B, F) int64."""


@dataclass(frozen=True)
class EditPlan:
    """What is asked of the model.

    Attributes:
        vocabulary: Words of the attributes.
        factors: (N, F) int64 values of the base images.
        words: (N, F) int64 words of the base images.
        asked: (U, N) int64, the other word asked of unit k.
        noise: (N, C, H, W) float32 on the CPU, x_T of each image and of its edits.
        seed: Where all of it came from.
    """

    vocabulary: AttributeVocabulary
    factors: np.ndarray
    words: np.ndarray
    asked: np.ndarray
    noise: Tensor
    seed: int

    def base_texts(self, part: slice) -> list[list[str]]:
        """Texts of some base images."""
        return self.vocabulary.texts(self.factors[part])

    def edited_texts(self, unit: int, words: np.ndarray, part: slice) -> list[list[str]]:
        """The same texts, with unit ``unit`` speaking of ``words`` (one for each image of the part) instead."""
        texts = self.base_texts(part)
        for strings, word in zip(texts, words.tolist()):
            strings[unit] = self.vocabulary.phrases(unit, word)[0]
        return texts


def available_words(vocabulary: AttributeVocabulary, unit: int) -> np.ndarray:
    """Words of an attribute that some factor value has, sorted."""
    return np.unique(vocabulary.value_to_word[unit])


def plan_edits(vocabulary: AttributeVocabulary, latent_shape: tuple[int, ...], num_samples: int, seed: int) -> EditPlan:
    """Draw base factors, asked words and noises.

    Raises:
        ValueError: An attribute has a single word, so there is nothing to change it to, or no samples are wanted.
    """
    if num_samples < 1:
        raise ValueError(f"The edit score needs at least one sample, found num_samples={num_samples}.")
    random_state = np.random.RandomState(seed)
    columns = [random_state.randint(len(values), size=num_samples) for values in vocabulary.value_to_word]
    factors = np.stack(columns, axis=1).astype(np.int64)
    words = vocabulary.word_labels(factors)
    asked = np.empty((vocabulary.num_units, num_samples), dtype=np.int64)
    for k, name in enumerate(vocabulary.factor_names):
        choices = available_words(vocabulary, k)
        if len(choices) < 2:
            raise ValueError(f"Attribute {name!r} has the single word {vocabulary.words[k]}: it cannot be edited.")
        shift = random_state.randint(1, len(choices), size=num_samples)  # never 0: always another word
        asked[k] = choices[(np.searchsorted(choices, words[:, k]) + shift) % len(choices)]
    noise = torch.randn((num_samples, *latent_shape), generator=torch.Generator().manual_seed(seed))
    return EditPlan(vocabulary, factors, words, asked, noise, seed)


def sample_from(sampler: EditSampler, texts: list[list[str]], x_T: Tensor, seed: int) -> Tensor:
    """Sample with torch's generators set by ``seed``, and leave them as they were.

    Raises:
        UserError: An image holds NaN or infinity; judging it would give a number that means nothing.
    """
    devices = [x_T.device] if x_T.device.type == "cuda" else []
    # Not the seed itself: x_T was drawn with it, and the sampler's own noise must not repeat x_T.
    own_seed = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(own_seed)
        images = sampler(texts, x_T)
    num_broken = int((~images.isfinite()).flatten(1).any(dim=1).sum())
    if num_broken:
        raise UserError(
            f"{num_broken} of {len(images)} sampled images hold NaN or infinity, so there is no edit score: the model "
            "has diverged. Look at train/loss and test an earlier checkpoint, or train with a smaller learning rate."
        )
    return images


@dataclass(frozen=True)
class EditResult:
    """The score and what belongs to it; see the module's text for the protocol.

    Attributes:
        factor_names: Names of the U = F factors.
        num_samples: N.
        matrix: (U, F) float in [0, 1]; accuracy on the diagonal, leakage off it.
        value_changes: (U, F) float in [0, 1], share of edits after which the judged *value* of a factor differs:
            stricter than words, and sensitive to the judge's own errors.
        base_accuracy: (F,) float, share of base images whose judged word is the asked one.
        chance: (U,) float, accuracy of a model that ignores the text.
    """

    factor_names: tuple[str, ...]
    num_samples: int
    matrix: np.ndarray
    value_changes: np.ndarray
    base_accuracy: np.ndarray
    chance: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        """(U,) share of edits that became what was asked."""
        return np.diag(self.matrix)

    @property
    def leakage(self) -> np.ndarray:
        """(U,) mean share of the other factors whose word changed; NaN if there is no other."""
        return _off_diagonal_means(self.matrix)

    @property
    def value_leakage(self) -> np.ndarray:
        """(U,) the same for exact factor values."""
        return _off_diagonal_means(self.value_changes)

    @property
    def edit_accuracy(self) -> float:
        """Mean accuracy over units."""
        return float(self.accuracy.mean())

    @property
    def edit_leakage(self) -> float:
        """Mean leakage over units."""
        return float(self.leakage.mean())


def _off_diagonal_means(matrix: np.ndarray) -> np.ndarray:
    """Mean of each row without its diagonal entry; NaN for a single column."""
    others = matrix[~np.eye(len(matrix), dtype=bool)].reshape(len(matrix), -1)
    return others.mean(axis=1) if others.size else np.full(len(matrix), np.nan)


def summarise_edits(plan: EditPlan, base: np.ndarray, edited: np.ndarray) -> EditResult:
    """From judged values to the score.

    Args:
        plan: What was asked.
        base: (N, F) int judged values of the base images.
        edited: (U, N, F) int judged values of the edited images.
    """
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
    sampler: EditSampler, judge: Judge, plan: EditPlan, batch_size: int, device: torch.device | str = "cpu"
) -> EditResult:
    """Sample base images and all edits, judge them, and sum up.

    Args:
        sampler: Makes images of texts from noise.
        judge: Reads factor values; expects images on ``device``.
        plan: What to ask, from :func:`plan_edits`.
        batch_size: Images sampled at once. Parts are cut the same way for base images and edits.
        device: Where the sampler wants its noise.

    Returns:
        The score of (1 + U) * N sampled images.
    """
    num_samples, num_units = len(plan.factors), plan.vocabulary.num_units
    values = np.empty((1 + num_units, num_samples, num_units), dtype=np.int64)  # row 0: the base images
    for start in range(0, num_samples, batch_size):
        part = slice(start, min(start + batch_size, num_samples))
        x_T = plan.noise[part].to(device)
        texts = [plan.base_texts(part)]
        texts += [plan.edited_texts(k, plan.asked[k, part], part) for k in range(num_units)]
        for row, row_texts in enumerate(texts):
            images = sample_from(sampler, row_texts, x_T, plan.seed + start)
            values[row, part] = judge.predict_values(images).cpu().numpy()
        log.info("Edit score: %d of %d samples and their edits", part.stop, num_samples)
    return summarise_edits(plan, values[0], values[1:])


def edit_grid(sampler: EditSampler, plan: EditPlan, columns: int, device: torch.device | str = "cpu") -> CaptionedGrid:
    """Picture of the first ``columns`` samples: the base images, then one row per changed attribute.

    All images of a row are asked for the same word, the one that fewest of the base images have already.
    """
    part = slice(0, min(columns, len(plan.factors)))
    x_T = plan.noise[part].to(device)
    texts, rows = plan.base_texts(part), ["as in the text above"]
    images = [sample_from(sampler, texts, x_T, plan.seed)]
    for k, name in enumerate(plan.vocabulary.factor_names):
        word = _rarest(available_words(plan.vocabulary, k), plan.words[part, k], start=plan.seed + k)
        edited = plan.edited_texts(k, np.full(len(texts), word), part)
        images.append(sample_from(sampler, edited, x_T, plan.seed))
        rows.append(f"{name.replace('_', ' ')}\n→ {plan.vocabulary.phrases(k, word)[0]}")
    captions = ["\n".join(strings) for strings in texts]
    return CaptionedGrid(torch.cat(images).cpu(), rows, captions, "One attribute's text changed, same noise")


def _rarest(choices: np.ndarray, present: np.ndarray, start: int) -> int:
    """The choice that occurs least in ``present``; ties go to the first at or after place ``start``."""
    rotated = np.roll(choices, -(start % len(choices)))
    counts = [(present == choice).sum() for choice in rotated]
    return int(rotated[int(np.argmin(counts))])


def judge_accuracy(
    judge: Judge,
    dataset: FactorDataset,
    vocabulary: AttributeVocabulary,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, int]:
    """How often the judge itself is right, on real images it was not trained on.

    Args:
        judge: The judge, on ``device``.
        dataset: Any split of the data set; the images judged are those of its validation split.
        vocabulary: Words of the attributes.
        batch_size: Images judged at once.
        device: Where the judge wants its images.

    Returns:
        (F,) float share of right words for each factor, and the number of images.
    """
    rows = dataset.rows_of("validation")
    factors, values = dataset.space.factors_of(rows), []
    for start in range(0, len(rows), batch_size):
        pixels = torch.from_numpy(dataset.images(rows[start : start + batch_size])).to(device)
        values.append(judge.predict_values(pixels.permute(0, 3, 1, 2) / 127.5 - 1).cpu().numpy())
    hits = vocabulary.word_labels(np.concatenate(values)) == vocabulary.word_labels(factors)
    return hits.mean(axis=0), len(rows)
