"""Images whose attributes are the entries of a table, or texts that are stored with the images, joined by ``|``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.data.attributes import TEXTS, AttributeTexts, leave_unset
from ldm.data.dataset import held_out_rows, split_rows
from ldm.data.formats import attribute_tables
from ldm.data.formats.attribute_tables import AttributeTable
from ldm.data.formats.table_columns import arrange, free_text
from ldm.data.options import require_choice, require_count, require_share
from ldm.data.vocabulary import UNKNOWN, AttributeVocabulary
from ldm.ranges import Count, Fraction, PositiveInt, Share, Weight
from ldm.util import ConfigError, UserError

MAX_WORDS = 64
SEPARATOR = "|"
_HOLDOUT_SEED = 13


class AttributeImages:
    """Mixin of ``ImageDataset`` for images with a table of attributes: a vocabulary, unless a column is free text.

    A subclass calls ``use_table`` with a table whose row i is row i of the set, before ``rows_of``.

    Attributes:
        text: kind of the texts, None for none.
        unset_prob: probability with which each text is left empty.
    """

    text: str | None = None
    unset_prob = 0.0
    _values: np.ndarray  # (N, U), set with the vocabulary
    _free_texts: list[list[str]]  # U texts of each image, set without one
    _seen: frozenset[bytes]  # combinations of training, set with ``holdout``

    def use_table(
        self, table: AttributeTable, max_words: int, templates: Mapping[str, Any], holdout: float, **options: Any
    ) -> None:
        """Set the words, values, texts and held-out combinations of a table (``arrange``) with at least one row.

        Args:
            table: the table.
            max_words: see ``free_text``.
            templates: see ``table_phrases``.
            holdout: see ``StoredTexts``.
            options: those of ``AttributeTexts``.

        Raises:
            ConfigError: an option needs a vocabulary or is outside its choices, or no combination can be held out.
        """
        require_count("max_words", max_words)
        require_share("holdout", holdout)
        phrases = attribute_tables.table_phrases(table, templates)
        if reason := free_text(table, max_words):
            self._free_texts = attribute_tables.table_texts(table, phrases)
            return self.without_vocabulary(reason, holdout=holdout, **options)
        words = [table.words[name] for name in table.columns]
        self.vocabulary = AttributeVocabulary(table.columns, words, [range(len(known)) for known in words], phrases)
        self.attribute_texts = AttributeTexts(self.vocabulary, **options)
        self._values = attribute_tables.table_values(table)
        if holdout:
            held_out = {
                row.tobytes() for row in attribute_tables.held_out_combinations(self._values, holdout, _HOLDOUT_SEED)
            }
            self.holdout, self._seen = holdout, frozenset(row.tobytes() for row in self._values) - held_out
            if not held_out:
                raise ConfigError(
                    f"{table.path}: holdout: expected a combination of {', '.join(table.columns)} whose values all "
                    "occur in other combinations, got none. Set holdout: 0, or use fewer columns (columns:)."
                )

    def without_vocabulary(
        self, reason: str, text: str | None, unset_prob: float, holdout: float, caption_weights: Any, **_: Any
    ) -> None:
        """Set texts without words, and the reason; raise a ``ConfigError`` if an option needs a vocabulary."""
        require_choice("text", text, TEXTS)
        require_share("unset_prob", unset_prob)
        needs = {"text: caption": text == "caption", "holdout": holdout, "caption_weights": caption_weights}
        for option in [option for option, is_set in needs.items() if is_set]:
            raise ConfigError(f"{option} needs a data set with a vocabulary. {reason}.")
        self.missing_vocabulary, self.text, self.unset_prob = reason, text, unset_prob

    def texts(self, index: int) -> list[str]:
        """Return the U attribute texts of image ``index``, for a set without a vocabulary."""
        return self._free_texts[index]

    def labels(self, rows: np.ndarray) -> dict[str, Any]:
        """Return the attributes and texts of rows; which ones are left unset depends only on the seed and the rows."""
        if self.attribute_texts is not None:
            return self.attribute_labels(self._values[rows], rows)
        if self.text is None:
            return {}
        return {"text": leave_unset([self.texts(row) for row in rows.tolist()], self.unset_prob, self._rng(rows))}

    def rows_of(self, split: str | None, limit: int | None = None) -> np.ndarray:
        if not self.holdout:
            return super().rows_of(split, limit)
        if split in (None, "test"):
            return self.without_skipped(split_rows(len(self._values), split, limit))
        rows, draws = np.arange(len(self._values)), np.random.RandomState(_HOLDOUT_SEED)
        return self.without_skipped(held_out_rows(rows, self.is_unseen(self._values), split, limit, draws))

    def is_unseen(self, values: np.ndarray) -> np.ndarray:
        """See ``ImageDataset``: all values are known, and training has no image with them."""
        if not self.holdout:
            return super().is_unseen(values)
        values = np.ascontiguousarray(values, dtype=np.int64)
        is_new = np.array([row.tobytes() not in self._seen for row in values], dtype=bool)
        return is_new & (values != UNKNOWN).all(axis=1)

    def attribute_values(self, rows: np.ndarray) -> np.ndarray:
        return self._values[rows]


class StoredTexts(AttributeImages):
    """Mixin of ``ImageDataset`` for U attribute texts that are stored with each image.

    If each attribute has few different texts, the data set has a vocabulary, whose words are the texts. A subclass
    implements ``joined_texts`` and ``all_joined_texts``.

    Args:
        path: see the subclass, also for further options.
        num_attributes: U, the model's number of units; None takes that of the first image.
        names: names of the U attributes; None takes "attribute 1", "attribute 2", ...
        text, unset_prob, caption_weights, single_caption_share: see ``AttributeTexts``.
        holdout: share of the combinations that the training split does not contain, see ``FactorDataset``.
        max_words: an attribute has at most so many different texts, or four images of each text on average.
        split, limit: see ``split_rows``.

    Raises:
        ConfigError: an option is outside its choices, or needs a vocabulary.
        UserError: the first image has another number of attributes, or its texts cannot be read.
    """

    def __init__(
        self,
        path: Any = None,
        num_attributes: Count | None = None,
        unset_prob: Fraction = 0.0,
        names: Sequence[str] | None = None,
        text: str | None = "attributes",
        caption_weights: Sequence[Weight] | None = None,
        single_caption_share: Fraction = 0.5,
        holdout: Share = 0.0,
        max_words: Count = MAX_WORDS,
        split: str | None = None,
        limit: PositiveInt | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path=path, split=None if holdout else split, limit=limit, **options)
        self.num_attributes = num_attributes
        chosen = {"text": text, "unset_prob": unset_prob, "holdout": holdout, "caption_weights": caption_weights}
        chosen |= {"single_caption_share": single_caption_share, "phrasing": "canonical"}
        if not len(self):
            return self.without_vocabulary(f"{self.path}: there are no images", **chosen)
        self.num_attributes = width = len(self.texts(0))
        columns = names or [f"attribute {number}" for number in range(1, width + 1)]
        if len(set(columns)) != width:
            raise ConfigError(f"names: expected {width} different names of attributes, got {list(columns)}.")
        try:
            table = self._table(columns)
        except UserError as error:  # an image whose texts cannot be read is reported again when it is read
            self.without_vocabulary(str(error).rstrip("."), **chosen)
        else:
            self.use_table(table, max_words, {}, **chosen)
        if holdout:
            self.rows = np.repeat(self.rows_of(split, limit), options.get("repeat", 1))

    def _table(self, columns: Sequence[str]) -> AttributeTable:
        stored = self.all_joined_texts()
        split = {text: tuple(self._split_texts(index, text)) for index, text in enumerate(stored)}
        names = [f"image {index}" for index in range(len(stored))]
        return arrange(attribute_tables.make_table(self.path, columns, names, [split[text] for text in stored]))

    def joined_texts(self, index: int) -> str:
        """Return the attribute texts of image ``index``, joined by ``|``."""
        raise NotImplementedError(f"{type(self).__name__} must implement joined_texts()")

    def all_joined_texts(self) -> list[str]:
        """Return ``joined_texts`` of every image of the whole set."""
        raise NotImplementedError(f"{type(self).__name__} must implement all_joined_texts()")

    def texts(self, index: int) -> list[str]:
        """Return the U attribute texts of image ``index``; raise a ``UserError`` for another number."""
        return self._split_texts(index, self.joined_texts(index))

    def _split_texts(self, index: int, text: str) -> list[str]:
        texts = text.split(SEPARATOR)
        if self.num_attributes not in (None, len(texts)):
            raise UserError(
                f"{self.path}: expected {self.num_attributes} attributes of image {index}, got {len(texts)} "
                f"({text!r}). Set num_attributes and the model's latent_unit to the number in the file, or write the "
                "file again with an empty text for each unknown attribute."
            )
        return texts
