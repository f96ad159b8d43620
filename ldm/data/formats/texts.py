"""Attribute texts that are stored with the images, joined by ``|``."""

from __future__ import annotations

from typing import Any

import numpy as np

from ldm.data.attributes import leave_unset
from ldm.data.options import require_share
from ldm.util import UserError

SEPARATOR = "|"


class StoredTexts:
    """Mixin of ``ImageDataset`` that adds ``text``, U strings per image, to the items.

    A subclass implements ``joined_texts`` and calls ``check_texts`` at the end of its constructor.
    """

    def joined_texts(self, index: int) -> str:
        """Return the attribute texts of image ``index``, joined by ``|``."""
        raise NotImplementedError

    def check_texts(self, num_attributes: int | None, unset_prob: float) -> None:
        """Set U (None takes that of image 0) and the probability of empty texts; check image 0."""
        require_share("unset_prob", unset_prob)
        self.unset_prob, self.num_attributes = unset_prob, num_attributes
        if len(self):
            self.num_attributes = len(self.texts(0))

    def texts(self, index: int) -> list[str]:
        """Return the U attribute texts of image ``index``; raise a ``UserError`` for another number."""
        text = self.joined_texts(index)
        texts = text.split(SEPARATOR)
        if self.num_attributes not in (None, len(texts)):
            raise UserError(
                f"{self.path}: expected {self.num_attributes} attributes of image {index}, got {len(texts)} "
                f"({text!r}). Set num_attributes and the model's latent_unit to the number in the file, or write the "
                "file again with an empty text for each unknown attribute."
            )
        return texts

    def labels(self, rows: np.ndarray) -> dict[str, Any]:
        """Return the texts of rows; which ones are left unset depends only on the seed and the rows."""
        texts = [self.texts(row) for row in rows.tolist()]
        return {"text": leave_unset(texts, self.unset_prob, self._rng(rows))}
