"""The edit score: change one attribute's text, sample again from the same noise, and judge what changed.

Protocol, for U text units where unit k describes factor k of F = U:

1. Draw N tuples of factor values uniformly (one ``RandomState(seed)``); their canonical phrases are the base texts.
2. Sample N base images from noises x_T, drawn on the CPU with the same seed.
3. For each unit k and each of the N, draw another word of attribute k uniformly; replace the text of unit k by its
   canonical phrase, and sample again from the *same* x_T. A stochastic sampler draws the same noise for both.
4. A factor judge, trained on real images, predicts the factor values of all images; the vocabulary maps values to
   words. Where several values share a word ("tiny" has two sizes), each of them is correct.
5. ``matrix[k, k]`` is the accuracy of unit k: the share of its N edits whose judged word of factor k is the requested
   one. ``matrix[k, f]``, f != k, is leakage: the share whose judged word of factor f differs from the base image's.

Edit accuracy is the mean of the diagonal, edit leakage the mean of the other entries. A model that ignores its text has
no leakage and an accuracy near chance, 1 / number of words.

In data sets without every combination of values the base texts are those of existing combinations. With held-out
combinations (``holdout``) there are two groups, whose base texts, here called anchors, are held-out combinations
(``unseen``) or others (``seen``), and the edits are read in reverse: from the text with another word of attribute k, to
the anchor. Then the combination that is asked for was never trained on, and the accuracy of unit k is the share of
anchors whose judged word of attribute k is the requested one; leakage is symmetric. Single words are not edited.

Dimensions: N samples, U units, F factors, E edited units, C h w latent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.vocabulary import UNKNOWN, AttributeVocabulary
from ldm.diffusion.noise import fixed_noise, seeded_noise
from ldm.pictures.grid import CaptionedGrid
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

UNSEEN, SEEN = "_unseen", "_seen"  # groups, and the suffixes of their figures

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
    units: np.ndarray  # (E,) int64, the edited units
    asked: np.ndarray  # (E, N) int64, another word of each edited unit
    noise: Tensor  # (N, C, h, w) float32 on the CPU, x_T of each image and of its edits
    seed: int  # seed of all draws
    is_reversed: bool = False  # whether edits lead from the other word to the base text

    def base_texts(self, part: slice) -> list[list[str]]:
        """Return the texts of some base images."""
        return self.vocabulary.texts(self.factors[part])

    def edited_texts(self, unit: int, words: np.ndarray, part: slice) -> list[list[str]]:
        """Return the same texts with unit ``unit`` changed to ``words``, one for each image of the part."""
        texts = self.base_texts(part)
        for strings, word in zip(texts, words.tolist()):
            strings[unit] = self.vocabulary.phrases(unit, word)[0]
        return texts

    def edited_words(self, row: int) -> np.ndarray:
        """Return the words of the base images with the other word of edited unit number ``row``, (N, F) int64."""
        words = self.words.copy()
        words[:, self.units[row]] = self.asked[row]
        return words


def available_words(vocabulary: AttributeVocabulary, unit: int) -> np.ndarray:
    """Return the words of an attribute that belong to a factor value, sorted."""
    return np.unique(vocabulary.value_to_word[unit])


def plan_edits(
    vocabulary: AttributeVocabulary,
    latent_shape: tuple[int, ...],
    num_samples: int,
    seed: int,
    combinations: np.ndarray | None = None,
    is_reversed: bool = False,
) -> EditPlan:
    """Draw base factors, requested words and noises.

    Args:
        vocabulary: words of the attributes.
        latent_shape: C, h, w.
        num_samples: N.
        seed: seed of all draws.
        combinations: (n, F) int64, the combinations of values to draw from, each about equally often; None: all.
        is_reversed: see ``EditPlan``.

    Raises:
        ConfigError: all attributes have one word only, or ``num_samples`` is not positive.
    """
    if num_samples < 1:
        raise ConfigError(f"edit score: expected num_samples of at least 1, got num_samples={num_samples}")
    random_state = np.random.RandomState(seed)
    if combinations is None:
        columns = [random_state.randint(len(values), size=num_samples) for values in vocabulary.value_to_word]
        factors = np.stack(columns, axis=1).astype(np.int64)
    else:
        factors = combinations[np.resize(random_state.permutation(len(combinations)), num_samples)]
    words, choices = vocabulary.word_labels(factors), [available_words(vocabulary, k) for k in range(len(factors.T))]
    single = [name for name, own in zip(vocabulary.factor_names, choices) if len(own) < 2]
    units = np.array([k for k, own in enumerate(choices) if len(own) > 1], dtype=np.int64)
    if single:
        logger.warning("edit score: attributes of a single word are not edited: %s", ", ".join(single))
    if not len(units):
        raise ConfigError(f"edit score: expected two or more words of an attribute, got a single word of {single}")
    asked = np.empty((len(units), num_samples), dtype=np.int64)
    for row, k in enumerate(units):
        shift = random_state.randint(1, len(choices[k]), size=num_samples)  # at least 1: another word
        asked[row] = choices[k][(np.searchsorted(choices[k], words[:, k]) + shift) % len(choices[k])]
    noise = seeded_noise(num_samples, latent_shape, seed)
    return EditPlan(vocabulary, factors, words, units, asked, noise, seed, is_reversed)


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
    """The score; see the module's documentation. Figures are NaN where nothing was judged."""

    factor_names: tuple[str, ...]  # names of the E edited attributes
    num_samples: int  # base images that were judged, at most N
    num_edits: int  # judged pairs of a base image and its edit, at most E * N
    matrix: np.ndarray  # (E, E) float in [0, 1]; accuracy on the diagonal, leakage off it
    # Share of edits after which the judged *value* differs: stricter than words, and sensitive to the judge's errors.
    value_changes: np.ndarray  # (E, E) float in [0, 1]
    base_accuracy: np.ndarray  # (E,) float, share of base images whose judged word is the requested one
    all_right: float  # share of base images of which every judged word is the requested one
    words: tuple[tuple[str, ...], ...]  # words of the E edited attributes
    confusions: tuple[np.ndarray, ...]  # E arrays (W, W) int, number of edits by requested and by judged word
    chance: np.ndarray  # (E,) float, accuracy of a model that ignores the text

    @property
    def edit_accuracy(self) -> float:
        """Mean accuracy over units."""
        return float(np.diag(self.matrix).mean())

    @property
    def edit_leakage(self) -> float:
        """Mean leakage over units; NaN for a single factor."""
        return float(_off_diagonal_means(self.matrix).mean())

    def means(self) -> dict[str, float | None]:
        """Return ``edit_accuracy``, ``edit_leakage`` and ``all_right``."""
        values = {"edit_accuracy": self.edit_accuracy, "edit_leakage": self.edit_leakage, "all_right": self.all_right}
        return {name: plain_number(value) for name, value in values.items()}

    def figures(self, suffix: str = "") -> dict[str, float | None]:
        """Return ``means``, and accuracy and leakage of each attribute, by names that end in ``suffix``."""
        figures = self.means()
        for name, *values in zip(self.factor_names, np.diag(self.matrix), _off_diagonal_means(self.matrix)):
            figures |= dict(zip((f"edit_accuracy_{name}", f"edit_leakage_{name}"), map(plain_number, values)))
        return {f"{name}{suffix}": value for name, value in figures.items()}

    def neighbour_errors(self, name: str, order: Sequence[str]) -> float:
        """Return the share of an attribute's wrong edits whose judged word is next to the requested one in an order."""
        k = self.factor_names.index(name)
        places = np.array([order.index(word) for word in self.words[k]])
        distance = np.abs(places[:, None] - places)
        errors = self.confusions[k] * (distance > 0)
        return float(errors[distance == 1].sum() / errors.sum()) if errors.any() else np.nan

    def to_dict(self, ordered: Mapping[str, Sequence[str]] = MappingProxyType({})) -> dict[str, Any]:
        """Return plain values for JSON; NaN becomes ``None``. ``ordered``: attribute -> its words in their order."""
        by_factor = {"accuracy": np.diag(self.matrix), "leakage": _off_diagonal_means(self.matrix)}
        by_factor |= {"chance": self.chance, "base_accuracy": self.base_accuracy}
        by_factor["value_leakage"] = _off_diagonal_means(self.value_changes)
        errors = {name: self.neighbour_errors(name, ordered[name]) for name in self.factor_names if name in ordered}
        tables = {"matrix": self.matrix, "value_changes": self.value_changes}
        return {
            **self.means(),
            **{key: dict(zip(self.factor_names, map(plain_number, row))) for key, row in by_factor.items()},
            **{f"edit_neighbour_errors_{name}": plain_number(value) for name, value in errors.items()},
            "factor_names": list(self.factor_names),
            **{key: [[plain_number(value) for value in row] for row in table] for key, table in tables.items()},
            **{"num_samples": self.num_samples, "num_edits": self.num_edits},
        }


def plain_number(value: float) -> float | None:
    """Return a number for JSON, rounded; ``None`` for NaN."""
    return None if np.isnan(value) else round(float(value), 6)


def share(hits: np.ndarray, counted: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Return the share of hits among the counted entries; NaN where there is none."""
    with np.errstate(invalid="ignore"):
        return (hits & counted).sum(axis=axis) / counted.sum(axis=axis)


def _off_diagonal_means(matrix: np.ndarray) -> np.ndarray:
    """Return the mean of each row without its diagonal entry; NaN for a single column."""
    others = matrix[~np.eye(len(matrix), dtype=bool)].reshape(len(matrix), -1)
    return others.mean(axis=1) if others.size else np.full(len(matrix), np.nan)


def summarise_edits(plan: EditPlan, base: np.ndarray, edited: np.ndarray) -> EditResult:
    """Compute the score from judged values of the base images (N, F) and of the edits (E, N, F).

    Values of images that do not exist are ``UNKNOWN``; these images are left out.
    """
    vocabulary, units = plan.vocabulary, plan.units
    base_words = vocabulary.word_labels(base)[:, units]  # (N, E)
    edited_words = np.stack([vocabulary.word_labels(values)[:, units] for values in edited])  # (E, N, E)
    has_base, has_edit = base_words[:, 0] != UNKNOWN, edited_words[:, :, 0] != UNKNOWN
    pairs = (has_base & has_edit)[..., None]
    rows = np.arange(len(units))
    if plan.is_reversed:  # the edits of an image all lead to the base image
        judged, asked, counted = base_words.T, plan.words[:, units].T, np.broadcast_to(has_base, has_edit.shape)
    else:
        judged, asked, counted = edited_words[rows, :, rows], plan.asked, has_edit
    matrix = share(edited_words != base_words, pairs, axis=1)
    matrix[rows, rows] = share(judged == asked, counted, axis=1)
    is_right = base_words == plan.words[:, units]
    return EditResult(
        factor_names=tuple(vocabulary.factor_names[k] for k in units),
        num_samples=int(has_base.sum()),
        num_edits=int(pairs.sum()),
        matrix=matrix,
        value_changes=share((edited != base)[:, :, units], pairs, axis=1),
        base_accuracy=share(is_right, has_base[:, None], axis=0),
        all_right=float(share(is_right.all(axis=1), has_base)),
        words=tuple(tuple(vocabulary.words[k]) for k in units),
        confusions=tuple(
            np.bincount(wanted[valid] * size + found[valid], minlength=size**2).reshape(size, size)
            for size, wanted, found, valid in zip((len(vocabulary.words[k]) for k in units), asked, judged, counted)
        ),
        chance=np.array([1 / len(available_words(vocabulary, k)) for k in units]),
    )


def edit_score(
    edit: Editor, judge: Judge, plan: EditPlan, batch_size: int, device: torch.device | str = "cpu"
) -> EditResult:
    """Sample and judge the base images and all edits, (1 + E) * N images, ``batch_size`` at once."""
    num_samples, num_factors = plan.factors.shape
    values = np.empty((1 + len(plan.units), num_samples, num_factors), dtype=np.int64)  # row 0: the base images
    for start in range(0, num_samples, batch_size):
        part = slice(start, min(start + batch_size, num_samples))
        x_T = plan.noise[part].to(device)
        texts = [plan.base_texts(part)]
        texts += [plan.edited_texts(k, asked[part], part) for k, asked in zip(plan.units, plan.asked)]
        for row, row_texts in enumerate(texts):
            images = sample_from(edit, row_texts, x_T, plan.seed + start)
            values[row, part] = judge(images).cpu().numpy()
        logger.info("edit score: %d of %d samples and their edits", part.stop, num_samples)
    return summarise_edits(plan, values[0], values[1:])


def edit_grid(
    edit: Editor, plan: EditPlan, columns: int, device: torch.device | str = "cpu", true: Tensor | None = None
) -> CaptionedGrid:
    """Return a picture of the first ``columns`` samples: the base images, then one row per changed attribute.

    All images of a row are asked for the same word, the one that the fewest base images have already. ``true`` are
    pictures of the data set with the attributes of the base images, (columns, 3, H, W), for a row at the top.
    """
    part = slice(0, min(columns, len(plan.factors)))
    x_T = plan.noise[part].to(device)
    texts, rows = plan.base_texts(part), ["as in the text above"]
    images = [sample_from(edit, texts, x_T, plan.seed)]
    for k in plan.units:
        choices = available_words(plan.vocabulary, k)
        choices = np.roll(choices, -((plan.seed + k) % len(choices)))  # ties go to another word in each row
        word = min(choices, key=lambda choice, k=k: (plan.words[part, k] == choice).sum())
        edited = plan.edited_texts(k, np.full(len(texts), word), part)
        images.append(sample_from(edit, edited, x_T, plan.seed))
        rows.append(f"{plan.vocabulary.factor_names[k].replace('_', ' ')}\n→ {plan.vocabulary.phrases(k, word)[0]}")
    if true is not None:
        images, rows = [true[part].to(device), *images], ["pictures of the data set", *rows]
    captions = ["\n".join(strings) for strings in texts]
    return CaptionedGrid(torch.cat(images).cpu(), rows, captions, "One attribute's text changed, same noise")


def choose_guidance(
    score: Callable[[float], EditResult], scales: Sequence[float]
) -> tuple[float, list[dict[str, float | None]]]:
    """Return the guidance scale with the largest accuracy minus leakage, and the figures of each scale."""
    curve, best = [], []
    for scale in scales:
        result = score(scale)
        figures = {"edit_accuracy": result.edit_accuracy, "edit_leakage": result.edit_leakage}
        curve.append({"guidance_scale": scale, **{name: plain_number(value) for name, value in figures.items()}})
        best.append(result.edit_accuracy - np.nan_to_num(result.edit_leakage))  # NaN for a single attribute
    return scales[int(np.argmax(best))], curve
