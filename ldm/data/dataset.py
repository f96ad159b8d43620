"""What every data set with known factors shares: splits, texts and ready-made batches.

A subclass only says how to read images by row. Batches are made whole (``__getitems__``), since one gathered
read and one call of the vocabulary are many times cheaper than B single items and a collate.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
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


def split_rows(size: int, split: str | None, limit: int | None = None) -> np.ndarray:
    """Rows of a split, the same on every machine and in every run.

    * "train": all but 5,000 held-out rows, in a fixed shuffled order, so that ``limit`` takes a fair sample;
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
    if size <= HELD_OUT:
        raise ConfigError(f"split {split!r} holds out {HELD_OUT} images but the data set has only {size}; "
                          "use split: null")
    return (shuffled[HELD_OUT:] if split == "train" else shuffled[:VALIDATION])[:limit]


class FactorDataset(Dataset):
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

    Attributes:
        rows: (n,) int64, the row in the whole set of each position of this split.
        in_memory: whether images cost so little that loader processes would only cost more.

    Items and batches are dicts:
        image: (H, W, 3) or (B, H, W, 3) uint8.
        factors: (F,) or (B, F) int64.
        index: row in the whole set; int or (B,) int64.
        text: U strings (B lists of U strings), or one string (B strings) for captions.
        caption_mask: (F,) or (B, F) bool, which attributes the caption names (only for captions).

    Raises:
        ConfigError: an option outside its choices.
    """

    in_memory = False

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
    ) -> None:
        if text not in (None, "attributes", "caption"):
            raise ConfigError(f"unknown text {text!r}; expected attributes, caption or null (no text)")
        if text is not None and vocabulary is None:
            raise ConfigError(f"{type(self).__name__} has no vocabulary, so it cannot give text: {text}; "
                              "set text: null")
        if phrasing not in ("random", "canonical"):
            raise ConfigError(f"unknown phrasing {phrasing!r}; expected random or canonical")
        if not 0.0 <= unset_prob <= 1.0:
            raise ConfigError(f"unset_prob is a probability in [0, 1], found {unset_prob}")
        if unset_prob and text != "attributes":
            raise ConfigError(f"unset_prob: {unset_prob} empties attribute texts, but text is {text!r}; "
                              "set text: attributes or unset_prob: 0")
        if caption_weights is not None and (len(caption_weights) != space.num_factors or min(caption_weights) <= 0):
            raise ConfigError(f"caption_weights needs {space.num_factors} positive numbers, one for each of "
                              f"{', '.join(space.factor_names)}; found {list(caption_weights)}")
        if not 0.0 <= single_caption_share <= 1.0:
            raise ConfigError(f"single_caption_share is a share in [0, 1], found {single_caption_share}")
        self.space = space
        self.vocabulary = vocabulary
        self.single_caption_share = single_caption_share
        self.caption_weights = np.ones(space.num_factors) if caption_weights is None else np.array(caption_weights)
        self.rows = split_rows(space.size, split, limit)
        self.text, self.phrasing, self.unset_prob, self.seed = text, phrasing, unset_prob, seed

    @abstractmethod
    def images(self, rows: np.ndarray) -> np.ndarray:
        """Images of the given rows of the whole set: (n,) int -> (n, H, W, 3) uint8."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Any]:
        """A whole batch, already collated."""
        rows = self.rows[np.asarray(positions, dtype=np.int64)]
        factors = self.space.factors_of(rows)
        batch = {
            "image": torch.from_numpy(self.images(rows)),
            "factors": torch.from_numpy(factors),
            "index": torch.from_numpy(rows),
        }
        if self.text is not None:
            batch.update(self._speak(rows, factors))
        return batch

    def __getitem__(self, position: int) -> dict[str, Any]:
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} of a data set with {len(self)} images")
        batch = self.__getitems__([position])
        item = {key: value[0] for key, value in batch.items()}
        item["index"] = int(item["index"])
        return item

    def _speak(self, rows: np.ndarray, factors: np.ndarray) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, *rows.tolist()])
        texts = self.vocabulary.texts(factors, rng if self.phrasing == "random" else None)
        if self.text == "caption":
            return self._captions(texts, rng)
        if self.unset_prob:
            unset = rng.random((len(texts), self.vocabulary.num_units)) < self.unset_prob
            texts = [["" if gone else text for text, gone in zip(unit_texts, row)]
                     for unit_texts, row in zip(texts, unset.tolist())]
        return {"text": texts}

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
