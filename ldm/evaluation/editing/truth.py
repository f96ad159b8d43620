"""The true pictures of a data set: which combinations of attributes exist, and what a judge makes of them.

Dimensions: n rows, N samples, E edited units, F attributes.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ldm.data.dataset import VALIDATION
from ldm.data.vocabulary import UNKNOWN
from ldm.evaluation.editing.measure import SEEN, UNSEEN, EditPlan, EditResult, Judge, plan_edits, share, summarise_edits
from ldm.models.contracts import HasAttributes
from ldm.models.inputs import images_from_batch
from ldm.util import UserError


class TruePictures:
    """Pictures of a data set by the values and words of their attributes.

    Args:
        dataset: a data set with attributes.
        judge: predicts the values of attributes.
        batch_size: images judged at once.
        device: device of the judge.
    """

    def __init__(
        self, dataset: HasAttributes, judge: Judge, batch_size: int = 64, device: torch.device | str = "cpu"
    ) -> None:
        self.dataset, self.judge, self.batch_size, self.device = dataset, judge, batch_size, device

    @cached_property
    def _combinations(self) -> tuple[np.ndarray, np.ndarray]:
        """Values (n, F) of each combination without unknown values, and a random row (n,) of each.

        The row is one of the validation split, which the judge was not trained on, if the combination has one there.
        """
        rows = np.random.RandomState(0).permutation(self.dataset.rows_of(None))
        rows = rows[np.argsort(~np.isin(rows, self.dataset.rows_of("validation")), kind="stable")]
        values = self.dataset.attribute_values(rows)
        is_known = (values != UNKNOWN).all(axis=1)
        first = first_of_each(values[is_known])
        if not len(first):
            raise UserError(
                "edit score: expected images whose attributes are all known, got none. Complete the table of the test "
                "data, or remove columns with few entries"
            )
        return values[is_known][first], rows[is_known][first]

    @cached_property
    def _row_of_words(self) -> dict[tuple[int, ...], int]:
        values, rows = self._combinations
        words = self.dataset.vocabulary.word_labels(values)
        first = first_of_each(words)
        return dict(zip(map(tuple, words[first].tolist()), rows[first].tolist()))

    def plans(self, latent_shape: tuple[int, ...], num_samples: int, seed: int) -> dict[str, EditPlan]:
        """Return the edits of each group, ``UNSEEN`` and ``SEEN``; of one group "" without held-out combinations.

        Raises:
            UserError: no image has all attributes, or one of the groups has no combination.
            ConfigError: see ``plan_edits``.
        """
        combinations, vocabulary = self._combinations[0], self.dataset.vocabulary
        if not self.dataset.holdout:
            is_full = len(combinations) == math.prod(len(of_value) for of_value in vocabulary.value_to_word)
            return {"": plan_edits(vocabulary, latent_shape, num_samples, seed, None if is_full else combinations)}
        is_unseen = self.dataset.is_unseen(combinations)
        if is_unseen.all() or not is_unseen.any():
            raise UserError(
                f"edit score: expected held-out and other combinations of attributes, got {is_unseen.sum()} held out "
                f"of {len(combinations)}. Change data.params.test.params.holdout ({self.dataset.holdout})"
            )
        groups = {UNSEEN: combinations[is_unseen], SEEN: combinations[~is_unseen]}
        draws = latent_shape, num_samples, seed
        return {group: plan_edits(vocabulary, *draws, own, is_reversed=True) for group, own in groups.items()}

    def rows(self, words: np.ndarray) -> np.ndarray:
        """Return the row of a picture with each combination of words, (n, F) -> (n,) int64; ``UNKNOWN`` for none."""
        return np.array([self._row_of_words.get(tuple(row), UNKNOWN) for row in words.tolist()], dtype=np.int64)

    def images(self, rows: np.ndarray) -> Tensor:
        """Return images (n, 3, H, W) in [-1, 1] of rows; black where a row is ``UNKNOWN``."""
        images = images_from_batch({"image": torch.from_numpy(self.dataset.images(np.maximum(rows, 0)))})
        images[torch.from_numpy(rows == UNKNOWN)] = -1
        return images

    def judged(self, rows: np.ndarray) -> np.ndarray:
        """Return the judged values of rows, (n,) -> (n, F) int64; ``UNKNOWN`` where a row is."""
        parts = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        values = np.concatenate([self.judge(self.images(part).to(self.device)).cpu().numpy() for part in parts])
        return np.where(rows[:, None] == UNKNOWN, UNKNOWN, values)

    def ceiling(self, plan: EditPlan) -> EditResult:
        """Return the score of a model that samples the data set's own pictures: the errors of the judge."""
        edited = [self.judged(self.rows(plan.edited_words(row))) for row in range(len(plan.units))]
        return summarise_edits(plan, self.judged(self.rows(plan.words)), np.stack(edited))

    def judge_accuracy(self) -> tuple[np.ndarray, int]:
        """Judge the images of the data set's validation split, which the judge was not trained on.

        Returns:
            (F,) float share of correct words of each attribute, NaN where none is known, and the number of images.
        """
        rows, words = self.dataset.rows_of("validation", VALIDATION), self.dataset.vocabulary.word_labels
        true = words(self.dataset.attribute_values(rows))
        return share(words(self.judged(rows)) == true, true != UNKNOWN, axis=0), len(rows)


def first_of_each(rows: np.ndarray) -> np.ndarray:
    """Return the position of the first row of each kind in (n, F) int, in the order of the rows' values.

    It is ten times as fast as ``numpy.unique`` of whole rows.
    """
    codes = np.zeros(len(rows), dtype=np.int64)
    for column in rows.T:
        codes = np.unique(codes * (column.max(initial=0) + 1) + column, return_inverse=True)[1]
    return np.unique(codes, return_index=True)[1]
