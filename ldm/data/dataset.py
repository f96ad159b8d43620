"""What data sets share: splits, repeats, ready-made batches; and, where factors are known, texts spoken from them.

A subclass only says how to read images by row. Batches are made whole (``__getitems__``), since one gathered
read and one call of the vocabulary are many times cheaper than B single items and a collate.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data.factors import FactorSpace
from ldm.data.vocabulary import AttributeVocabulary
from ldm.util import ConfigError

HELD_OUT = 5_000
VALIDATION = 1_000
_SPLIT_SEED = 20_030
_MIRROR_SEED = 7  # mirroring draws from a stream of its own, so that it changes no text


def split_rows(size: int, split: str | None, limit: int | None = None) -> np.ndarray:
    """Rows of a split, the same on every machine and in every run.

    * "train": all but 5,000 held-out rows (a tenth of sets below 50,000), in a fixed shuffled order, so that
      ``limit`` takes a fair sample;
    * "validation": 1,000 of the held-out rows;
    * "test" or None: all rows in order; with ``limit``, that many rows drawn evenly from the whole set at
      random (an even stride would keep some factors constant), in rising order.

    A smaller limit is always contained in a larger one.

    Args:
        size: number of rows of the whole set.
        split: see above.
        limit: keep only this many rows; None or more than there are keeps all.

    Returns:
        (n,) int64 rows.

    Raises:
        ConfigError: unknown split, limit below 1, or a set too small to be split.
    """
    if split not in (None, "train", "validation", "test"):
        raise ConfigError(f"unknown split {split!r}; expected train, validation, test or null (all, in order)")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"limit must be a whole number of images, at least 1, or null; found {limit!r}")
    everything = split in (None, "test")
    if everything and (limit is None or limit >= size):
        return np.arange(size)
    shuffled = np.random.RandomState(_SPLIT_SEED).permutation(size)
    if everything:
        return np.sort(shuffled[:limit])
    held_out = min(HELD_OUT, size // 10)
    if not held_out:
        raise ConfigError(
            f"split {split!r} holds out a tenth of the images but the data set has only {size}; use split: null"
        )
    return (shuffled[held_out:] if split == "train" else shuffled[: min(VALIDATION, held_out)])[:limit]


def leave_unset(texts: list[list[str]], probability: float, rng: np.random.Generator) -> list[list[str]]:
    """Empty each of the U texts of B images with some probability."""
    if not probability or not texts:
        return texts
    unset = rng.random((len(texts), len(texts[0]))) < probability
    return [["" if gone else text for text, gone in zip(strings, row)] for strings, row in zip(texts, unset.tolist())]


class ImageDataset(Dataset):
    """Images by row. Items and batches are dicts:

    * image: (H, W, 3) or (B, H, W, 3) uint8;
    * index: row in the whole set; int or (B,) int64;
    * whatever ``labels`` of the subclass adds.

    Args:
        rows: (n,) rows of the whole set, one for each position of this data set.
        repeat: show each image so many times in a row, which makes the epochs of a tiny set longer.
        do_augment: mirror each image with probability 1/2. Which ones depends on ``seed`` and on the rows of the
            batch alone, so a resumed run sees the very images it would have seen.
        seed: of everything random.

    Attributes:
        rows: (n,) int64, the row in the whole set of each position.
        space: factors of the whole set; None where they are not known.
        vocabulary: words for the factors, or None.
        in_memory: whether images cost so little that loader processes would only cost more.

    Raises:
        ConfigError: an option outside its choices.
    """

    space: FactorSpace | None = None
    vocabulary: AttributeVocabulary | None = None
    in_memory = False

    def __init__(self, rows: np.ndarray, repeat: int = 1, do_augment: bool = False, seed: int = 0) -> None:
        if not isinstance(repeat, int) or repeat < 1:
            raise ConfigError(f"repeat must be a whole number, at least 1; found {repeat!r}")
        self.rows = np.repeat(np.asarray(rows, dtype=np.int64), repeat)
        self.do_augment, self.seed = do_augment, seed

    @abstractmethod
    def images(self, rows: np.ndarray) -> np.ndarray:
        """Images of the given rows of the whole set: (n,) int -> (n, H, W, 3) uint8."""

    def labels(self, rows: np.ndarray) -> dict[str, Any]:
        """What a batch holds besides images: (n,) int -> {key: n values}."""
        return {}

    @property
    def position_space(self) -> FactorSpace | None:
        """The space whose row i is position i, where no split, limit or repeat chooses among the images."""
        return self.space

    def whole(self) -> ImageDataset:
        """A view of all images of a set with factors, each once: its position i is row i of ``position_space``."""
        view = copy.copy(self)
        view.rows = np.arange(self.space.size)
        return view

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Any]:
        """A whole batch, already collated."""
        rows = self.rows[np.asarray(positions, dtype=np.int64)]
        pixels = self.images(rows)
        if self.do_augment:
            mirrored = np.random.default_rng([self.seed, _MIRROR_SEED, *rows.tolist()]).random(len(rows)) < 0.5
            pixels[mirrored] = pixels[mirrored][:, :, ::-1]
        return {"image": torch.from_numpy(pixels), "index": torch.from_numpy(rows), **self.labels(rows)}

    def __getitem__(self, position: int) -> dict[str, Any]:
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} of a data set with {len(self)} images")
        batch = self.__getitems__([position])
        item = {key: value[0] for key, value in batch.items()}
        item["index"] = int(item["index"])
        return item


class FactorDataset(ImageDataset):
    """Images with known factors, and texts spoken from them.

    Args:
        space: factors of the rows.
        vocabulary: words for the factors, or None where no text is known.
        split: see ``split_rows``.
        limit: see ``split_rows``.
        text: None (no text), "attributes" (U strings per image) or "caption" (one string per image, naming a
            random non-empty choice of the attributes in random order).
        phrasing: "random" or "canonical" wording.
        caption_weights: how readily a caption names each attribute, F positive numbers; None treats all alike. An
            attribute that is hard to see is learned sooner when it is named more often.
        single_caption_share: how many of the captions name one attribute alone, in [0, 1].
        unset_prob: probability that an attribute text is left empty, unit by unit (only for "attributes").
        seed: of the wording. Texts depend on the seed and on the rows of the batch alone, so a resumed run
            reads the very texts it would have read.
        keep: a smaller full product, that metrics can still be computed from: factor name -> how many of its values
            to keep, evenly spread, or which (``FactorSpace.restrict``). Rows, factors and texts stay those of the
            whole set; splits divide what is kept.
        repeat: see ``ImageDataset``.

    Attributes:
        available: factor name -> values that the files hold, where they do not hold all; set before ``__init__``.
        kept: what ``keep`` leaves.

    Items and batches hold, besides those of ``ImageDataset``:
        factors: (F,) or (B, F) int64.
        text: U strings (B lists of U strings), or one string (B strings) for captions.
        caption_mask: (F,) or (B, F) bool, which attributes the caption names (only for captions).

    Raises:
        ConfigError: an option outside its choices.
    """

    available: Mapping[str, Sequence[int]] | None = None

    def __init__(
        self,
        space: FactorSpace,
        vocabulary: AttributeVocabulary | None = None,
        split: str | None = None,
        limit: int | None = None,
        text: str | None = None,
        phrasing: str = "random",
        unset_prob: float = 0.0,
        seed: int = 0,
        caption_weights: Sequence[float] | None = None,
        single_caption_share: float = 0.5,
        keep: Mapping[str, int | Sequence[int]] | None = None,
        repeat: int = 1,
    ) -> None:
        if text not in (None, "attributes", "caption"):
            raise ConfigError(f"unknown text {text!r}; expected attributes, caption or null (no text)")
        if text is not None and vocabulary is None:
            raise ConfigError(
                f"{type(self).__name__} has no vocabulary, so it cannot give text: {text}; set text: null"
            )
        if phrasing not in ("random", "canonical"):
            raise ConfigError(f"unknown phrasing {phrasing!r}; expected random or canonical")
        check_unset_prob(unset_prob)
        if unset_prob and text != "attributes":
            raise ConfigError(
                f"unset_prob: {unset_prob} empties attribute texts, but text is {text!r}; "
                "set text: attributes or unset_prob: 0"
            )
        if caption_weights is not None and (len(caption_weights) != space.num_factors or min(caption_weights) <= 0):
            raise ConfigError(
                f"caption_weights needs {space.num_factors} positive numbers, one for each of "
                f"{', '.join(space.factor_names)}; found {list(caption_weights)}"
            )
        if not 0.0 <= single_caption_share <= 1.0:
            raise ConfigError(f"single_caption_share is a share in [0, 1], found {single_caption_share}")
        self.space = space
        self.vocabulary = vocabulary
        self.kept = space.restrict(keep or {}, self.available)
        super().__init__(self.rows_of(split, limit), repeat, seed=seed)
        self.single_caption_share = single_caption_share
        self.caption_weights = np.ones(space.num_factors) if caption_weights is None else np.array(caption_weights)
        self.text, self.phrasing, self.unset_prob = text, phrasing, unset_prob

    @property
    def position_space(self) -> FactorSpace:
        """The space of what ``keep`` leaves; ``space`` where nothing is left out."""
        return self.kept.space

    def rows_of(self, split: str | None, limit: int | None = None) -> np.ndarray:
        """Rows (n,) of any split of what is kept, whichever this data set shows."""
        return self.kept.rows[split_rows(len(self.kept.rows), split, limit)]

    def whole(self) -> FactorDataset:
        """See ``ImageDataset``."""
        view = copy.copy(self)
        view.rows = self.kept.rows
        return view

    def labels(self, rows: np.ndarray) -> dict[str, Any]:
        """Factors and texts of rows."""
        factors = self.space.factors_of(rows)
        return {"factors": torch.from_numpy(factors), **(self._speak(rows, factors) if self.text else {})}

    def _speak(self, rows: np.ndarray, factors: np.ndarray) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, *rows.tolist()])
        texts = self.vocabulary.texts(factors, rng if self.phrasing == "random" else None)
        if self.text == "caption":
            return self._captions(texts, rng)
        return {"text": leave_unset(texts, self.unset_prob, rng)}

    def _captions(self, texts: list[list[str]], rng: np.random.Generator) -> dict[str, Any]:
        num, units = len(texts), self.vocabulary.num_units
        # Exponential arrival times: attribute k comes first with probability weight_k / sum of weights.
        order = (rng.exponential(size=(num, units)) / self.caption_weights).argsort(axis=1)
        alone = rng.random(num) < self.single_caption_share
        count = np.where(alone, 1, rng.integers(min(2, units), units + 1, num))
        mask = np.zeros((num, units), dtype=bool)
        np.put_along_axis(mask, order, np.arange(units) < count[:, None], axis=1)
        captions = [self.vocabulary.caption(t, o[:c]) for t, o, c in zip(texts, order.tolist(), count.tolist())]
        return {"text": captions, "caption_mask": torch.from_numpy(mask)}


def check_unset_prob(probability: float) -> None:
    """Raise where it is no probability."""
    if not 0.0 <= probability <= 1.0:
        raise ConfigError(f"unset_prob is a probability in [0, 1], found {probability}")
