"""Labels and texts of images with attributes, the same for every kind of data set.

An attribute of an image is a value; several values may share a word, and a word has one or more phrases
(``AttributeVocabulary``). Dimensions: n images, U attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ldm.data.options import require_choice, require_share
from ldm.data.vocabulary import UNKNOWN, AttributeVocabulary
from ldm.ranges import Fraction, Weight
from ldm.util import ConfigError

TEXTS = ("attributes", "caption", None)


class AttributeTexts:
    """Entries of a batch that follow from the values of attributes.

    Args:
        vocabulary: words and phrases of the U attributes.
        text: None (no text), "attributes" (U strings per image; "" for an unknown one) or "caption" (one string per
            image that names a random non-empty choice of its known attributes in random order).
        phrasing: "random" or "canonical".
        unset_prob: probability with which each attribute text is left empty (only for "attributes").
        caption_weights: U positive numbers; captions name attributes of larger weight more often, and these are
            learned sooner. None gives all the same weight.
        single_caption_share: share of the captions that name a single attribute, in [0, 1].

    Raises:
        ConfigError: an option is outside its choices.
    """

    def __init__(
        self,
        vocabulary: AttributeVocabulary,
        text: str | None = None,
        phrasing: str = "random",
        unset_prob: Fraction = 0.0,
        caption_weights: Sequence[Weight] | None = None,
        single_caption_share: Fraction = 0.5,
    ) -> None:
        require_choice("text", text, TEXTS)
        require_choice("phrasing", phrasing, ("random", "canonical"))
        require_share("unset_prob", unset_prob)
        if unset_prob and text != "attributes":
            raise ConfigError(
                f"unset_prob: {unset_prob} applies to attribute texts, but text is {text!r}. Set text: attributes, or "
                "unset_prob: 0."
            )
        names = vocabulary.factor_names
        if caption_weights is not None and (len(caption_weights) != len(names) or min(caption_weights) <= 0):
            raise ConfigError(
                f"caption_weights: expected {len(names)} positive numbers, one for each of {', '.join(names)}; got "
                f"{list(caption_weights)}."
            )
        require_share("single_caption_share", single_caption_share)
        self.vocabulary = vocabulary
        self.text, self.phrasing, self.unset_prob = text, phrasing, unset_prob
        self.caption_weights = np.ones(len(names)) if caption_weights is None else np.array(caption_weights)
        self.single_caption_share = single_caption_share

    def labels(self, values: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        """Return the entries of a batch.

        Args:
            values: (n, U) int64 values of the attributes, ``UNKNOWN`` where an image's is not known.
            rng: generator of phrases, of the attributes that captions name, and of unset texts.

        Returns:
            attributes: (n, U) int64, ``values``.
            text: n lists of U strings, or n strings for captions (only with ``text``).
            caption_mask: (n, U) bool, the attributes that the caption names (only for captions).
        """
        labels: dict[str, Any] = {"attributes": torch.from_numpy(values)}
        if self.text is None:
            return labels
        texts = self.vocabulary.texts(values, rng if self.phrasing == "random" else None)
        if self.text == "caption":
            return labels | self._captions(texts, values != UNKNOWN, rng)
        return labels | {"text": leave_unset(texts, self.unset_prob, rng)}

    def _captions(self, texts: list[list[str]], known: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        num, units = known.shape
        # Exponential arrival times: attribute k comes first with probability weight_k / sum of weights.
        arrival = np.where(known, rng.exponential(size=(num, units)) / self.caption_weights, np.inf)
        order = arrival.argsort(axis=1)
        is_single = rng.random(num) < self.single_caption_share
        count = np.where(is_single, 1, rng.integers(min(2, units), units + 1, num))
        mask = np.zeros((num, units), dtype=bool)
        np.put_along_axis(mask, order, np.arange(units) < count[:, None], axis=1)
        mask &= known
        captions = [self.vocabulary.caption(t, o[:c]) for t, o, c in zip(texts, order.tolist(), count.tolist())]
        return {"text": captions, "caption_mask": torch.from_numpy(mask)}


def leave_unset(texts: list[list[str]], probability: float, rng: np.random.Generator) -> list[list[str]]:
    """Replace each of the U texts of n images by "" with a probability."""
    if not probability or not texts:
        return texts
    unset = rng.random((len(texts), len(texts[0]))) < probability
    return [["" if gone else text for text, gone in zip(strings, row)] for strings, row in zip(texts, unset.tolist())]
